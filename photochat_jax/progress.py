"""What a run tells: a console line, TensorBoard, and `metrics.jsonl`.

Only process 0 tells anything; on the others every method does nothing.
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import jax
import numpy as np
import tensorboardX
from etils import epath


def duration(seconds: float) -> str:
  """Returns a time as people say it: '42s', '3m05s', '2h07m'."""
  whole = int(round(seconds))
  if whole < 60:
    return f"{whole}s"
  if whole < 3600:
    return f"{whole // 60}m{whole % 60:02d}s"
  return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def sheet(photos: np.ndarray, columns: int = 4) -> np.ndarray:
  """Lays photos out on one.

  Args:
    photos: uint8[N, H, W, 3].
    columns: photos in a row of the sheet.

  Returns:
    uint8[rows * H, columns * W, 3], black where there is no photo.
  """
  count, height, width, channels = photos.shape
  columns = min(columns, count)
  rows = -(-count // columns)
  blank = np.zeros((rows * columns - count, height, width, channels), np.uint8)
  grid = np.concatenate([photos, blank]).reshape(
    rows, columns, height, width, channels
  )
  return grid.swapaxes(1, 2).reshape(rows * height, columns * width, channels)


def parameter_table(params: Mapping[str, Any]) -> str:
  """Parameters of each part, in millions."""
  lines = ["Parameters:"]
  for part, tree in params.items():
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    lines.append(f"  {part:20s} {count / 1e6:10.3f} M")
  return "\n".join(lines)


class Progress:
  """Writes a run's metrics as they come."""

  def __init__(
    self,
    workdir: str,
    total_steps: int,
    start_step: int = 0,
    interval: float = 10.0,
    stream: TextIO | None = None,
    clock: Any = time.monotonic,
  ):
    """Opens the files, cutting rows which a resumed run will write again.

    Args:
      workdir: folder of the run, a path or a `gs://` address.
      total_steps: updates in all stages.
      start_step: the step the run starts from; rows of `metrics.jsonl` of
        later steps are removed.
      interval: seconds between two lines where the console is no terminal.
      stream: the console, standard error without.
      clock: seconds that pass evenly.
    """
    self.total_steps, self.step = total_steps, start_step
    self._stream = stream or sys.stderr
    self._interval, self._clock = interval, clock
    self._last_line = -math.inf
    self._mark = (clock(), start_step)
    self._rate = 0.0
    self._is_open_line = False
    self._active = jax.process_index() == 0
    if not self._active:
      return
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    self._path = folder / "metrics.jsonl"
    self._rows = _rows_until(self._path, start_step)
    self._path.write_text("".join(row + "\n" for row in self._rows))
    # purge_step hides TensorBoard's points of the steps made again.
    self._board = tensorboardX.SummaryWriter(
      str(folder / "tensorboard"), purge_step=start_step + 1, flush_secs=30
    )

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def write(
    self, step: int, scalars: Mapping[str, Any], stage: str = ""
  ) -> None:
    """Writes one row of numbers.

    Args:
      step: updates made.
      scalars: `{name: number}`, names like 'train/loss'; numbers may be
        arrays of no dimension, and fetching them waits for the device.
      stage: the stage's name, for the row and the console.
    """
    if not self._active:
      return
    numbers = {name: float(value) for name, value in scalars.items()}
    for name, number in numbers.items():
      self._board.add_scalar(name, number, step)
    # JSON knows no NaN.
    row = {
      name: number if math.isfinite(number) else str(number)
      for name, number in numbers.items()
    }
    head = {"step": step, **({"stage": stage} if stage else {})}
    with self._path.open("a") as file:
      file.write(json.dumps({**head, **row}) + "\n")
    self._tell(step, numbers, stage)

  def photos(self, step: int, name: str, photos: np.ndarray) -> None:
    """Writes photos uint8[N, H, W, 3] to TensorBoard as one sheet."""
    if self._active:
      self._board.add_image(name, sheet(photos), step, dataformats="HWC")

  def message(self, text: str) -> None:
    """Writes a line of text to the console, below the progress line."""
    if self._active:
      self._end_line()
      self._stream.write(text + "\n")
      self._stream.flush()

  def close(self) -> None:
    """Closes the files and ends the console's line."""
    if self._active:
      self._end_line()
      self._board.close()

  def _tell(self, step: int, numbers: dict[str, float], stage: str) -> None:
    now = self._clock()
    then, last = self._mark
    if step > last and now > then:
      rate = (step - last) / (now - then)
      # The first rate holds the compilation; later ones smooth it away.
      self._rate = 0.5 * (self._rate + rate) if self._rate else rate
      self._mark = (now, step)
    self.step = step
    rewrites = self._stream.isatty()
    is_last = step >= self.total_steps
    if not (rewrites or is_last or now - self._last_line >= self._interval):
      return
    self._last_line = now
    parts = [f"step {step}/{self.total_steps}"]
    if stage:
      parts.insert(0, stage)
    parts += [
      f"{name.removeprefix('train/')} {number:.4g}"
      for name, number in numbers.items()
      if "loss" in name
    ]
    if self._rate:
      left = max(self.total_steps - step, 0) / self._rate
      parts += [f"{self._rate:.2f} steps/s", f"{duration(left)} left"]
    line = "  ".join(parts)
    if rewrites:
      self._stream.write("\r\x1b[K" + line)
      self._is_open_line = True
    else:
      self._stream.write(line + "\n")
    self._stream.flush()

  def _end_line(self) -> None:
    if self._is_open_line:
      self._stream.write("\n")
      self._is_open_line = False


def _rows_until(path: epath.Path, step: int) -> list[str]:
  """Returns a file's whole rows of at most `step`, dropping a torn last one."""
  if not path.exists():
    return []
  kept = []
  for row in path.read_text().splitlines():
    try:
      if json.loads(row)["step"] <= step:
        kept.append(row)
    except (ValueError, KeyError, TypeError):
      continue
  return kept
