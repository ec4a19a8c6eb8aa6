"""Figures by name, each with its chance, its size, and why it is absent."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class Figures:
  """What was measured.

  Attributes:
    metrics: name -> figure, None where it could not be measured.
    chance: the same names -> what guessing scores; None where that says
      nothing.
    sizes: the same names -> of how many tokens, turns or photos it is.
    reasons: name -> why the figure is None.
  """

  metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
  chance: dict[str, Any] = dataclasses.field(default_factory=dict)
  sizes: dict[str, int] = dataclasses.field(default_factory=dict)
  reasons: dict[str, str] = dataclasses.field(default_factory=dict)

  def add(
    self,
    name: str,
    value: Any,
    size: int,
    chance: Any = None,
    reason: str = "",
  ) -> None:
    """Adds one; `reason` counts where the value is None."""
    self.metrics[name], self.sizes[name] = value, size
    self.chance[name] = None if value is None else chance
    if value is None:
      self.reasons[name] = reason
