"""Ends a run in which a process lives but does not step.

The processes of a run wait for each other in every step. When one of them
dies, JAX ends the others; when one hangs (a stuck disk, a deadlock), they wait
for ever. So each process tells how far it is in `WORKDIR/heartbeats/<i>.json`,
and one that has made no step for long enough names those that are behind,
writes down where its own threads are (`WORKDIR/stacks/<i>.txt`), and exits with
`STUCK`, so that whatever started the run can start it again.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

STUCK = 76
"""Exit code of a run that a process held up."""


class Watchdog:
  """Watches this process's steps, in a `with` statement."""

  def __init__(
    self,
    workdir: epath.PathLike,
    stuck_after: float,
    clock: Callable[[], float] = time.time,
    end: Callable[[int], Any] = os._exit,
  ):
    """Starts nothing yet.

    Args:
      workdir: the run's folder, which all processes see.
      stuck_after: seconds without a step after which the run is ended; 0 to
        watch nothing.
      clock: seconds, alike on all processes.
      end: ends the process. A hanging thread would keep `sys.exit` waiting.
    """
    self._workdir = epath.Path(workdir)
    self._stuck_after, self._clock, self._end = stuck_after, clock, end
    self._started = self._beaten = clock()
    self._step = 0
    self._pauses = 0
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> "Watchdog":
    if self._stuck_after:
      self.beat(self._step)
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._done.set()
    if self._thread.is_alive():
      self._thread.join()

  def beat(self, step: int) -> None:
    """Notes a step; costs nothing."""
    self._step, self._beaten = step, self._clock()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """For work between steps that may take as long as it takes."""
    self._pauses += 1
    try:
      yield
    finally:
      self._pauses -= 1
      self.beat(self._step)

  def look(self) -> None:
    """Tells how far this process is, and ends it if that is for too long."""
    now = self._clock()
    if self._pauses:
      self._beaten = now
    self._tell(now)
    if now - self._beaten < self._stuck_after:
      return
    sentence = self._name(now)
    logging.error("%s", sentence)
    folder = self._workdir / "stacks"
    folder.mkdir(parents=True, exist_ok=True)
    stacks = f"{sentence}\n{_stacks()}"
    sys.stderr.write(stacks)
    (folder / f"{jax.process_index()}.txt").write_text(stacks)
    self._end(STUCK)

  def _watch(self) -> None:
    while not self._done.wait(min(self._stuck_after / 10, 30.0)):
      self.look()

  def _tell(self, now: float) -> None:
    folder = self._workdir / "heartbeats"
    folder.mkdir(parents=True, exist_ok=True)
    beat = {
      "process": jax.process_index(),
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "step": self._step,
      "stepped": self._beaten,
      "told": now,
    }
    path = folder / f"{beat['process']}.json"
    new = folder / f"{beat['process']}.json.new"
    new.write_text(json.dumps(beat))
    new.replace(path)

  def _name(self, now: float) -> str:
    """Says which processes are behind, and since when."""
    beats = {}
    for index in range(jax.process_count()):
      path = self._workdir / "heartbeats" / f"{index}.json"
      with contextlib.suppress(OSError, ValueError):
        beat = json.loads(path.read_text())
        if beat["told"] >= self._started:  # Else of an earlier start.
          beats[index] = beat
    silent = [i for i in range(jax.process_count()) if i not in beats]
    lines = [f"process {i} has not been heard of" for i in silent]
    last = min((beat["step"] for beat in beats.values()), default=0)
    lines += [
      f"process {i} (host {beat['host']}, pid {beat['pid']}) has not gone "
      f"beyond step {beat['step']} for {now - beat['stepped']:,.0f} s"
      for i, beat in beats.items()
      if beat["step"] == last
    ]
    return (
      f"The run is stuck: {'; '.join(lines)}. Ending process "
      f"{jax.process_index()}, at step {self._step}; start the run again."
    )


def _stacks() -> str:
  """Where every thread of this process is."""
  names = {thread.ident: thread.name for thread in threading.enumerate()}
  return "\n".join(
    f"Thread {names.get(ident, ident)}:\n"
    + "".join(traceback.format_stack(frame))
    for ident, frame in sys._current_frames().items()
  )
