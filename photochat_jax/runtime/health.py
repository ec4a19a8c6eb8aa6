"""What follows when the device skips updates: told, and in the end undone.

The device skips an update that would spoil the run (`optim.guard`). Here the
host learns of it, a few steps late so that the device need not be waited for,
and writes down what was skipped. After `max_skipped` in a row something before
them has gone wrong: the run goes back to a checkpoint at least `lookback`
updates earlier and leaves out the batches of those updates too, as PaLM's
(Chowdhery et al. 2022, section 5.1). Every process decides alike, because the
numbers are the same on all.
"""

import collections
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

# Updates between a step and the look at how it went.
LATE = 2


class UnhealthyError(ValueError):
  """The run cannot go on; the message is one sentence."""


class GoBack(Exception):
  """The run is to go back.

  Attributes:
    first: step of the first update that was skipped.
    last: step of the last one.
  """

  def __init__(self, first: int, last: int):
    super().__init__(first, last)
    self.first, self.last = first, last


class Health:
  """Watches a run's updates.

  Attributes:
    left_out: steps whose batches are taken and not learnt from.
    rollbacks: times that the run has gone back.
  """

  def __init__(self, settings: Any, workdir: epath.PathLike):
    """Starts with nothing left out.

    Args:
      settings: `config.HealthConfig`.
      workdir: the run's folder, where `skipped.jsonl` goes.
    """
    self._settings = settings
    self._path = epath.Path(workdir) / "skipped.jsonl"
    self._pending: collections.deque = collections.deque()
    self.left_out: set[int] = set()
    self.rollbacks = 0

  def state(self) -> dict[str, Any]:
    """What a checkpoint keeps, as JSON types."""
    return {"left_out": sorted(self.left_out), "rollbacks": self.rollbacks}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Takes over what `state` gave."""
    self.left_out = set(state["left_out"])
    self.rollbacks = state["rollbacks"]

  def watch(
    self,
    step: int,
    metrics: Mapping[str, jax.Array],
    names: Callable[[], Sequence[str]],
  ) -> None:
    """Notes an update, and looks at those that are `LATE` updates old.

    Args:
      step: number of the update, counted from 1.
      metrics: of the update: `skipped`, `loss`, `grad_norm`.
      names: tells what its batch was made of.

    Raises:
      GoBack: so many were skipped in a row.
    """
    kept = {name: metrics[name] for name in ("skipped", "loss", "grad_norm")}
    self._pending.append((step, kept, names))
    while len(self._pending) > LATE:
      self._look()

  def finish(self) -> None:
    """Looks at all that is left; raises as `watch` does."""
    while self._pending:
      self._look()

  def _look(self) -> None:
    step, metrics, names = self._pending.popleft()
    skipped = int(metrics["skipped"])
    if not skipped:
      return
    if jax.process_index() == 0:
      self._write(
        {
          "step": step,
          "loss": str(float(metrics["loss"])),
          "grad_norm": str(float(metrics["grad_norm"])),
          "examples": list(names()),
        }
      )
    if skipped >= self._settings.max_skipped:
      self._pending.clear()
      raise GoBack(step - skipped + 1, step)

  def go_back(
    self, bad: GoBack, saved: Sequence[int], start: int
  ) -> int | None:
    """Decides where to go on from, and what to leave out from there.

    Args:
      bad: what `watch` raised.
      saved: steps of the checkpoints there are.
      start: the step at which the stage began.

    Returns:
      The checkpoint's step; None for the run's beginning, where the stage is
      the first one.

    Raises:
      UnhealthyError: it has gone back too often, or there is no checkpoint.
    """
    if self.rollbacks >= self._settings.max_rollbacks:
      raise UnhealthyError(
        f"Updates {bad.first} to {bad.last} were skipped although the run went "
        f"back {self.rollbacks} times; see {self._path.name} for what was in "
        "them, lower the learning rate, or raise health.spike_factor if "
        "their gradients were only large."
      )
    left_out = range(bad.first - self._settings.lookback, bad.last + 1)
    usable = [step for step in saved if start <= step < bad.first]
    old = [step for step in usable if step < left_out.start]
    if not usable and start:
      raise UnhealthyError(
        f"Updates {bad.first} to {bad.last} were skipped and no checkpoint of "
        "the stage is older; lower the learning rate, or raise "
        "checkpoint.keep."
      )
    target = max(old) if old else min(usable, default=None)
    self.rollbacks += 1
    self.left_out |= {step for step in left_out if step > (target or start)}
    if jax.process_index() == 0:
      self._write(
        {"went_back_to": target or 0, "from": bad.last, "times": self.rollbacks}
      )
    return target

  def _write(self, row: Mapping[str, Any]) -> None:
    with self._path.open("a") as file:
      file.write(json.dumps(row) + "\n")
