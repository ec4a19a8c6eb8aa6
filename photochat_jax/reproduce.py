"""Whether a result comes out again: what is compared, and how."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# What a result says of its making; the rest are figures.
MAKING = ("config", "seed", "split", "step", "git_commit", "weights", "data",
          "captions_read", "devices", "versions")  # fmt: skip
_NOT_COMPARED = ("seconds", "reasons", *MAKING)


class Difference(NamedTuple):
  """A figure, or a circumstance, that is another one now.

  Attributes:
    name: dotted.
    then: what the result says.
    now: what came out.
  """

  name: str
  then: Any
  now: Any


def figures(
  then: Mapping[str, Any], now: Mapping[str, Any], tolerance: float
) -> list[Difference]:
  """Figures that differ by more than a relative tolerance."""
  one, two = (
    dict(_flat({k: v for k, v in r.items() if k not in _NOT_COMPARED}))
    for r in (then, now)
  )
  return [
    Difference(name, one.get(name), two.get(name))
    for name in dict.fromkeys((*one, *two))
    if not _same(one.get(name), two.get(name), tolerance)
  ]


def making(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
  """Circumstances that are others: code, weights, data, versions, devices."""
  one, two = (
    dict(_flat({k: r.get(k) for k in MAKING})) for r in (then, now)
  )
  return [
    Difference(name, one.get(name), two.get(name))
    for name in dict.fromkeys((*one, *two))
    if one.get(name) != two.get(name)
  ]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(value, Mapping):
    items = value.items()
  elif isinstance(value, list | tuple):
    items = enumerate(value)
  else:
    yield name, value
    return
  for key, part in items:
    yield from _flat(part, f"{name}.{key}" if name else str(key))


def _same(one: Any, two: Any, tolerance: float) -> bool:
  numbers = all(
    isinstance(x, int | float) and not isinstance(x, bool) for x in (one, two)
  )
  if numbers:
    return math.isclose(one, two, rel_tol=tolerance, abs_tol=tolerance)
  return one == two
