"""FID and Inception Score against closed forms."""

import numpy as np
import pytest

from photochat_jax.metrics import inception


def test_frechet_of_a_shift_and_a_stretch_by_hand():
  # The points' own variances are 2 / 3 and 8 / 3 along x (sums of squares 2
  # and 8 over N - 1 = 3) and 0 along y; means differ by (3, 4).
  points = np.array([[1.0, 0], [-1, 0], [0, 0], [0, 0]])
  other = 2 * points + [3, 4]
  wanted = 25 + (np.sqrt(8 / 3) - np.sqrt(2 / 3)) ** 2
  assert inception.frechet(points, other) == pytest.approx(wanted)
  assert inception.frechet(points, points) == pytest.approx(0, abs=1e-12)


def test_frechet_of_any_gaussians_by_the_products_eigenvalues():
  rng = np.random.default_rng(0)
  one = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
  # Fewer photos than features: a covariance without full rank.
  two = rng.normal(size=(4, 6)) @ rng.normal(size=(6, 6)) + 1
  c1, c2 = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
  root = np.sqrt(np.abs(np.linalg.eigvals(c1 @ c2).real)).sum()
  wanted = np.sum((one.mean(0) - two.mean(0)) ** 2)
  wanted += np.trace(c1) + np.trace(c2) - 2 * root
  # Roots of eigenvalues that are 0 but for rounding.
  assert inception.frechet(one, two) == pytest.approx(wanted, abs=1e-5)
  assert inception.frechet(two, one) == pytest.approx(wanted, abs=1e-5)


def test_inception_score_by_hand():
  # Two photos of each of four classes, quite sure: four classes' worth.
  sure = 100.0 * np.eye(4).repeat(2, axis=0)
  assert inception.inception_score(sure, 1) == pytest.approx((4.0, 0.0))
  # No photo says anything.
  assert inception.inception_score(np.zeros((8, 4)), 1)[0] == 1.0
  # In parts of one class each there is no variety.
  assert inception.inception_score(sure, 4) == pytest.approx((1.0, 0.0))
  # p = (3/4, 1/4) and (1/4, 3/4): the mean is even, KL = ln 2 - H(1/4).
  mixed = np.log([[3.0, 1.0], [1.0, 3.0]])
  entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
  mean, spread = inception.inception_score(mixed, 1)
  assert mean == pytest.approx(np.exp(np.log(2) - entropy)) and spread == 0


def test_too_few_photos_are_refused():
  with pytest.raises(ValueError, match="at least two"):
    inception.frechet(np.ones((1, 3)), np.ones((9, 3)))
  with pytest.raises(ValueError, match="10 parts needs as many photos, not 9"):
    inception.inception_score(np.ones((9, 3)))
