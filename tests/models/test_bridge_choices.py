"""What the bridge draws, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import bridge


def test_draws():
  keys = jax.random.split(jax.random.key(11), 2)
  logits = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
  logits[..., 6:] = -np.inf
  greedy = bridge.draw_tokens(bridge.BridgeConfig(draw='argmax'), logits)
  np.testing.assert_array_equal(greedy, logits.argmax(-1))
  assert greedy.dtype == jnp.int32
  sample = bridge.draw_tokens(
    bridge.BridgeConfig(draw='gumbel'), logits, keys
  )
  noise = bridge.gumbel_noise(keys, 5, 8)
  np.testing.assert_array_equal(sample, np.argmax(logits + noise, -1))


def test_gumbel_draws_follow_the_softmax():
  keys = jax.random.split(jax.random.key(0), 4000)
  logits = jnp.log(jnp.array([0.5, 0.3, 0.2, 0.0]))
  tokens = bridge.draw_tokens(
    bridge.BridgeConfig(draw='gumbel'),
    jnp.broadcast_to(logits, (4000, 1, 4)), keys,
  )
  shares = np.bincount(np.ravel(tokens), minlength=4) / 4000
  # Four standard deviations of a share of 4,000 draws.
  np.testing.assert_allclose(shares, [0.5, 0.3, 0.2, 0.0], atol=0.032)
  assert shares[3] == 0


@pytest.mark.parametrize('field, value, words', [
  ('draw', 'sample', 'gold, argmax, gumbel'),
  ('matrix', 'dense', 'none, static, all_pairs, aligned'),
  ('estimator', 'reinforce', 'straight_through, reinmax, rloo'),
  ('rloo_samples', 1, 'at least 2'),
  ('retokenise', 'never', 'callback, two_pass'),
  ('tau', 0.0, 'positive'),
  ('tau', float('nan'), 'positive'),
  ('max_tokens', 0, 'at least 1'),
])
def test_unknown_choices_are_refused(field, value, words):
  with pytest.raises(ValueError, match=f'bridge.{field} is .*{words}'):
    bridge.BridgeConfig(**{field: value})


def test_rloo_needs_samples():
  with pytest.raises(ValueError, match="set bridge.draw to 'gumbel'"):
    bridge.BridgeConfig(estimator='rloo')
  choices = dict(estimator='rloo', draw='gumbel', rloo_samples=3)
  assert bridge.BridgeConfig(**choices).num_samples == 3
  assert bridge.BridgeConfig().num_samples == 1


def test_missing_inputs_are_refused():
  logits = jnp.zeros((1, 2, 3))
  with pytest.raises(ValueError, match='draws nothing'):
    bridge.draw_tokens(bridge.BridgeConfig(), logits)
  with pytest.raises(ValueError, match='one key for every photo'):
    bridge.draw_tokens(bridge.BridgeConfig(draw='gumbel'), logits)
