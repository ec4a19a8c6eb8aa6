"""What a run tells: a console line, TensorBoard, and two files.

  WORKDIR/metrics.jsonl  what was learnt: the same numbers, however often the
                         run was stopped and went on
  WORKDIR/perf.jsonl     how fast (`runtime.meters`): other numbers each time

Only process 0 tells anything; on the others every method does nothing.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import jax
import numpy as np
import tensorboardX
from etils import epath

# Of `runtime.meters`: what a line says of each, and what a terminal's, which
# must be brief, only says of more than so much.
_SPEEDS = (
  ("tokens_per_second_per_chip", "{:,.0f} tokens/s/chip", 0),
  ("photos_per_second_per_chip", "{:.3g} photos/s/chip", math.inf),
  ("mfu", "MFU {:.1%}", 0),
  ("hbm_peak_gb", "HBM {:.1f} GB", math.inf),
  ("data_wait", "data wait {:.1%}", 0.01),
  ("goodput", "goodput {:.1%}", math.inf),
)


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
      start_step: the step the run starts from; rows of later steps are
        removed from the files.
      interval: seconds between two lines where the console is no terminal.
      stream: the console, standard error without.
      clock: seconds that pass evenly.
    """
    self.total_steps = total_steps
    self._stream = stream or sys.stderr
    self._interval, self._clock = interval, clock
    self._last_line = -math.inf
    self._is_open_line = False
    self._active = jax.process_index() == 0
    self._folder = epath.Path(workdir)
    self._boards: list[tensorboardX.SummaryWriter] = []
    if self._active:
      self._folder.mkdir(parents=True, exist_ok=True)
    self.rewind(start_step)

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
    if self._active:
      numbers = self._keep("metrics.jsonl", step, scalars, stage)
      self._tell(step, numbers, stage)

  def perf(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes how fast the run is; the console's next line says it too.

    Args:
      step: updates made.
      scalars: of `runtime.meters.Meters.take`.
    """
    if self._active:
      self._perf |= self._keep("perf.jsonl", step, scalars)

  def rewind(self, step: int) -> None:
    """Takes back what was written after a step, where a run goes back to it.

    Args:
      step: of the state that is gone on from.
    """
    self.step, self._mark = step, (self._clock(), step)
    self._rate, self._perf = 0.0, {}
    if not self._active:
      return
    for name in ("metrics.jsonl", "perf.jsonl"):
      _cut(self._folder / name, step)
    if self._boards:
      self._boards[-1].close()
    # purge_step hides TensorBoard's points of the steps made again. A file is
    # named after the second, which two may share.
    self._boards.append(
      tensorboardX.SummaryWriter(
        str(self._folder / "tensorboard"),
        purge_step=step + 1,
        flush_secs=30,
        filename_suffix=f".{len(self._boards)}",
      )
    )

  def photos(self, step: int, name: str, photos: np.ndarray) -> None:
    """Writes photos uint8[N, H, W, 3] to TensorBoard as one sheet."""
    if self._active:
      self._boards[-1].add_image(name, sheet(photos), step, dataformats="HWC")

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
      self._boards[-1].close()

  def _keep(
    self, name: str, step: int, scalars: Mapping[str, Any], stage: str = ""
  ) -> dict[str, float]:
    """Puts numbers into TensorBoard and, as a row, into a file."""
    numbers = {name: float(value) for name, value in scalars.items()}
    for tag, number in numbers.items():
      self._boards[-1].add_scalar(tag, number, step)
    # JSON knows no NaN.
    row = {
      tag: number if math.isfinite(number) else str(number)
      for tag, number in numbers.items()
    }
    head = {"step": step, **({"stage": stage} if stage else {})}
    with (self._folder / name).open("a") as file:
      file.write(json.dumps({**head, **row}) + "\n")
    return numbers

  def _speed(self, step: int, brief: bool) -> list[str]:
    """What a line says about speed, and about the time left."""
    rate = self._perf.get("perf/steps_per_second", self._rate)
    if not rate:
      return []
    parts = [f"{rate:.2f} steps/s"]
    for name, text, least in _SPEEDS:
      number = self._perf.get(f"perf/{name}")
      if number is not None and (number > least or not brief):
        parts.append(text.format(number))
    left = max(self.total_steps - step, 0) / rate
    return [*parts, f"{duration(left)} left"]

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
    line = "  ".join([*parts, *self._speed(step, rewrites)])
    if rewrites:
      # A line that is wrapped cannot be rewritten.
      line = line[: shutil.get_terminal_size().columns - 1]
      self._stream.write("\r\x1b[K" + line)
      self._is_open_line = True
    else:
      self._stream.write(line + "\n")
    self._stream.flush()

  def _end_line(self) -> None:
    if self._is_open_line:
      self._stream.write("\n")
      self._is_open_line = False


def _cut(path: epath.Path, step: int) -> None:
  """Drops a file's rows of steps after `step`, and a torn last one."""
  old = path.read_text() if path.exists() else ""
  new = "".join(row + "\n" for row in _rows_until(old, step))
  if new != old or not path.exists():
    # At one stroke: whoever is killed here keeps the old rows or the new.
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(new)
    beside.replace(path)


def _rows_until(text: str, step: int) -> list[str]:
  """The whole rows of at most `step`."""
  kept = []
  for row in text.splitlines():
    try:
      if json.loads(row)["step"] <= step:
        kept.append(row)
    except (ValueError, KeyError, TypeError):
      continue
  return kept
