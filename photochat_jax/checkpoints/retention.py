"""Which checkpoints stay, and what becomes of damaged ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils


class Best:
  """Retention of the checkpoints with the lowest values.

  Orbax's `BestN` would keep those without a value, too.
  """

  def __init__(self, count: int, values: Mapping[int, float]):
    self._count = count
    self._values = values

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    del context  # Orbax's, and empty.
    known = [c.step for c in checkpoints if c.step in self._values]
    kept = sorted(known, key=self._values.get)[: self._count]
    return [c.step in kept for c in checkpoints]


def put_aside(directory: epath.Path, steps: Sequence[int]) -> list[str]:
  """Renames the folders of damaged checkpoints.

  All processes must call it.

  Args:
    directory: of the checkpoints.
    steps: the damaged ones.

  Returns:
    Their new names: `<step>.damaged`, numbered if that is there.
  """
  names = []
  for step in steps:
    name, number = f"{step}.damaged", 1
    while (directory / name).exists():
      number += 1
      name = f"{step}.damaged.{number}"
    names.append(name)
  # All have looked before the first renames, and it is done when they go on.
  _meet("looked")
  if jax.process_index() == 0:
    for step, name in zip(steps, names, strict=True):
      (directory / str(step)).rename(directory / name)
  _meet("renamed")
  return names


def _meet(what: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"damaged checkpoints {what}")
