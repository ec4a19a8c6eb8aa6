"""What of a data set's photos is there, and why the rest is not.

`coverage` counts, once per photo: an id that ten dialogues share counts once,
in each split that shares it. The same dict is written as JSON and shown as a
table.
"""

import collections
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import rich.table

from photochat_jax.data import schema
from photochat_jax.data.fetch import Result
from photochat_jax.data.fetch_rules import KINDS, SILENT

FILE = "coverage.json"


def _share(part: int, whole: int) -> float | None:
  """`part` of `whole`; None of nothing."""
  return part / whole if whole else None


def _photo_ids(dialogues: Iterable[schema.Dialogue]) -> dict[str, None]:
  """The different photos of some dialogues, in order."""
  return {t.photo.id: None for d in dialogues for t in d.turns if t.photo}


def coverage(
  source: str,
  splits: Mapping[str, Sequence[schema.Dialogue]],
  result: Result,
  left_out: Mapping[str, int],
) -> dict[str, Any]:
  """Counts what was asked for, had, fetched and missed.

  Args:
    source: the data set's name.
    splits: name of a split -> its dialogues.
    result: of the run.
    left_out: name of a split -> records that could not be read.

  Returns:
    JSON. Shares are from 0 to 1, None of nothing; the rest are numbers of
    photos, but for `dialogues` and `records_left_out`.
  """
  ids = {name: _photo_ids(dialogues) for name, dialogues in splits.items()}
  asked = {photo_id for some in ids.values() for photo_id in some}
  found = (result.had | result.fetched) & asked

  def failures(some):
    counts = collections.Counter(
      result.rows[i].status
      if i in result.rows and result.rows[i].status in KINDS
      else "not_asked"
      for i in some
      if i not in found
    )
    return dict(counts.most_common())

  shared = schema.shared_photos(splits)
  content = collections.Counter(
    result.rows[i].sha256 for i in found if i in result.rows
  )
  del content[""]
  return {
    "source": source,
    "photos": {
      "asked": len(asked),
      "had": len(result.had & asked),
      "fetched": len(result.fetched & asked),
      "missing": len(asked) - len(found),
      "coverage": _share(len(found), len(asked)),
      "with_the_content_of_another": sum(n - 1 for n in content.values()),
    },
    "failures": {
      kind: {
        "photos": count,
        "asked_again": KINDS[kind].again,
        "meaning": KINDS[kind].meaning,
      }
      for kind, count in failures(asked).items()
    },
    "splits": {
      name: {
        "dialogues": len(splits[name]),
        "records_left_out": left_out.get(name, 0),
        "asked": len(some),
        "found": len(found & some.keys()),
        "coverage": _share(len(found & some.keys()), len(some)),
        "shared_with_other_splits": len(shared.keys() & some.keys()),
        "failures": failures(some),
      }
      for name, some in ids.items()
    },
    "shared": {
      "photos": len(shared),
      "by_splits": dict(
        collections.Counter("+".join(names) for names in shared.values())
      ),
      "ids": {photo_id: list(names) for photo_id, names in shared.items()},
    },
    "damaged_manifest_lines": result.damaged_lines,
    "stopped": result.stopped,
  }


def write(report: Mapping[str, Any], folder: str | os.PathLike) -> pathlib.Path:
  """Writes a report to `photos/coverage.json`, whole or not at all."""
  file = pathlib.Path(folder) / "photos" / FILE
  temporary = file.with_suffix(".tmp")
  temporary.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
  os.replace(temporary, file)
  return file


def _percent(share: float | None) -> str:
  # 99.96 % is not all.
  return "-" if share is None else f"{int(share * 1000) / 10:.1f} %"


def tables(report: Mapping[str, Any]) -> list[rich.table.Table]:
  """The report for a terminal: per split, then per kind of failure."""
  found = rich.table.Table(title=f"Photos of {report['source']}")
  found.add_column("split")
  for name in ("dialogues", "asked", "found", "coverage", "in other splits"):
    found.add_column(name, justify="right")
  for name, split in report["splits"].items():
    found.add_row(
      name,
      f"{split['dialogues']:,}",
      f"{split['asked']:,}",
      f"{split['found']:,}",
      _percent(split["coverage"]),
      f"{split['shared_with_other_splits']:,}",
    )
  photos = report["photos"]
  found.add_section()
  found.add_row(
    "all, each once",
    f"{sum(split['dialogues'] for split in report['splits'].values()):,}",
    f"{photos['asked']:,}",
    f"{photos['asked'] - photos['missing']:,}",
    _percent(photos["coverage"]),
    f"{report['shared']['photos']:,}",
  )
  if not report["failures"]:
    return [found]
  failed = rich.table.Table(title="Why photos are missing")
  failed.add_column("kind")
  failed.add_column("photos", justify="right")
  failed.add_column("asked next time")
  failed.add_column("meaning")
  for kind, failure in report["failures"].items():
    failed.add_row(
      kind,
      f"{failure['photos']:,}",
      "yes" if failure["asked_again"] else "with --retry",
      failure["meaning"],
    )
  return [found, failed]


def sentence(report: Mapping[str, Any]) -> str:
  """The report in a line or two, and what to do."""
  photos = report["photos"]
  there = photos["asked"] - photos["missing"]
  said = (
    f"{there:,} of {photos['asked']:,} photos are there "
    f"({_percent(photos['coverage'])}): {photos['had']:,} were, "
    f"{photos['fetched']:,} came now, {photos['missing']:,} are missing."
  )
  again = sum(
    failure["photos"]
    for failure in report["failures"].values()
    if failure["asked_again"]
  )
  if again:
    said += f" The same command asks again for {again:,} of these."
  silent = SILENT | {"given_up", "not_asked"}
  if report["failures"] and not there and silent >= report["failures"].keys():
    said += " No host answered: is there a network?"
  elif photos["missing"]:
    said += " Training runs on what is there."
  if report["damaged_manifest_lines"]:
    said += (
      f" {report['damaged_manifest_lines']:,} lines of the manifest are "
      "damaged and left out."
    )
  return said
