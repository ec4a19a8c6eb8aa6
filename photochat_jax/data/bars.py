"""One progress bar for everything that takes a while."""

from typing import Any

import rich.console
from rich import progress, text


class _Speed(progress.ProgressColumn):
  """Things a second."""

  def render(self, task: progress.Task) -> text.Text:
    """Draws it; nothing before it is known."""
    return text.Text(f"{task.speed:,.1f}/s" if task.speed else "")


class Bar:
  """A bar with a description, what is done, the speed and the time left.

  ```
  with Bar("Captioning", len(photos)) as bar:
    bar.advance(8)
  ```
  """

  def __init__(
    self,
    description: str,
    total: int | None = None,
    console: rich.console.Console | None = None,
    shown: bool = True,
    counted: bool = True,
  ):
    """Draws nothing yet.

    Args:
      description: what is being done; shown as it is, without markup.
      total: how much there is to do; None where `start` will say.
      console: where it is drawn; standard output without.
      shown: False draws nothing.
      counted: show how many of the total are done, and how fast; otherwise the
        share alone, for totals that say nothing to people.
    """
    done = (
      (progress.MofNCompleteColumn(), _Speed())
      if counted
      else (progress.TaskProgressColumn(),)
    )
    self._progress = progress.Progress(
      progress.TextColumn("{task.description}", markup=False),
      progress.BarColumn(),
      *done,
      progress.TimeRemainingColumn(),
      console=console,
      disable=not shown,
    )
    self._task = self._progress.add_task(description, total=total)

  def __enter__(self) -> "Bar":
    self._progress.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._progress.stop()

  def start(self, total: int) -> None:
    """Says how much there is to do."""
    self._progress.update(self._task, total=total)

  def advance(self, count: int = 1, description: str | None = None) -> None:
    """Says that so much more is done, and maybe what is being done now."""
    self._progress.update(self._task, advance=count, description=description)

  def reach(self, done: int, description: str) -> None:
    """Says how much is done in all, and what is being done."""
    self._progress.update(self._task, completed=done, description=description)
