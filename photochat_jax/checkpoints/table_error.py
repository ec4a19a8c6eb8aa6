"""What is wrong with weights that do not fit a model, in one sentence."""

import collections
import re
from collections.abc import Iterable, Sequence

from photochat_jax.checkpoints.files import WeightsError

_TOLD, _LONGEST = 5, 100


class TableError(WeightsError):
  """Weights that do not fit a model.

  Attributes:
    missing: keys that the model needs and the weights lack.
    extra: keys of the weights that the model has no place for.
    misshapen: keys of another shape, with both shapes: (key, found, wanted).
  """

  def __init__(
    self,
    name: str,
    missing: Sequence[str] = (),
    extra: Sequence[str] = (),
    misshapen: Sequence[tuple[str, tuple, tuple]] = (),
    faults: Sequence[str] = (),
  ):
    self.missing = tuple(missing)
    self.extra = tuple(extra)
    self.misshapen = tuple(misshapen)
    parts = []
    if missing:
      parts.append(f"{len(missing)} missing: {grouped(missing)}")
    if extra:
      parts.append(f"{len(extra)} unknown: {grouped(extra)}")
    if misshapen:
      shapes = collections.defaultdict(list)
      for key, found, wanted in misshapen:
        shapes[f"are {list(found)} and must be {list(wanted)}"].append(key)
      told = [f"{grouped(keys, 2)} {what}" for what, keys in shapes.items()]
      told = _shortened(told, "; ", 3)
      parts.append(f"{len(misshapen)} of another shape: {told}")
    parts += faults
    super().__init__(
      f"The weights of {name} do not fit its config: {'; '.join(parts)}; take "
      "both whole from one checkpoint."
    )


  def details(self) -> str:
    """Every key that does not fit, where the sentence names the first only."""
    lines = [f"missing: {key}" for key in self.missing]
    lines += [f"unknown: {key}" for key in self.extra]
    lines += [
      f"{key} is {list(found)} and must be {list(wanted)}"
      for key, found, wanted in self.misshapen
    ]
    return "\n".join(lines)


def grouped(keys: Iterable[str], most: int = _TOLD) -> str:
  """Keys in a line, those that differ in numbers alone only once.

  Args:
    keys: names of tensors, as a file spells them.
    most: how many are named; of the others only how many there are.
  """
  groups = collections.defaultdict(list)
  for key in keys:
    key = key if key.isprintable() else repr(key)
    key = key if len(key) <= _LONGEST else f"{key[:_LONGEST]}..."
    groups[re.sub(r"\d+", "*", key)].append(key)
  told = [
    group[0] if len(group) == 1 else f"{shape} ({len(group)})"
    for shape, group in groups.items()
  ]
  return _shortened(told, ", ", most)


def _shortened(told: Sequence[str], comma: str, most: int) -> str:
  more = len(told) - most
  return comma.join(told[:most]) + (f" and {more} more" if more > 0 else "")
