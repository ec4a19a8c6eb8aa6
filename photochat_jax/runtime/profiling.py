"""A trace of some steps for XProf: what host and devices did, and when."""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from etils import epath


def _say_nothing(text: str) -> None:
  del text


class Profiler:
  """Traces some of a process's steps into WORKDIR/profile.

  ```
  with Profiler(workdir, (10, 15), progress.message) as profiler:
    for number, batch in enumerate(batches, start=1):
      profiler.step(number, metrics)
      ...  # The step.
  ```

  Every process traces its own devices, into a file named after its host.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    steps: tuple[int, int] | None = (10, 15),
    tell: Callable[[str], None] = _say_nothing,
  ):
    """Traces nothing yet.

    Args:
      workdir: the run's folder, a path or a `gs://` address.
      steps: the first and the last step to trace, counted from 1 at the start
        of this process; None traces nothing.
      tell: is given a line of text: where the trace is, or why there is none.

    Raises:
      ValueError: `steps` are not in order.
    """
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
      raise ValueError(
        f"The steps to profile are {steps}; give the first, at least 1, and "
        "the last, such as (10, 15)."
      )
    self._folder = epath.Path(workdir) / "profile"
    self._steps, self._tell = steps or None, tell
    self._trace: tempfile.TemporaryDirectory | None = None
    self._annotation = contextlib.ExitStack()
    self._last: Any = None

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, kind: type | None, *_) -> None:
    if self._trace is not None:
      # After an error the device may never be done.
      self._stop(None if kind else self._last)
    elif self._steps:
      self._tell(
        f"Nothing was profiled: the run ended before step {self._steps[0]} of "
        "this start."
      )

  def step(self, number: int, last: Any = None) -> None:
    """Says that a step is about to be made.

    Args:
      number: of the step, 1 for the first of this process.
      last: arrays that the step before made. They are waited for where the
        trace begins and where it ends, so that it holds what the devices did
        in its steps and in no others.
    """
    if not self._steps:
      return
    first, final = self._steps
    self._annotation.close()
    self._last = last
    if number == first:
      jax.block_until_ready(last)
      # Written here first: the profiler writes to no bucket.
      self._trace = tempfile.TemporaryDirectory()
      jax.profiler.start_trace(self._trace.name)
    elif number == final + 1:
      self._stop(last)
    if self._trace is not None:
      self._annotation.enter_context(
        jax.profiler.StepTraceAnnotation("train", step_num=number)
      )

  def _stop(self, last: Any) -> None:
    """Ends the trace and puts it where it belongs."""
    trace, self._trace, self._steps = self._trace, None, None
    if trace is None:
      return
    self._annotation.close()
    with trace as folder:
      jax.block_until_ready(last)
      jax.profiler.stop_trace()
      try:
        _copy(pathlib.Path(folder), self._folder)
      except OSError as error:  # It must not end the run.
        self._tell(f"The profile cannot be written: {error}")
        return
    self._tell(
      f"Profiled into {self._folder}. To look at it: pip install xprof; xprof "
      f"--logdir={self._folder} --port=8791, then open localhost:8791."
    )


def _copy(folder: pathlib.Path, to: epath.Path) -> None:
  """Copies the files of a folder, which may be nested."""
  for file in folder.rglob("*"):
    if file.is_file():
      target = to / file.relative_to(folder).as_posix()
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(file.read_bytes())
