"""Stopping on request: all processes save the same step and exit.

| exit code         | means                                                   |
|-------------------|---------------------------------------------------------|
| `SAVED`, 75       | SIGTERM, or notice that the machine will be taken away; |
|                   | the state is saved and the same command goes on         |
| `INTERRUPTED`, 130 | Ctrl-C; saved as well                                  |

75 is EX_TEMPFAIL of sysexits.h: try again. A process that is alone handles the
signals itself. Several have JAX's preemption service: whichever of them gets
SIGTERM, as a cloud sends it before it takes a machine back, the service picks
one step for all. Ctrl-C then counts as SIGTERM.
"""

import os
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils

SAVED, INTERRUPTED = 75, 130


class Interrupted(SystemExit):
  """The run was asked to stop; its state is saved. `code` is the exit code."""


class StopRequest:
  """Listens for requests to stop, in a `with` statement.

  A second Ctrl-C ends the program at once, with nothing saved.
  """

  def __init__(self):
    self._asked: int | None = None
    self._kept: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    signals = [signal.SIGINT]
    if jax.process_count() == 1:  # JAX's service listens otherwise.
      signals.append(signal.SIGTERM)
    self._kept = {s: signal.signal(s, self._handle) for s in signals}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._kept.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    if self._asked is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._asked = INTERRUPTED if number == signal.SIGINT else SAVED
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)

  def agreed(self, step: int) -> int | None:
    """Whether to save this step and stop; to be asked after every step.

    Args:
      step: updates made; the same on all processes when they ask.

    Returns:
      The exit code, on all processes after the same step; None to go on.
    """
    if jax.process_count() == 1:
      return self._asked
    stops = multihost_utils.reached_preemption_sync_point(step)
    return SAVED if stops else None
