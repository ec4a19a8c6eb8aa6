"""Scores of embeddings, worked out by hand."""

import numpy as np
import pytest

from photochat_jax.metrics import similarity

EAST, NORTH, WEST = (
  np.array([[1.0, 0]]),
  np.array([[0, 1.0]]),
  np.array([[-1.0, 0]]),
)
NEAR = np.array([[0.8, 0.6]])  # cosine 0.8 with EAST, 0.6 with NORTH


def test_clip_score_takes_what_points_away_for_nothing():
  photos, texts = np.concatenate([EAST, EAST]), np.concatenate([NEAR, WEST])
  assert similarity.clip_score(photos, texts) == pytest.approx(40)
  # Similarity of photos does not.
  assert similarity.photo_similarity(photos, texts) == pytest.approx(-10)


def test_relevance_by_hand():
  both = np.concatenate([EAST, NORTH])
  assert similarity.relevance(both, both) == pytest.approx(100)
  # The second is missing: s = 0.8, p = 0.8, r = 0.4.
  p, r = 0.8, 0.4
  wanted = 100 * 2 * p * r / (p + r)
  assert similarity.relevance(NEAR, both) == pytest.approx(wanted)
  assert similarity.relevance(both, NEAR) == pytest.approx(wanted)
  # The order counts.
  assert similarity.relevance(both[::-1], both) == 0
  assert similarity.relevance(np.zeros((0, 2)), both) == 0
  assert similarity.relevance(WEST, EAST) == 0
  pairs = [(both, both), (WEST, EAST)]
  assert similarity.mean_relevance(pairs) == pytest.approx(50)
