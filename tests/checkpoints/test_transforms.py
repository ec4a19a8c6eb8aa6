"""How tensors lie there and here, in every transform of the tables."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from photochat_jax.checkpoints import blip2, llama, tables
from photochat_jax.models import qformer, vit
from photochat_jax.models.llama import LlamaConfig

VISION = vit.ViTConfig(
  image_size=6, patch_size=3, hidden_size=4, num_attention_heads=1
)
PATCHES = next(
  row.transform
  for row in blip2.table(VISION, qformer.QFormerConfig()).rows
  if row.path == "vision_model/patch_embedding/kernel"
)


def vocabulary(name):
  config = LlamaConfig(vocab_size=7)
  return next(
    row.transform for row in llama.table(config).rows if row.path == name
  )


# Name: (transform, their shape, our shape).
TRANSFORMS = {
  "same": (tables.SAME, (3, 4), (3, 4)),
  "dense": (tables.DENSE, (3, 4), (4, 3)),
  "conv": (tables.CONV, (2, 3, 4, 5), (4, 5, 3, 2)),
  "pointwise": (tables.POINTWISE, (2, 3, 1, 1), (3, 2)),
  "patches": (PATCHES, (4, 3, 3, 3), (27, 4)),
  "embedding": (vocabulary("embed_tokens/embedding"), (7, 4), (128, 4)),
  "head": (vocabulary("lm_head/kernel"), (7, 4), (4, 128)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@given(
  dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
  data=st.data(),
)
def test_every_transform_there_and_back_keeps_every_bit(name, dtype, data):
  transform, theirs, ours = TRANSFORMS[name]
  size = math.prod(theirs) * np.dtype(dtype).itemsize
  # Any bits: infinities and all kinds of NaN among them.
  bits = data.draw(st.binary(min_size=size, max_size=size))
  tensor = np.frombuffer(bits, dtype).reshape(theirs)
  out, again = np.zeros(ours, dtype), np.ones(ours, dtype)
  transform.read(tensor, out)
  back = transform.write(out)
  assert back.dtype == dtype and back.shape == theirs
  assert np.ascontiguousarray(back).tobytes() == bits
  # Every number is written, those of the padding too.
  transform.read(tensor, again)
  assert again.tobytes() == out.tobytes()
