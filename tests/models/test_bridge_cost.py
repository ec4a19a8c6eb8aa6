"""The bridge at real size, lowered and never run: which arrays it makes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import bridge


def _buffer_sizes(function, *args):
  text = jax.jit(function).lower(*args).as_text()
  shapes = re.findall(r'tensor<((?:\d+x)+)[a-z]', text)
  return {
    int(np.prod([int(axis) for axis in shape[:-1].split('x')]))
    for shape in shapes
  }


@pytest.mark.parametrize('draw', ['gold', 'gumbel'])
@pytest.mark.parametrize('matrix', list(bridge.CROSSINGS))
def test_no_dense_buffer_at_real_size(matrix, draw):
  batch, length, width, n, m, d = 4, 1024, 32, 96, 77, 64
  vocab, num_clip, non_zeros = 32128, 49408, 50_000
  of = jax.ShapeDtypeStruct
  table = {
    'rows': of((non_zeros,), jnp.int32),
    'cols': of((non_zeros,), jnp.int32),
    'weights': of((non_zeros,), jnp.float32),
  }
  vocab_map = {'static': table, 'final': table, 'internal': table,
               'specials': of((3,), jnp.int32)}
  config = bridge.BridgeConfig(draw=draw, matrix=matrix)

  def loss(hidden, head, embedding, where, vocab_map, facts, keys):
    picked = jnp.take_along_axis(hidden, where[..., None], axis=1)
    out = bridge.cross(
      config, picked @ head, **facts, clip_embedding=embedding,
      vocab_map=vocab_map, keys=keys,
    )
    return jnp.sum(out**2)

  sizes = _buffer_sizes(
    jax.value_and_grad(loss, (0, 1, 2)),
    of((batch, length, width), jnp.float32),
    of((width, vocab), jnp.float32),
    of((num_clip, d), jnp.float32),
    of((batch, n), jnp.int32),
    vocab_map,
    {
      'tokens': of((batch, n), jnp.int32),
      'clip_tokens': of((batch, m), jnp.int32),
      'alignment': of((batch, m, n), jnp.float32),
      'final': of((batch, n), jnp.bool_),
      'caption_mask': of((batch, n), jnp.bool_),
    },
    jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    if draw == 'gumbel' else None,
  )
  # The logits themselves are the largest array of all.
  assert max(sizes) == batch * n * vocab
  assert batch * length * vocab not in sizes
  assert vocab * num_clip not in sizes


def test_the_buffer_check_sees_a_dense_matrix():
  sizes = _buffer_sizes(
    lambda ids: jax.nn.one_hot(ids, 49408).sum(0),
    jax.ShapeDtypeStruct((32128,), jnp.int32),
  )
  assert 32128 * 49408 in sizes
