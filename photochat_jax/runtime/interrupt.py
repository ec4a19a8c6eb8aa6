"""Stopping on request: all processes save the same step and exit.

| exit code          | means                                                 |
|--------------------|-------------------------------------------------------|
| `SAVED`, 75        | SIGTERM, or another process was asked to stop; the    |
|                    | state is saved, and the same command goes on from it  |
| `INTERRUPTED`, 130 | Ctrl-C (SIGINT) of this process; saved as well        |

75 is EX_TEMPFAIL of sysexits.h: try again.

SIGTERM is how a cloud says that it takes a machine back: a TPU host that is
preempted or maintained shuts down, and GKE and SLURM send it themselves.

A process that is alone handles the signals itself. Several have JAX's
preemption service, which `jax.distributed.initialize` starts: it catches
SIGTERM below Python, and whichever of them gets one, it picks a step that none
has reached yet. Nothing is communicated in steps without a request. Ctrl-C,
which the service does not know, is passed on to it as SIGTERM.
"""

import signal
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

SAVED, INTERRUPTED = 75, 130


class Interrupted(SystemExit):
  """The run was asked to stop; its state is saved. `code` is the exit code."""


class StopRequest:
  """Listens for requests to stop, in a `with` statement of the main thread.

  A second Ctrl-C ends the program at once, without another save.

  Raises:
    Interrupted: at the end of the statement, in a process that is alone, if
      the request came too late for `agreed`.
  """

  def __init__(self):
    self._several = jax.process_count() > 1
    self._asked: int | None = None
    self._calls = 0
    self._answered = False
    self._kept: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    # Python's handler of SIGTERM would take the place of the service's.
    mine = (
      (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
    )
    self._kept = {s: signal.signal(s, self._handle) for s in mine}
    return self

  def __exit__(self, kind: Any, *_) -> None:
    if self._several:
      # The service listens until the process ends, and nobody asks it any
      # more: SIGTERM does again what it did before.
      self._kept[signal.SIGTERM] = signal.getsignal(signal.SIGTERM)
    for number, handler in self._kept.items():
      signal.signal(number, handler)
    missed = self._asked is not None and not self._answered
    if missed and kind is None and not self._several:
      raise Interrupted(self._asked)

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    if self._asked is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._asked = INTERRUPTED if number == signal.SIGINT else SAVED
    if self._several:
      signal.raise_signal(signal.SIGTERM)

  def agreed(self, step: int) -> int | None:
    """Whether to save and stop; every process asks after each of its updates.

    Args:
      step: the update's number, to be told.

    Returns:
      None to go on, else the exit code; all processes are told so after the
      same update, and each the code that fits what it was sent.
    """
    self._calls += 1
    if self._several:
      # Not by `step`, which a run that goes back has more than once.
      stops = multihost_utils.reached_preemption_sync_point(self._calls)
    else:
      stops = self._asked is not None
    if not stops:
      return None
    self._answered = True
    code = SAVED if self._asked is None else self._asked
    logging.info("Asked to stop; stopping after step %d, code %d.", step, code)
    return code
