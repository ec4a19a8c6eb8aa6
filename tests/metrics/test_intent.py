"""Photo-turn precision, recall and F1 by hand, and against a simulation."""

import numpy as np
import pytest

from photochat_jax.metrics import intent


def test_hand_made_counts():
  pairs = (
    [(True, True)] * 3
    + [(False, True)] * 1
    + [(True, False)] * 2
    + [(False, False)] * 4
  )
  counts = intent.IntentCounts.of(pairs)
  assert counts == intent.IntentCounts(
    true_yes=3, false_yes=1, false_no=2, true_no=4
  )
  assert counts.total == 10
  assert counts.precision == pytest.approx(3 / 4)
  assert counts.recall == pytest.approx(3 / 5)
  assert counts.f1 == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6))
  assert counts.chance == pytest.approx(0.5)


@pytest.mark.parametrize(
  "pairs",
  [[], [(False, False)] * 3, [(True, False)] * 3, [(False, True)] * 3],
)
def test_without_a_hit_everything_is_zero(pairs):
  counts = intent.IntentCounts.of(pairs)
  assert (counts.precision, counts.recall, counts.f1) == (0, 0, 0)


def test_chance_is_what_a_coin_of_the_same_share_scores():
  rng = np.random.default_rng(0)
  gold = rng.random(200_000) < 0.3
  coin = rng.random(200_000) < 0.3
  counts = intent.IntentCounts.of(zip(gold, coin, strict=True))
  for got in (counts.precision, counts.recall, counts.f1):
    assert got == pytest.approx(counts.chance, abs=0.01)


def test_sweep_by_hand():
  # Two of the five are photos; one score is there twice.
  pairs = [(False, 0.9), (True, 0.8), (False, 0.3), (True, 0.3), (False, 0.1)]
  swept = intent.sweep(pairs)
  assert [threshold for threshold, _ in swept] == [0.9, 0.8, 0.3, 0.1]
  found = [(c.true_yes, c.false_yes, c.false_no, c.true_no) for _, c in swept]
  assert found == [(0, 1, 2, 2), (1, 1, 1, 2), (2, 2, 0, 1), (2, 3, 0, 0)]
  # The recall rises by a half at a precision of 1 / 2, twice.
  assert intent.average_precision(swept) == 0.5
  for threshold, counts in swept:
    decided = intent.IntentCounts.of((g, s >= threshold) for g, s in pairs)
    assert counts == decided


def test_average_precision_at_its_ends():
  perfect = intent.sweep([(True, 0.9), (True, 0.8), (False, 0.1)])
  assert intent.average_precision(perfect) == 1.0
  # All scores alike: the share of photo turns.
  alike = intent.sweep([(True, 0.5), (False, 0.5), (False, 0.5), (False, 0.5)])
  assert intent.average_precision(alike) == 0.25
  assert intent.average_precision(intent.sweep([(False, 0.5)])) is None
  assert intent.average_precision(intent.sweep([])) is None
