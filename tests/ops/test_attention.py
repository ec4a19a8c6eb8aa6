"""ops/attention.py against dense float64 numpy."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.ops import attention as attention_lib


def dense_attention(q, k, v, mask, scale):
  """One query at a time; `mask` is [B, H, T, S]."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  batch, length, heads, _ = q.shape
  out = np.zeros_like(q)
  for b, h, t in itertools.product(range(batch), range(heads), range(length)):
    kv_head = h // (heads // k.shape[2])
    scores = scale * k[b, :, kv_head] @ q[b, t, h]
    weights = np.exp(scores - scores.max()) * mask[b, h, t]
    out[b, t, h] = weights @ v[b, :, kv_head] / weights.sum()
  return out


def draw(seed, *shapes):
  rng = np.random.default_rng(seed)
  return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize('mask_shape', [(2, 1), (1, 4), (2, 4)])
def test_equals_dense_numpy_with_grouped_heads_and_masks(kv_heads, mask_shape):
  q, k, v = draw(0, (2, 5, 4, 8), (2, 7, kv_heads, 8), (2, 7, kv_heads, 8))
  mask = np.random.default_rng(1).random((*mask_shape, 5, 7)) < 0.6
  mask[..., 0] = True
  got = attention_lib.attention(q, k, v, jnp.asarray(mask))
  want = dense_attention(
      q, k, v, np.broadcast_to(mask, (2, 4, 5, 7)), 8**-0.5
  )
  chex.assert_trees_all_close(got, want.astype(np.float32), atol=1e-5)


def test_scale_and_causality():
  q, k, v = draw(2, (1, 6, 2, 4), (1, 6, 2, 4), (1, 6, 2, 4))
  got = attention_lib.attention(q, k, v, scale=0.9, is_causal=True)
  mask = np.broadcast_to(np.tri(6, dtype=bool), (1, 2, 6, 6))
  want = dense_attention(q, k, v, mask, 0.9)
  chex.assert_trees_all_close(got, want.astype(np.float32), atol=1e-5)


def test_fully_masked_row_is_finite_and_leaves_the_others_alone():
  q, k, v = draw(3, (1, 4, 2, 4), (1, 4, 2, 4), (1, 4, 2, 4))
  mask = np.tri(4, dtype=bool)
  mask[2] = False
  mask = jnp.asarray(mask[None, None])

  def others(q, k, v):
    out = attention_lib.attention(q, k, v, mask)
    return jnp.sum(out[:, jnp.array([0, 1, 3])] ** 2), out

  grads, out = jax.grad(others, (0, 1, 2), has_aux=True)(q, k, v)
  chex.assert_tree_all_finite((grads, out))
  assert not np.any(grads[0][:, 2])
  seen = np.broadcast_to(np.tri(4, dtype=bool), (1, 2, 4, 4))
  want = dense_attention(q, k, v, seen, 0.5)
  chex.assert_trees_all_close(
      out[:, [0, 1, 3]], want[:, [0, 1, 3]].astype(np.float32), atol=1e-5
  )


def test_bfloat16_keeps_a_float32_softmax():
  q, k, v = (
      jnp.asarray(x, jnp.bfloat16)
      for x in draw(4, (1, 3, 2, 16), (1, 64, 2, 16), (1, 64, 2, 16))
  )
  got = attention_lib.attention(q, k, v)
  assert got.dtype == jnp.bfloat16
  want = dense_attention(q, k, v, np.ones((1, 2, 3, 64), bool), 0.25)
  chex.assert_trees_all_close(
      np.asarray(got, np.float64), want, atol=0.01
  )


def test_heads_which_are_no_multiple_are_refused():
  q, k, v = draw(5, (1, 2, 3, 4), (1, 2, 2, 4), (1, 2, 2, 4))
  with pytest.raises(ValueError, match='multiple'):
    attention_lib.attention(q, k, v)


def test_segment_mask_by_hand():
  got = attention_lib.segment_mask(
      jnp.array([[0, 1, 1, 2]]), jnp.array([[0, 1, 1, 2]])
  )
  want = np.array(
      [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], bool
  )
  np.testing.assert_array_equal(got, want[None, None])


@pytest.mark.parametrize('start', [0, 2, 4])
def test_segment_mask_places_queries_in_the_row(start):
  rng = np.random.default_rng(start)
  keys = rng.integers(0, 3, (2, 6))
  queries = keys[:, start : start + 2]
  place = np.arange(start, start + 2)
  got = attention_lib.segment_mask(
      jnp.asarray(queries), jnp.asarray(keys), jnp.asarray(place)
  )
  chex.assert_shape(got, (2, 1, 2, 6))
  for b, t, s in itertools.product(range(2), range(2), range(6)):
    want = queries[b, t] == keys[b, s] != 0 and s <= place[t]
    assert bool(got[b, 0, t, s]) == want


def test_segment_mask_accepts_places_of_keys():
  # A ring of keys written in the order 2, 0, 1.
  got = attention_lib.segment_mask(
      jnp.array([[1]]),
      jnp.array([[1, 1, 1]]),
      q_index=jnp.array([1]),
      kv_index=jnp.array([2, 0, 1]),
  )
  np.testing.assert_array_equal(got[0, 0], [[False, True, True]])
