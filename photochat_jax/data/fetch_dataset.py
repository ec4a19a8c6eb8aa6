"""A data set's photos, from its dialogues to the report, with a progress bar.

`tools/fetch_photos.py` is its command line.
"""

import os
from collections.abc import Sequence
from typing import Any

import rich.console

from photochat_jax.data import (
  bars,
  fetch,
  fetch_report,
  photo_store,
  schema,
  sources,
)
from photochat_jax.data.fetch_rules import Limits
from photochat_jax.data.photo_store import OK, Row

# data set -> (whether its photos are Open Images', what fetching may use).
SOURCES = {
  # One host, which serves the world: no need to be shy.
  "photochat": (
    True,
    Limits(concurrency=32, host_concurrency=32, rate=100.0, host_rate=100.0),
  ),
  "dialogcc": (False, Limits()),
}
SOURCES["photochat_plus"] = SOURCES["photochat"]


def _read(
  source: str, path: str | os.PathLike, names: Sequence[str]
) -> tuple[dict[str, list[schema.Dialogue]], dict[str, int]]:
  """The dialogues of each split, and how many records were left out."""
  splits, left_out = {}, {}
  # Where there is no split, reading one says what was expected.
  for name in names or sources.list_splits(source, path) or schema.SPLITS[:1]:
    splits[name], found = sources.read_split(source, path, name, max_broken=1.0)
    left_out[name] = len(found.broken)
  return splits, left_out


def fetch_dataset(
  source: str,
  path: str | os.PathLike,
  limits: Limits,
  splits: Sequence[str] = (),
  retry: bool = False,
  check: bool = False,
  console: rich.console.Console | None = None,
  **injected: Any,
) -> dict[str, Any]:
  """Fetches the photos that a data set's folder lacks, and reports.

  Args:
    source: a key of `SOURCES`.
    path: the folder, on this machine.
    limits: what to use.
    splits: names of splits; all that are there without.
    retry: see `fetch.fetch`.
    check: see there.
    console: where the bar and the report go; standard output without.
    **injected: arguments of `fetch.fetch` which tests change.

  Returns:
    The report, see `fetch_report.coverage`, which `photos/coverage.json` holds.

  Raises:
    ValueError: there is nothing to read, or the folder cannot be used.
  """
  photo_store.check_local(path)
  console = console or rich.console.Console()
  by_id, _ = SOURCES[source]
  dialogues, left_out = _read(source, path, splits)
  wanted = fetch.addresses(dialogues, by_id)
  with bars.Bar("photos", console=console) as bar:
    came = size = 0

    def count(row: Row) -> None:
      nonlocal came, size
      came += row.status == OK
      size += row.bytes if row.status == OK else 0
      bar.advance(1, f"photos, {came:,} came ({size / 2**20:,.0f} MiB)")

    result = fetch.fetch(
      path,
      wanted,
      limits,
      retry=retry,
      check=check,
      on_start=bar.start,
      on_row=count,
      **injected,
    )
  report = fetch_report.coverage(source, dialogues, result, left_out)
  file = fetch_report.write(report, path)
  for table in fetch_report.tables(report):
    console.print(table)
  console.print(fetch_report.sentence(report), highlight=False, soft_wrap=True)
  console.print(f"The report: {file}", highlight=False, soft_wrap=True)
  return report
