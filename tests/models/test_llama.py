"""models/llama.py; `tests/parity/test_language.py` has the original."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_params

from photochat_jax.models import llama

BASE = llama.LlamaConfig(
    vocab_size=150,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=100.0,
    max_position_embeddings=64,
)


def init_shapes(config):
  return jax.eval_shape(
      llama.Llama(config).init,
      jax.random.key(0),
      jnp.zeros((1, 2, config.hidden_size)),
      jnp.zeros((1, 2), jnp.int32),
      jnp.ones((1, 2), jnp.int32),
  )['params']


@functools.cache
def build(config):
  """(module, random params)."""
  return llama.Llama(config), random_params.draw(init_shapes(config))


@functools.cache
def compiled(module):
  """(embeddings -> hidden, cache), jitted once per module."""
  return jax.jit(lambda params, *args: module.apply({'params': params}, *args))


def embed(module, params, tokens):
  return module.apply({'params': params}, tokens, method='embed')


def scores(module, params, hidden):
  return module.apply({'params': params}, hidden, method='logits')


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def draw_tokens(config, shape, seed=0):
  return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


def plain(tokens):
  """(positions, segments) of rows with one sequence each."""
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return positions, np.ones_like(tokens)


def test_padded_vocabulary_is_minus_infinity():
  module, params = build(BASE)
  hidden = np.ones((3, BASE.hidden_size), np.float32)
  got = scores(module, params, hidden)
  chex.assert_shape(got, (3, 256))
  assert np.isfinite(got[:, :150]).all()
  assert np.all(got[:, 150:] == -np.inf)
  grads = jax.grad(
      lambda p: jax.nn.logsumexp(scores(module, p, hidden)).sum()
  )(params)
  chex.assert_tree_all_finite(grads)


def test_nothing_leaks_between_packed_sequences():
  module, params = build(BASE)
  tokens = draw_tokens(BASE, (1, 11))
  segments = np.array([[1] * 4 + [2] * 5 + [0] * 2])
  positions = np.array([[*range(4), *range(5), 0, 0]])
  embeds = embed(module, params, tokens)

  @jax.jit
  @jax.grad
  def gradient(embeds, inside):
    hidden, _ = module.apply({'params': params}, embeds, positions, segments)
    return jnp.sum(inside[:, None] * hidden**3)

  for start, end in ((0, 4), (4, 9)):
    inside = np.zeros(11, bool)
    inside[start:end] = True
    grads = gradient(embeds, inside)
    assert np.abs(grads[:, inside]).min() > 0
    assert not np.any(grads[:, ~inside])


def test_cache_of_a_lower_precision_is_kept_and_close():
  module, params = build(BASE)
  tokens = draw_tokens(BASE, (1, 6))
  embeds = embed(module, params, tokens)
  want, _ = compiled(module)(params, embeds, *plain(tokens))
  cache = llama.init_cache(BASE, 1, 6, dtype='bfloat16')
  got, cache = compiled(module)(params, embeds, *plain(tokens), cache)
  assert cache['key'].dtype == jnp.bfloat16
  assert got.dtype == jnp.float32
  chex.assert_trees_all_close(got, want, atol=0.1)
  assert np.abs(got - want).max() > 0


def test_a_cache_which_is_too_short_is_refused():
  module, params = build(BASE)
  tokens = draw_tokens(BASE, (1, 6))
  cache = llama.init_cache(BASE, batch=1, length=5)
  with pytest.raises(ValueError, match='5 slots for 6 vectors'):
    compiled(module)(
        params, embed(module, params, tokens), *plain(tokens), cache
    )


def test_rematerialisation_keeps_less_for_the_backward_pass():
  _, params = build(BASE)
  tokens = draw_tokens(BASE, (1, 16))

  def kept(config):
    module = llama.Llama(config)

    def backward(params):
      return jax.vjp(
          lambda embeds: module.apply(
              {'params': params}, embeds, *plain(tokens)
          )[0],
          embed(module, params, tokens),
      )[1]

    # What the backward pass holds besides the parameters.
    return count(jax.eval_shape(backward, params)) - count(params)

  assert kept(dataclasses.replace(BASE, remat="full")) < kept(BASE) / 3


def test_bfloat16_activations_stay_near_float32():
  module, params = build(BASE)
  tokens = draw_tokens(BASE, (2, 7))
  want, _ = compiled(module)(
      params, embed(module, params, tokens), *plain(tokens)
  )
  module = llama.Llama(dataclasses.replace(BASE, dtype='bfloat16'))
  got, _ = compiled(module)(
      params, embed(module, params, tokens), *plain(tokens)
  )
  assert got.dtype == jnp.bfloat16
  assert scores(module, params, got).dtype == jnp.float32
  chex.assert_trees_all_close(got.astype(jnp.float32), want, atol=0.2)


def test_tiny_reads_overrides_and_starts_with_finite_scores():
  config = llama.LlamaConfig.tiny(vocab_size=130, num_hidden_layers=2)
  module = llama.Llama(config)
  tokens = draw_tokens(config, (1, 4))
  embeds = jnp.ones((1, 4, config.hidden_size))
  params = jax.jit(module.init)(jax.random.key(0), embeds, *plain(tokens))
  params = params['params']
  kernel = params['layers']['mlp']['up_proj']['kernel']
  chex.assert_shape(kernel, (2, 128, 384))
  assert not np.array_equal(kernel[0], kernel[1])
  hidden, _ = compiled(module)(
      params, embed(module, params, tokens), *plain(tokens)
  )
  assert np.isfinite(scores(module, params, hidden)[..., :130]).all()


def test_configs_are_hashable_and_check_themselves():
  scaled = llama.LlamaConfig.llama32_1b()
  assert hash(scaled) == hash(llama.LlamaConfig.llama32_1b())
  assert dict(scaled.rope_scaling)['factor'] == 32.0
  pairs = [list(pair) for pair in scaled.rope_scaling]  # as JSON has them
  assert dataclasses.replace(scaled, rope_scaling=pairs) == scaled
  with pytest.raises(ValueError, match='num_key_value_heads=3'):
    dataclasses.replace(BASE, num_key_value_heads=3)
  with pytest.raises(ValueError, match='Give head_dim'):
    dataclasses.replace(BASE, hidden_size=33)
