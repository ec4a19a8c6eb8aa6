"""models/unet.py; `tests/parity/test_unet_parity.py` has the original."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_params

from photochat_jax.models import unet

TINY = dict(
  block_out_channels=(16, 32),
  layers_per_block=1,
  attention=(True, False),
  num_attention_heads=2,
  cross_attention_dim=12,
  norm_num_groups=4,
)
# Compiling is nearly all the time of these tests: do it half as well.
FAST = {"xla_backend_optimization_level": 0}


def small_inputs():
  rng = np.random.default_rng(3)
  latents = rng.normal(size=(1, 4, 4, 4)).astype(np.float32)
  context = rng.normal(size=(1, 3, 12)).astype(np.float32)
  return latents, np.array([10], np.int32), context


def random(model, inputs):
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  return random_params.draw(shapes)


def test_remat_changes_no_parameter_and_no_gradient():
  inputs = small_inputs()
  plain = unet.UNet(unet.UNetConfig(**TINY))
  remat = unet.UNet(unet.UNetConfig(**TINY, remat="full"))
  params = random(plain, inputs)
  results = []
  for model in (plain, remat):
    loss = jax.value_and_grad(lambda p, m=model: m.apply(p, *inputs).sum())
    results.append(jax.jit(loss, compiler_options=FAST)(params))
  chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-4)
  text = str(
    jax.make_jaxpr(jax.grad(lambda p: remat.apply(p, *inputs).sum()))(params)
  )
  assert "remat" in text or "checkpoint" in text


def test_bfloat16_computes_the_same_with_float32_parameters():
  inputs = small_inputs()
  plain = unet.UNet(unet.UNetConfig(**TINY))
  half = unet.UNet(unet.UNetConfig(**TINY, dtype="bfloat16"))
  params = random(plain, inputs)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    jax.eval_shape(half.init, jax.random.key(0), *inputs), params
  )
  want = jax.jit(plain.apply, compiler_options=FAST)(params, *inputs)
  got = jax.jit(half.apply, compiler_options=FAST)(params, *inputs)
  chex.assert_type(got, jnp.bfloat16)
  np.testing.assert_allclose(
    got.astype(jnp.float32), want, atol=0.05 * np.abs(want).max()
  )


def test_a_new_network_already_hears_its_context():
  latents, timesteps, context = small_inputs()
  model = unet.UNet(unet.UNetConfig(**TINY))
  params = jax.jit(model.init, compiler_options=FAST)(
    jax.random.key(0), latents, timesteps, context
  )
  gradient = jax.jit(
    jax.grad(lambda c: model.apply(params, latents, timesteps, c).sum()),
    compiler_options=FAST,
  )(context)
  assert np.abs(gradient).max() > 1e-6


@pytest.mark.parametrize(
  "numbers,message",
  [
    (dict(attention=(True,)), "one entry for each"),
    (dict(num_attention_heads=(2, 2, 2)), "one entry for each"),
    (dict(num_attention_heads=3), "attention heads"),
    (dict(norm_num_groups=5), "norm_num_groups"),
  ],
)
def test_impossible_numbers_are_refused(numbers, message):
  with pytest.raises(ValueError, match=message):
    unet.UNetConfig(**(TINY | numbers))
