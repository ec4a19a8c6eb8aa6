"""Scaled dot-product attention and the masks of packed rows.

Axis letters: B rows, T queries, S keys, H query heads, Kh key/value heads
(H is a multiple of Kh), Dh width of a head.
"""

import functools

import jax
import jax.numpy as jnp

# Queries whose scores exist at a time where there are many. The 4,096 pixels
# of a 512-pixel photo in its finest attention would have 5 heads x 4,096 x
# 4,096 scores in float32, 336 MB a photo, and as much again on the way back.
BLOCK = 1024


def attention(q, k, v, mask=None, scale=None, is_causal=False):
  """Attends from `q` to `k`, `v`; the softmax runs in float32.

  Queries that are many and see everything are taken `BLOCK` at a time, so
  that memory grows with their number and not with its square.

  Args:
    q: [B, T, H, Dh] queries.
    k: [B, S, Kh, Dh] keys; query head h reads key head h // (H / Kh).
    v: [B, S, Kh, Dh] values.
    mask: bool [B or 1, 1 or H, T, S], True where attention is allowed, or
      None for everywhere. A row without any True gives the mean of all
      values: finite, and meant to be ignored by the caller.
    scale: factor on the scores, 1 / sqrt(Dh) when None.
    is_causal: also hide key s from query t wherever s > t.

  Returns:
    [B, T, H, Dh] in the dtype of `q`.

  Raises:
    ValueError: H is not a multiple of Kh, or shapes or dtypes disagree
      (from `jax.nn.dot_product_attention`).
  """
  attend = functools.partial(
      jax.nn.dot_product_attention, mask=mask, scale=scale, is_causal=is_causal
  )
  blocks, rest = divmod(q.shape[1], BLOCK)
  if mask is not None or is_causal or rest or blocks < 2:
    return attend(q, k, v)
  # Block by block, each recomputed on the way back.
  q = jnp.moveaxis(q.reshape(q.shape[0], blocks, BLOCK, *q.shape[2:]), 1, 0)
  y = jax.lax.map(jax.checkpoint(lambda block: attend(block, k, v)), q)
  y = jnp.moveaxis(y, 0, 1)
  return y.reshape(y.shape[0], blocks * BLOCK, *y.shape[3:])


def segment_mask(q_segments, kv_segments, q_index=None, kv_index=None):
  """The causal mask of rows which hold several sequences, or padding.

  A query sees a key of its own segment which stands at or before it in the
  row. Segment 0 is nothing: it neither sees nor is seen.

  Args:
    q_segments: int [B, T] segment of each query.
    kv_segments: int [B, S] segment of each key.
    q_index: int [T] place of each query in the row, 0..T-1 when None.
    kv_index: int [S] place of each key in the row, 0..S-1 when None.

  Returns:
    bool [B, 1, T, S], the `mask` of `attention`.
  """
  if q_index is None:
    q_index = jnp.arange(q_segments.shape[1])
  if kv_index is None:
    kv_index = jnp.arange(kv_segments.shape[1])
  q_segments = q_segments[:, :, None]
  same = (q_segments == kv_segments[:, None, :]) & (q_segments != 0)
  causal = kv_index[None, :] <= q_index[:, None]
  return (same & causal)[:, None]
