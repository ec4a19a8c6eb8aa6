"""The noise, the safe softmax, the sparse product and the custom VJP."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.ops import gumbel


def _keys(*seeds):
  return jnp.stack([jax.random.key(seed) for seed in seeds])


def test_noise_belongs_to_the_key_and_not_to_the_batch():
  together = gumbel.gumbel_noise(_keys(3, 5, 8), 4, 6)
  alone = gumbel.gumbel_noise(_keys(5), 4, 6)
  chex.assert_shape(together, (3, 4, 6))
  np.testing.assert_array_equal(together[1], alone[0])
  assert not np.array_equal(together[0], together[1])


def test_noise_is_standard_gumbel():
  noise = np.asarray(gumbel.gumbel_noise(_keys(0), 200, 500))
  # Mean: Euler's constant; variance: pi^2 / 6. 100,000 draws.
  assert abs(noise.mean() - 0.57722) < 0.02
  assert abs(noise.var() - np.pi**2 / 6) < 0.05


@pytest.mark.parametrize('tau', [0.05, 1.0, 7.0])
def test_soft_tokens_equal_float64(tau):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 4, (2, 3, 10)).astype(np.float32)
  logits[..., 7:] = -np.inf
  keys = _keys(1, 2)
  noise = np.stack([jax.random.gumbel(key, (3, 10)) for key in keys])
  scores = (logits.astype(np.float64) + noise) / tau
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  expected = weights / weights.sum(-1, keepdims=True)
  actual = gumbel.soft_tokens(logits, np.ones((2, 3), bool), keys, tau)
  np.testing.assert_allclose(actual, expected, atol=2e-5)
  np.testing.assert_array_equal(actual[..., 7:], 0)


def test_soft_tokens_of_masked_and_of_impossible_rows_are_zero():
  logits = np.full((1, 3, 4), -np.inf, np.float32)
  logits[0, 0] = np.nan
  logits[0, 2] = [0, 0, -np.inf, -np.inf]
  mask = np.array([[False, True, True]])
  soft = gumbel.soft_tokens(logits, mask, None, 1.0)
  np.testing.assert_array_equal(soft[0, :2], 0)
  np.testing.assert_allclose(soft[0, 2], [0.5, 0.5, 0, 0])


def test_pool_rows_is_the_dense_product():
  dense = np.zeros((6, 5))
  dense[1, 4], dense[1, 0], dense[3, 2], dense[4, 4] = 0.25, 0.75, 1.0, 0.5
  rows, cols = np.nonzero(dense)
  table = {
    'rows': rows.astype(np.int32),
    'cols': cols.astype(np.int32),
    'weights': dense[rows, cols].astype(np.float32),
  }
  embedding = np.random.default_rng(1).normal(size=(5, 3))
  actual = gumbel.pool_rows(table, embedding.astype(np.float32), 6)
  np.testing.assert_allclose(actual, dense @ embedding, rtol=1e-6)
  empty = {name: value[:0] for name, value in table.items()}
  np.testing.assert_array_equal(
    gumbel.pool_rows(empty, embedding.astype(np.float32), 6), np.zeros((6, 3))
  )


def test_backward_is_the_softmax_pullback_worked_out_by_hand():
  # Two tokens, p = (3/4, 1/4), pull (2, 6), tau 2: the mean is 3, so
  # dl = p * (pull - 3) / 2 = (-3/8, 3/8).
  tau = 2.0
  logits = jnp.array([[[tau * np.log(3.0), 0.0, -np.inf]]])
  embedding = jnp.array([[10.0], [20.0]])
  crossing = gumbel.Crossing(
    lambda e, facts, vocab: e[facts['ids']],
    lambda e, facts, ct, vocab: ct * jnp.array([2.0, 6.0, 5.0]),
  )
  facts = {'ids': jnp.array([[1]])}
  mask = jnp.array([[True]])
  out, pull = jax.vjp(
    lambda logits, table, t: gumbel.cross(
      crossing, 'straight_through', logits, table, facts['ids'], mask, facts,
      None, t,
    ),
    logits, embedding, tau,
  )
  np.testing.assert_array_equal(out, [[[20.0]]])
  logits_bar, embedding_bar, tau_bar = pull(jnp.ones((1, 1, 1)))
  np.testing.assert_allclose(
    logits_bar, [[[-0.375, 0.375, 0.0]]], rtol=1e-6
  )
  np.testing.assert_array_equal(embedding_bar, [[0.0], [1.0]])
  assert tau_bar == 0


def test_reinmax_is_exact_on_average_for_quadratic_functions():
  """Heun's method is; the straight-through gradient is not."""
  rng = np.random.default_rng(0)
  vocab = 5
  logits = rng.normal(size=vocab)
  curve, slope = rng.normal(size=(vocab, vocab)), rng.normal(size=vocab)
  curve = curve + curve.T
  values = np.diag(curve) / 2 + slope  # f(e_v) = e_v Q e_v / 2 + b e_v
  p = np.exp(logits) / np.exp(logits).sum()
  exact = p * (values - p @ values)

  def average(estimator):
    found = np.zeros(vocab)
    for token in range(vocab):
      bar = curve[token] + slope  # f's gradient at the token.
      crossing = gumbel.Crossing(
        lambda e, facts, vocab: e[facts],
        lambda e, facts, ct, vocab, bar=bar: ct * bar,
      )
      tokens = jnp.array([[token]])
      _, pull = jax.vjp(
        lambda logits, crossing=crossing, tokens=tokens: gumbel.cross(
          crossing, estimator, logits, jnp.zeros((vocab, 1)), tokens,
          jnp.array([[True]]), tokens, None, 1.0,
        ),
        jnp.asarray(logits[None, None], jnp.float32),
      )
      found += p[token] * np.ravel(pull(jnp.ones((1, 1, 1)))[0])
    return found

  np.testing.assert_allclose(average('reinmax'), exact, atol=1e-5)
  assert np.abs(average('straight_through') - exact).max() > 0.05
