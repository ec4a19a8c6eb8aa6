"""A data set's photos, from its dialogues to the report, with a progress bar.

`tools/fetch_photos.py` is its command line.
"""

import os
from collections.abc import Sequence
from typing import Any

import rich.console
from rich import progress, text

from photochat_jax.data import fetch, fetch_report, photo_store, schema, sources
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


class _Speed(progress.ProgressColumn):
  """Photos a second."""

  def render(self, task: progress.Task) -> text.Text:
    """Draws it; nothing before it is known."""
    return text.Text(f"{task.speed:.1f}/s" if task.speed else "")


class _Bar:
  """Shows how far a run is."""

  def __init__(self, console: rich.console.Console):
    self.progress = progress.Progress(
      progress.BarColumn(),
      progress.MofNCompleteColumn(),
      progress.TextColumn("{task.description}"),
      _Speed(),
      progress.TimeRemainingColumn(),
      console=console,
    )
    self._task = self.progress.add_task("photos", total=None)
    self._came = self._bytes = 0

  def start(self, count: int) -> None:
    """Says how many photos will be asked for."""
    self.progress.update(self._task, total=count)

  def row(self, row: Row) -> None:
    """Counts a photo that came or failed."""
    if row.status == OK:
      self._came += 1
      self._bytes += row.bytes
    said = f"photos, {self._came:,} came ({self._bytes / 2**20:,.0f} MiB)"
    self.progress.update(self._task, advance=1, description=said)


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
  bar = _Bar(console)
  with bar.progress:
    result = fetch.fetch(
      path,
      wanted,
      limits,
      retry=retry,
      check=check,
      on_start=bar.start,
      on_row=bar.row,
      **injected,
    )
  report = fetch_report.coverage(source, dialogues, result, left_out)
  file = fetch_report.write(report, path)
  for table in fetch_report.tables(report):
    console.print(table)
  console.print(fetch_report.sentence(report), highlight=False, soft_wrap=True)
  console.print(f"The report: {file}", highlight=False, soft_wrap=True)
  return report
