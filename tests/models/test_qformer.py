"""models/qformer.py; `tests/parity/test_perceiver.py` has the original."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_params

from photochat_jax.models import qformer, vit

BASE = qformer.QFormerConfig(
    num_query_tokens=5,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=40,
    cross_attention_frequency=2,
    encoder_hidden_size=20,
)


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def init_shapes(config):
  return jax.eval_shape(
      qformer.QFormer(config).init,
      jax.random.key(0),
      jnp.zeros((1, 2, config.encoder_hidden_size)),
  )['params']


@pytest.fixture(scope='module')
def features():
  rng = np.random.default_rng(1)
  return rng.standard_normal((2, 7, 20)).astype(np.float32)


def test_rematerialisation_keeps_less_for_the_backward_pass():
  def kept(config):
    module = qformer.QFormer(config)

    def backward(params):
      return jax.vjp(
          lambda x: module.apply({'params': params}, x), jnp.zeros((4, 7, 20))
      )[1]

    # What the backward pass holds besides the parameters.
    params = init_shapes(config)
    return count(jax.eval_shape(backward, params)) - count(params)

  assert kept(dataclasses.replace(BASE, remat="full")) < kept(BASE) / 2


def test_bfloat16_activations_stay_near_float32(features):
  params = random_params.draw(init_shapes(BASE))
  want = qformer.QFormer(BASE).apply({'params': params}, features)
  config = dataclasses.replace(BASE, dtype='bfloat16')
  got = qformer.QFormer(config).apply({'params': params}, features)
  assert got.dtype == jnp.bfloat16
  chex.assert_trees_all_close(got.astype(jnp.float32), want, atol=0.2)


def test_fresh_queries_differ_and_have_finite_gradients(features):
  module = qformer.QFormer(BASE)
  params = jax.jit(module.init)(jax.random.key(0), features)['params']

  @jax.jit
  def run(params):
    out, pull = jax.vjp(
        lambda p: module.apply({'params': p}, features), params
    )
    return out, pull(out**2)

  out, grads = run(params)
  chex.assert_tree_all_finite(grads)
  assert np.abs(out[:, 0] - out[:, 1]).max() > 0.1


def test_tiny_reads_the_tiny_vision_transformer():
  config = qformer.QFormerConfig.tiny(num_query_tokens=3)
  assert config.encoder_hidden_size == vit.ViTConfig.tiny().hidden_size
  shape = jax.eval_shape(
      qformer.QFormer(config).init_with_output,
      jax.random.key(0),
      jnp.zeros((2, 17, config.encoder_hidden_size)),
  )[0]
  chex.assert_shape(shape, (2, 3, config.hidden_size))


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='cross_attention_frequency=3'):
    dataclasses.replace(BASE, cross_attention_frequency=3)
  with pytest.raises(ValueError, match='num_attention_heads=5'):
    dataclasses.replace(BASE, num_attention_heads=5)
  with pytest.raises(ValueError, match='Set encoder_hidden_size=21'):
    jax.eval_shape(
        qformer.QFormer(BASE).init, jax.random.key(0), jnp.zeros((1, 7, 21))
    )
