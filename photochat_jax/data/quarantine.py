"""Records that cannot be used: written down, counted, and borne up to a limit.

The quarantine file is JSON lines, one `Row` each, so that

    jq -r .reason quarantine.jsonl | sort | uniq -c

says what a data set suffers from, and `file`, `position` and `excerpt` where.
"""

import collections
import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from etils import epath

_REASONS = 3  # so many are told when reading stops


class Row(NamedTuple):
  """A record left out: a line of the quarantine file.

  Attributes:
    file: its path.
    position: 'record 0' of a list, 'line 1' of JSON lines.
    reason: what is wrong, as it is counted.
    value: the start of what was there instead; '' where it tells nothing.
    excerpt: the first characters of the record, as JSON.
  """

  file: str
  position: str
  reason: str
  value: str
  excerpt: str

  def __str__(self):
    name = self.file.rpartition("/")[2]
    value = f": {self.value}" if self.value else ""
    return f"{name} {self.position}: {self.reason}{value}"


def count_reasons(rows: Iterable[Row]) -> dict[str, int]:
  """How many records were left out for which reason, commonest first."""
  counts = collections.Counter(row.reason for row in rows)
  return dict(counts.most_common())


class Quarantine:
  """Collects what all splits and sources of a run left out.

  Attributes:
    path: the file of JSON lines, one `Row` each; None where nothing is written.
  """

  def __init__(self, path: epath.PathLike | None = None):
    self.path = None if path is None else epath.Path(path)
    self._rows: dict[Row, None] = {}

  @property
  def rows(self) -> tuple[Row, ...]:
    """The records so far; one that is read again counts once."""
    return tuple(self._rows)

  def add(self, rows: Iterable[Row]) -> None:
    """Takes the records of a split and writes the file anew.

    Anew, because storage in the cloud knows no appending. A run that leaves
    out nothing writes no file, and takes away that of a run before it.
    """
    before = len(self._rows)
    self._rows |= dict.fromkeys(rows)
    if self.path is None:
      return
    if len(self._rows) > before:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      lines = (json.dumps(row._asdict()) + "\n" for row in self._rows)
      self.path.write_text("".join(lines))
    elif not self._rows:
      self.path.unlink(missing_ok=True)

  def counts(self) -> dict[str, int]:
    """How many records were left out for which reason, commonest first."""
    return count_reasons(self._rows)


def check(broken: Mapping[str, int], total: int, limit: float, what: str = ""):
  """Stops where too large a share of the records cannot be used.

  Args:
    broken: reason -> number of records.
    total: number of all records, whole or broken.
    limit: the share, 0 to 1, that is borne.
    what: names the records.

  Raises:
    ValueError: the share is larger; it tells the commonest reasons.
  """
  count = sum(broken.values())
  if count <= limit * total:
    return
  common = sorted(broken, key=lambda reason: -broken[reason])
  told = "; ".join(f"{broken[r]} times {r}" for r in common[:_REASONS])
  more = len(common) - _REASONS
  told += f"; and {more} more reasons" * (more > 0)
  raise ValueError(
    f"{count} of {total} records {what}cannot be used, more than max_broken="
    f"{limit:g} allows: {told}."
  )
