"""Policies of rematerialisation keep what their names say."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.ops import remat


class Layer(nn.Module):
  """x W, a batched product as attention's, and two elementwise functions."""

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(16, use_bias=False)(x))
    return jnp.exp(jnp.einsum("bij,bkj->bik", x, x))


def kept(policy):
  """Numbers that the backward pass is handed, less x and W."""
  x = jnp.ones((2, 4, 8))
  layer = remat.remat(Layer, policy)()
  params = layer.init(jax.random.key(0), x)
  _, back = jax.vjp(layer.apply, params, x)
  sizes = sum(leaf.size for leaf in jax.tree.leaves(back))
  return sizes - x.size - 8 * 16


def test_each_policy_keeps_less_than_the_one_above_it():
  found = [kept(policy) for policy in remat.POLICIES]
  assert list(remat.POLICIES) == ["none", "dots", "dots_no_batch", "full"]
  # x W is 2 x 4 x 16 numbers, the batched product 2 x 4 x 4.
  assert found[1:] == [128 + 32, 128, 0]
  assert found[0] > found[1]


def test_gradients_are_the_same():
  x = jax.random.normal(jax.random.key(1), (2, 4, 8))
  params = Layer().init(jax.random.key(0), x)

  def gradient(policy):
    layer = remat.remat(Layer, policy)()
    return jax.grad(lambda p: layer.apply(p, x).sum())(params)

  wanted = gradient("none")
  for policy in remat.POLICIES:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
      gradient(policy),
      wanted,
    )


def test_without_it_the_class_is_the_same():
  assert remat.remat(Layer, "none") is Layer


def test_an_unknown_policy_is_a_sentence():
  with pytest.raises(ValueError, match="must be one of none, dots"):
    remat.remat(Layer, "everything")
