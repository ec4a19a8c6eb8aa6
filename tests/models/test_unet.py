"""The UNet against diffusers' `UNet2DConditionModel` on torch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import unet, unet_blocks

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
# Name: (differences from TINY, latent sides). Odd sides are rounded up on the
# way down and must come back.
CASES = {
  "plain": ({}, (8, 8)),
  "rectangle": (
    dict(
      block_out_channels=(16, 32, 32),
      attention=(True, True, False),
      num_attention_heads=(1, 2, 4),
      use_linear_projection=True,
    ),
    (8, 6),
  ),
  "odd": (
    dict(
      block_out_channels=(8, 16, 24),
      attention=(False, True, True),
      num_attention_heads=(1, 4, 3),
      in_channels=3,
      out_channels=6,
      flip_sin_to_cos=False,
      freq_shift=1,
    ),
    (7, 5),
  ),
  "deep": (
    dict(
      layers_per_block=2,
      attention=(False, True),
      transformer_layers_per_block=2,
      use_linear_projection=True,
    ),
    (4, 4),
  ),
}


def torch_unet(config, seed, **scales):
  """diffusers' UNet of our config, every parameter random, and its tree."""
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  import torch_weights_diffusion as weights

  model = diffusers.UNet2DConditionModel(
    sample_size=config.sample_size,
    in_channels=config.in_channels,
    out_channels=config.out_channels,
    block_out_channels=config.block_out_channels,
    layers_per_block=config.layers_per_block,
    down_block_types=[
      "CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention
    ],
    up_block_types=[
      "CrossAttnUpBlock2D" if a else "UpBlock2D"
      for a in reversed(config.attention)
    ],
    attention_head_dim=config.num_attention_heads,
    cross_attention_dim=config.cross_attention_dim,
    norm_num_groups=config.norm_num_groups,
    use_linear_projection=config.use_linear_projection,
    flip_sin_to_cos=config.flip_sin_to_cos,
    freq_shift=config.freq_shift,
    transformer_layers_per_block=config.transformer_layers_per_block,
  )
  weights.randomise(model, seed, **scales)
  return model, weights.conv_params(model.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_diffusers(case):
  torch = pytest.importorskip("torch")
  changes, (height, width) = CASES[case]
  config = unet.UNetConfig(**(TINY | changes))
  model, params = torch_unet(config, seed=1)
  rng = np.random.default_rng(2)
  latents = rng.normal(size=(2, height, width, config.in_channels))
  latents = latents.astype(np.float32)
  context = rng.normal(size=(2, 5, config.cross_attention_dim))
  context = context.astype(np.float32)
  timesteps = np.array([3, 981], np.int32)
  weight = rng.normal(size=(2, height, width, config.out_channels))
  weight = weight.astype(np.float32)

  torch_latents = torch.tensor(latents.transpose(0, 3, 1, 2).copy())
  torch_context = torch.tensor(context, requires_grad=True)
  want = model(
    torch_latents, torch.tensor(timesteps), torch_context
  ).sample.permute(0, 2, 3, 1)
  (want * torch.tensor(weight)).mean().backward()
  want = want.detach().numpy()
  gradients = {
    key: parameter.grad for key, parameter in model.named_parameters()
  }
  import torch_weights_diffusion as weights

  def loss(params, context):
    out = unet.UNet(config).apply(
      {"params": params}, latents, timesteps, context
    )
    return (out * weight).mean(), out

  (_, got), (by_params, by_context) = jax.jit(
    jax.value_and_grad(loss, (0, 1), has_aux=True), compiler_options=FAST
  )(params, context)
  assert np.abs(want).mean() > 0.1  # A dead network proves nothing.
  np.testing.assert_allclose(got, want, atol=1e-4)
  np.testing.assert_allclose(by_context, torch_context.grad.numpy(), atol=1e-4)
  chex.assert_trees_all_close(
    by_params, weights.conv_params(gradients), atol=1e-4
  )


@pytest.mark.parametrize("loud", [None, "transformer_blocks"])
def test_every_epsilon_is_that_of_diffusers(loud):
  torch = pytest.importorskip("torch")
  config = unet.UNetConfig(**TINY)
  oracle, params = torch_unet(config, seed=1, kernel_scale=3e-3, loud=loud)
  latents, timesteps, context = small_inputs()
  with torch.no_grad():
    want = oracle(
      torch.tensor(latents.transpose(0, 3, 1, 2).copy()),
      torch.tensor(timesteps),
      torch.tensor(context),
    ).sample.permute(0, 2, 3, 1)
  got = jax.jit(unet.UNet(config).apply, compiler_options=FAST)(
    {"params": params}, latents, timesteps, context
  )
  want = want.numpy()
  np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def small_inputs():
  rng = np.random.default_rng(3)
  latents = rng.normal(size=(1, 4, 4, 4)).astype(np.float32)
  context = rng.normal(size=(1, 3, 12)).astype(np.float32)
  return latents, np.array([10], np.int32), context


def random_params(model, inputs):
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  rng = np.random.default_rng(4)

  def draw(leaf):
    fan_in = np.prod(leaf.shape[:-1])
    return (rng.normal(size=leaf.shape) * fan_in**-0.5).astype(np.float32)

  return jax.tree.map(draw, shapes)


def test_the_gate_is_the_exact_gelu_of_diffusers():
  torch = pytest.importorskip("torch")
  activations = pytest.importorskip("diffusers.models.activations")
  import torch_weights_diffusion as weights

  oracle = activations.GEGLU(6, 8)
  weights.randomise(oracle, seed=5)
  x = np.random.default_rng(6).normal(size=(40, 6)).astype(np.float32)
  got = unet_blocks.GEGLU(8).apply(
    {"params": weights.conv_params(oracle.state_dict())}, x
  )
  np.testing.assert_allclose(
    got, oracle(torch.tensor(x)).detach().numpy(), atol=1e-5
  )


def test_remat_changes_no_parameter_and_no_gradient():
  inputs = small_inputs()
  plain = unet.UNet(unet.UNetConfig(**TINY))
  remat = unet.UNet(unet.UNetConfig(**TINY, remat=True))
  params = random_params(plain, inputs)
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
  params = random_params(plain, inputs)
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
  "config,count",
  [
    (unet.UNetConfig.sd15(), 859_520_964),
    (unet.UNetConfig.sd21(), 865_910_724),
  ],
)
def test_real_sizes_have_their_published_parameter_counts(config, count):
  shapes = jax.eval_shape(
    unet.UNet(config).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
    jax.ShapeDtypeStruct((1, 77, config.cross_attention_dim), jnp.float32),
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


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
