"""Precision, recall and F1 of "does the model share a photo at this turn?".

One yes/no decision per merged turn of the model's side (PhotoChat's photo
intent task, Zang et al. 2021, with every turn counted, photo-less dialogues
included).
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class IntentCounts:
  """The four cells of the confusion table.

  Attributes:
    true_yes: a photo in the data, a photo by the model.
    false_yes: no photo in the data, a photo by the model.
    false_no: a photo in the data, none by the model.
    true_no: no photo in either.
  """

  true_yes: int = 0
  false_yes: int = 0
  false_no: int = 0
  true_no: int = 0

  @classmethod
  def of(cls, pairs: Iterable[tuple[bool, bool]]) -> "IntentCounts":
    """Counts (gold, predicted) pairs."""
    cells = {(True, True): 0, (False, True): 0,
             (True, False): 0, (False, False): 0}  # fmt: skip
    for gold, predicted in pairs:
      cells[bool(gold), bool(predicted)] += 1
    return cls(*cells.values())

  @property
  def total(self) -> int:
    return self.true_yes + self.false_yes + self.false_no + self.true_no

  @property
  def precision(self) -> float:
    """Right among the model's yes; 0 if it never said yes."""
    return _ratio(self.true_yes, self.true_yes + self.false_yes)

  @property
  def recall(self) -> float:
    """Found among the data's yes; 0 if the data hold none."""
    return _ratio(self.true_yes, self.true_yes + self.false_no)

  @property
  def f1(self) -> float:
    """The harmonic mean of precision and recall; 0 if both are 0."""
    return _ratio(
      2 * self.true_yes, 2 * self.true_yes + self.false_yes + self.false_no
    )

  @property
  def chance(self) -> float:
    """What a coin scores that says yes as often as the data do.

    With a share q of yes, it is right in q of its own yes and finds q of the
    data's: expected precision, recall and F1 are all q.
    """
    return _ratio(self.true_yes + self.false_no, self.total)


def sweep(
  pairs: Iterable[tuple[bool, float]],
) -> list[tuple[float, IntentCounts]]:
  """What each threshold on a score would decide.

  Args:
    pairs: (whether the data share a photo, the model's probability of it).

  Returns:
    (threshold, counts) for every score there is, the highest first; yes is a
    score that is not below the threshold.
  """
  ranked = sorted(pairs, key=lambda pair: -pair[1])
  total = sum(bool(gold) for gold, _ in ranked)
  found, yes, said = [], 0, 0
  for score, group in itertools.groupby(ranked, key=lambda pair: pair[1]):
    golds = [bool(gold) for gold, _ in group]
    yes, said = yes + sum(golds), said + len(golds)
    counts = IntentCounts(
      true_yes=yes,
      false_yes=said - yes,
      false_no=total - yes,
      true_no=len(ranked) - said - (total - yes),
    )
    found.append((score, counts))
  return found


def average_precision(
  swept: Sequence[tuple[float, IntentCounts]],
) -> float | None:
  """The precision at each threshold, weighted by the recall that it adds.

  Args:
    swept: from `sweep`.

  Returns:
    The share; None where the data share no photo. Scores that know nothing
    have the share of photo turns.
  """
  if not swept or not swept[-1][1].true_yes:
    return None
  recalls = [0.0, *(counts.recall for _, counts in swept)]
  gains = (after - before for before, after in itertools.pairwise(recalls))
  return sum(
    gain * counts.precision
    for gain, (_, counts) in zip(gains, swept, strict=True)
  )


def _ratio(part: int, whole: int) -> float:
  return part / whole if whole else 0.0
