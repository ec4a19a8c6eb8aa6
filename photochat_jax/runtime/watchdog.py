"""Ends a run in which a process lives but does not step.

The processes of a run wait for each other in every step. When one of them
dies, JAX ends the others; when one hangs (on a disk, in a deadlock), they would
wait for ever. So a thread of each process writes how far it is,

  WORKDIR/heartbeats/<process>.json   {"process", "host", "pid",
                                       "step", "stepped": when it began,
                                       "paused", "written": when this was}

in seconds since 1970. When its process has begun no step for long enough, it
reads the others' heartbeats, names the processes that are behind, writes where
its own threads are,

  WORKDIR/stacks/<process>.txt

and ends the process with the exit code `STUCK`, so that whatever started the
run can start it again. So does the thread of the process that hangs.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

STUCK = 76
"""Exit code of a run that a process held up."""


class Watchdog:
  """Watches this process's steps, in a `with` statement.

  All processes enter it at about the same time: what was written before is of
  an earlier start of the run.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    stuck_after: float,
    clock: Callable[[], float] = time.monotonic,
    calendar: Callable[[], float] = time.time,
    end: Callable[[int], Any] = os._exit,
  ):
    """Starts nothing yet.

    Args:
      workdir: the run's folder, which all processes see, a path or a `gs://`
        address.
      stuck_after: seconds without a new step after which the run is ended; 0 to
        watch nothing.
      clock: seconds that pass evenly, and not while a laptop sleeps.
      calendar: seconds that mean the same on all hosts.
      end: ends the process; `sys.exit` would wait for the thread that hangs.
    """
    self._workdir = epath.Path(workdir)
    self._stuck_after = stuck_after
    self._interval = min(stuck_after / 10, 30.0)
    self._clock, self._calendar, self._end = clock, calendar, end
    self._process = jax.process_index()
    self._processes = jax.process_count()
    self._step, self._stepped, self._pauses = 0, clock(), 0
    self._started = calendar()
    self._can_write = True
    self._done = threading.Event()
    self._thread = threading.Thread(
      target=self._watch, name="watchdog", daemon=True
    )

  def __enter__(self) -> "Watchdog":
    if self._stuck_after:
      self.beat(self._step)
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._done.set()
    if self._thread.is_alive():
      self._thread.join(10.0)  # It may hang in a write itself.

  def beat(self, step: int) -> None:
    """Notes that a step is begun; costs nothing.

    Args:
      step: the update's number. To be told before the devices are given it:
        there the others wait for a process that does not come so far.
    """
    self._step, self._stepped = step, self._clock()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """For what is between steps and may take as long as it takes."""
    self._pauses += 1
    try:
      yield
    finally:
      self._stepped = self._clock()
      self._pauses -= 1

  def look(self) -> bool:
    """Writes the heartbeat, and stacks if this process is stuck.

    Returns:
      Whether it is.
    """
    # In this order: a pause that ends here has ended with a new time.
    paused, idle = bool(self._pauses), self._clock() - self._stepped
    heartbeat = self._heartbeat(paused, idle)
    self._write(f"heartbeats/{self._process}.json", json.dumps(heartbeat))
    if paused or idle < self._stuck_after:
      return False
    heartbeats = self._read_heartbeats() | {self._process: heartbeat}
    file = f"stacks/{self._process}.txt"
    sentence = (
      f"{_verdict(heartbeats, self._processes, self._stuck_after / 2)} Ending "
      f"process {self._process}, at step {heartbeat['step']}, with exit code "
      f"{STUCK}; its stacks are in {self._workdir / file}."
    )
    stacks = _stacks()
    logging.error("%s", sentence)
    sys.stderr.write(stacks)
    sys.stderr.flush()
    self._write(file, f"{sentence}\n\n{stacks}")
    return True

  def _watch(self) -> None:
    try:
      self._set_alarm()
      while not self.look():
        if self._done.wait(self._interval):
          return
        self._set_alarm()
      # The others must get to look as well. The end of the first process is
      # the end of all, since JAX's service is in it. One that was waiting gets
      # an error when the one it waited for ends: then there is no more to see.
      self._done.wait((2 if self._process else 4) * self._interval)
      self._end(STUCK)
    finally:
      faulthandler.cancel_dump_traceback_later()

  def _set_alarm(self) -> None:
    """Sees to the end of a process whose hanging thread holds Python's lock.

    This thread does not get to run then. The alarm needs no lock, writes the
    stacks to the console, and exits with 1; the others name the process.
    """
    wait = self._stuck_after + max(10 * self._interval, 60.0)
    faulthandler.dump_traceback_later(wait, exit=True, file=sys.__stderr__)

  def _heartbeat(self, paused: bool, idle: float) -> dict[str, Any]:
    now = self._calendar()
    return {
      "process": self._process,
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "step": self._step,
      "stepped": now - idle,
      "paused": paused,
      "written": now,
    }

  def _write(self, name: str, text: str) -> None:
    """Writes a file whole; goes on where that cannot be done."""
    path = self._workdir / name
    part = path.with_suffix(".part")
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      part.write_text(text)
      part.replace(path)
      self._can_write = True
    except Exception as error:  # A full disk, and buckets raise anything.
      if self._can_write:
        logging.warning("The watchdog cannot write %s: %s", path, error)
      self._can_write = False

  def _read_heartbeats(self) -> dict[int, dict[str, Any]]:
    """Those of this start of the run, by process."""
    found = {}
    for process in range(self._processes):
      path = self._workdir / "heartbeats" / f"{process}.json"
      with contextlib.suppress(Exception):  # As when writing.
        heartbeat = json.loads(path.read_text())
        if heartbeat["written"] >= self._started:
          found[process] = heartbeat
    return found


def _verdict(
  heartbeats: Mapping[int, Mapping[str, Any]], processes: int, silence: float
) -> str:
  """Says in a sentence which processes are behind.

  Args:
    heartbeats: those there are, by process, at least one.
    processes: how many there are.
    silence: seconds after which a heartbeat should have been written again.
  """
  now = max(beat["written"] for beat in heartbeats.values())
  steps = [beat["step"] for beat in heartbeats.values()]
  low, high = min(steps), max(steps)
  blamed = []
  for process in range(processes):
    beat = heartbeats.get(process)
    if beat is None:
      blamed.append(
        f"process {process} has written no heartbeat since the run's start"
      )
      continue
    name = f"process {process} (host {beat['host']}, pid {beat['pid']})"
    written, stepped = now - beat["written"], now - beat["stepped"]
    if beat["step"] == low < high or processes == 1:
      does = ", busy with something else" if beat["paused"] else ""
      blamed.append(
        f"{name} has not gone beyond step {low} for {stepped:,.0f} s{does}"
      )
    elif written > silence:
      blamed.append(f"{name} has written no heartbeat for {written:,.0f} s")
  if not blamed:
    stepped = now - min(beat["stepped"] for beat in heartbeats.values())
    return (
      f"None of the {processes} processes has gone beyond step {low} for "
      f"{stepped:,.0f} s, and none is behind: their stacks say what they wait "
      "for."
    )
  sentence = "; ".join(blamed)
  if low < high:
    them = "it" if len(blamed) == 1 else "them"
    sentence += f"; the others wait for {them} at step {high}"
  return f"{sentence[0].upper()}{sentence[1:]}."


def _stacks() -> str:
  """Where every thread of this process is, the last call first."""
  with tempfile.TemporaryFile() as file:
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    return file.read().decode("utf-8", "replace")
