"""models/clip_text.py; `tests/parity/test_text_encoder.py` has the original."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import clip_text

TINY = dict(
  vocab_size=50,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  max_position_embeddings=9,
  bos_token_id=48,
  eos_token_id=49,
  pad_token_id=49,
)


def test_one_init_makes_every_parameter():
  config = clip_text.CLIPTextConfig(**TINY)
  model = clip_text.CLIPText(config)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 24)))[
    "params"
  ]
  assert params["token_embedding"]["embedding"].shape == (50, 24)
  assert params["position_embedding"]["embedding"].shape == (9, 24)
  assert params["layers"]["self_attn"]["q_proj"]["kernel"].shape == (3, 24, 24)
  assert set(params) == {
    "token_embedding",
    "position_embedding",
    "layers",
    "final_layer_norm",
  }


def test_new_layers_differ_from_each_other():
  config = clip_text.CLIPTextConfig(**TINY)
  init = jax.jit(clip_text.CLIPText(config).init)
  params = init(jax.random.key(0), jnp.zeros((1, 4, 24)))["params"]
  kernel = params["layers"]["mlp"]["fc1"]["kernel"]
  assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_a_position_sees_nothing_after_it():
  config = clip_text.CLIPTextConfig(**TINY)
  model = clip_text.CLIPText(config)
  embeds = jax.random.normal(jax.random.key(1), (1, 6, 24))
  params = jax.jit(model.init)(jax.random.key(0), embeds)
  gradient = jax.jit(
    jax.grad(lambda e: jnp.square(model.apply(params, e)[0, 3, 0]))
  )(embeds)[0]
  assert np.abs(gradient[:4]).max(1).min() > 0
  np.testing.assert_array_equal(gradient[4:], 0.0)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
  config = clip_text.CLIPTextConfig(**TINY, dtype="bfloat16")
  model = clip_text.CLIPText(config)
  embeds = jnp.zeros((1, 4, 24))
  out, params = jax.eval_shape(
    model.init_with_output, jax.random.key(0), embeds
  )
  chex.assert_type(out, jnp.bfloat16)
  chex.assert_type(jax.tree.leaves(params), jnp.float32)


def test_impossible_numbers_are_refused():
  with pytest.raises(ValueError, match="hidden_act"):
    clip_text.CLIPTextConfig(hidden_act="relu")
  with pytest.raises(ValueError, match="num_attention_heads"):
    clip_text.CLIPTextConfig(num_attention_heads=5)
  config = clip_text.CLIPTextConfig(**TINY)
  with pytest.raises(ValueError, match="max_position_embeddings"):
    jax.eval_shape(
      clip_text.CLIPText(config).init,
      jax.random.key(0),
      jnp.zeros((1, 10, 24)),
    )
