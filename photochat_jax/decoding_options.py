"""How a text is decoded: its own module, so that the config can check it."""

import dataclasses
from typing import Any

METHODS = ("greedy", "beam", "nucleus")


@dataclasses.dataclass(frozen=True)
class Options:
  """How a text is decoded; the defaults are those of LAVIS's BLIP-2.

  Attributes:
    method: 'greedy', 'beam' (the best whole text of several) or 'nucleus'
      (sampled from the likeliest tokens).
    num_beams: texts followed at a time, of 'beam'; 1 is greedy.
    length_penalty: of 'beam', power of the length that divides a text's
      log-probability; 0 or above.
    top_p: of 'nucleus', probability of the tokens that may be sampled.
    temperature: of 'nucleus', above 0; logits are divided by it.
    seed: of 'nucleus'.
    max_tokens: longest text; None takes the model's own.

  Raises:
    ValueError: a value is out of range; the message is one sentence.
  """

  method: str = "beam"
  num_beams: int = 5
  length_penalty: float = 1.0
  top_p: float = 0.9
  temperature: float = 1.0
  seed: int = 0
  max_tokens: int | None = None

  def __post_init__(self):
    longest = self.max_tokens
    for name, is_right, what in (
      ("method", self.method in METHODS, f"one of {', '.join(METHODS)}"),
      ("num_beams", self.num_beams >= 1, "1 or more"),
      ("length_penalty", self.length_penalty >= 0, "0 or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("temperature", self.temperature > 0, "above 0"),
      ("seed", 0 <= self.seed < 2**32, "in 0 ... 2**32 - 1"),
      ("max_tokens", longest is None or longest >= 1, "1 or more"),
    ):
      if not is_right:
        value = getattr(self, name)
        raise ValueError(f"{name} is {value!r}; it must be {what}.")

  @classmethod
  def of(cls, settings: Any, seed: int) -> "Options":
    """The options of a config's `eval`."""
    names = ("method", "num_beams", "length_penalty", "top_p", "temperature")
    return cls(**{n: getattr(settings, n) for n in names}, seed=seed)

  @property
  def beams(self) -> int:
    """Texts followed at a time; 1 where there is no beam search."""
    return self.num_beams if self.method == "beam" else 1

  def __str__(self):
    if self.beams > 1:
      return f"beam {self.num_beams} penalty {self.length_penalty:g}"
    if self.method == "nucleus":
      heat = f" t{self.temperature:g}" if self.temperature != 1 else ""
      return f"nucleus {self.top_p:g}{heat} seed {self.seed}"
    return "greedy"


GREEDY = Options("greedy")
