"""Means and how sure they are."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats


class Estimate(NamedTuple):
  """A mean over seeds.

  Attributes:
    mean: of the values.
    half: half of the 95 % interval (Student's t); NaN of one value.
    count: of values.
  """

  mean: float
  half: float
  count: int

  def __str__(self) -> str:
    if not self.count:
      return "–"
    spread = "" if math.isnan(self.half) else f" ± {self.half:.3f}"
    return f"{self.mean:.3f}{spread}"


def estimate(values: Sequence[float]) -> Estimate:
  """The mean of some seeds and its 95 % interval."""
  count = len(values)
  if not count:
    return Estimate(math.nan, math.nan, 0)
  if count == 1:
    return Estimate(float(values[0]), math.nan, 1)
  error = np.std(values, ddof=1) / math.sqrt(count)
  half = scipy.stats.t.ppf(0.975, count - 1) * error
  return Estimate(float(np.mean(values)), float(half), count)
