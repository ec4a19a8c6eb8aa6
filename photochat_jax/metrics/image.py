"""Does a drawn photo, or an answer about a photo, hold what it should?

The measuring function is handed in: it looks at pixels only and says which
value each attribute has. Nothing here knows how a scene is drawn.
"""

import re
import typing
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Measure = Callable[[np.ndarray], Mapping[str, str]]
"""uint8[H, W, 3] -> the value of each attribute it can see."""

KINDS = ("captioned", "told")


class Drawn(typing.NamedTuple):
  """A photo that should have been shared, and what was.

  Attributes:
    gold: the value of each attribute in the data's photo.
    seen: the value of each attribute measured in the drawn photo; None if no
      photo was shared, which makes every attribute wrong.
  """

  gold: Mapping[str, str]
  seen: Mapping[str, str] | None

  def right(self, attribute: str) -> bool:
    if self.seen is None:
      return False
    return self.seen.get(attribute) == self.gold[attribute]


def attribute_accuracy(
  photos: Sequence[Drawn], kinds: Mapping[str, str]
) -> dict[str, float | None]:
  """Shares of photos with the right value, per attribute and per kind.

  Args:
    photos: one entry per photo of the data. A photo whose `gold` does not
      have an attribute does not count for it.
    kinds: the kind of each attribute, as 'captioned', 'told' or 'unsaid'.

  Returns:
    One entry per attribute; 'captioned' and 'told', the means over the
    attributes of that kind; and 'mean', which is 'captioned': what a photo
    must show because its caption says it. None where nothing was counted.
  """
  each = {}
  for name in kinds:
    hits = [photo.right(name) for photo in photos if name in photo.gold]
    each[name] = sum(hits) / len(hits) if hits else None
  return _with_means(each, kinds)


def attribute_chance(
  values: Mapping[str, Sequence[str]], kinds: Mapping[str, str]
) -> dict[str, float | None]:
  """What guessing evenly among each attribute's values scores.

  Args:
    values: the possible values of each attribute.
    kinds: as in `attribute_accuracy`, whose keys are returned.
  """
  return _with_means({name: 1 / len(values[name]) for name in kinds}, kinds)


def _with_means(each, kinds):
  means = {}
  for kind in KINDS:
    shares = [
      share
      for name, share in each.items()
      if kinds[name] == kind and share is not None
    ]
    means[kind] = sum(shares) / len(shares) if shares else None
  return {"mean": means["captioned"], **means, **each}


def mentions(text: str, values: Sequence[str]) -> set[str]:
  """The values that stand in a text as whole words, in any case.

  A value inside a longer one that also stands there ('blue' in 'light blue')
  does not count by itself.
  """
  found = {}
  for value in sorted(values, key=len, reverse=True):
    pattern = r"(?<!\w)" + re.escape(value) + r"(?!\w)"
    for match in re.finditer(pattern, text, re.IGNORECASE):
      if not any(
        start <= match.start() and match.end() <= end for start, end in found
      ):
        found[match.span()] = value
  return set(found.values())


def answers(text: str, answer: str, values: Sequence[str]) -> bool:
  """Whether a reply names the right value and no other one.

  Args:
    text: the reply.
    answer: the right value.
    values: all values of the attribute asked for.
  """
  return mentions(text, {*values, answer}) == {answer}
