"""Tiles of a photo against diffusers' `AutoencoderKL.enable_tiling`."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import tiling, vae

# Compiling is nearly all the time of these tests: do it half as well.
FAST = {"xla_backend_optimization_level": 0}
TILE = 16
# Name: (config, latent sides, scale of the moments). With tiles of 8 latents
# (4 where photos shrink by four) the next one begins after 6 (3).
CASES = {
  "one more than a tile": ({}, (9, 8), 1),
  "last tiles of one pixel": ({}, (13, 7), 1),
  "a strip": ({}, (5, 24), 1),
  "four deep": (
    dict(block_out_channels=(8, 8, 8), latent_channels=3), (11, 6), 1,
  ),
  "variances out of bounds": ({}, (14, 10), 60),
}  # fmt: skip


def make(changes, tile=TILE, loudness=1):
  """diffusers' tiling model of random weights, ours, and its parameters."""
  diffusers = pytest.importorskip("diffusers")
  import hf_models
  import hf_parts
  import torch

  numbers = dict(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
  )
  config = vae.VAEConfig(**(numbers | changes), tile_size=tile)
  blocks = len(config.block_out_channels)
  oracle = diffusers.AutoencoderKL(
    block_out_channels=config.block_out_channels,
    latent_channels=config.latent_channels,
    norm_num_groups=config.norm_num_groups,
    down_block_types=("DownEncoderBlock2D",) * blocks,
    up_block_types=("UpDecoderBlock2D",) * blocks,
    sample_size=tile,
  )
  hf_models.randomise(oracle, 3)
  with torch.no_grad():
    oracle.quant_conv.weight.mul_(loudness)
  oracle.enable_tiling()
  params = hf_parts.conv_params(oracle.state_dict())
  return oracle, vae.VAE(config), params


def draw(config, sides):
  """A pair of photos and a pair of latents of these sides."""
  rng = np.random.default_rng(4)
  large = [side * config.factor for side in sides]
  photos = rng.uniform(-1, 1, (2, *large, 3)).astype(np.float32)
  latents = rng.normal(size=(2, *sides, config.latent_channels))
  return photos, latents.astype(np.float32)


def torch_of(array):
  return pytest.importorskip("torch").tensor(array.transpose(0, 3, 1, 2).copy())


def array_of(tensor):
  return tensor.detach().permute(0, 2, 3, 1).numpy()


def encode(model, params, photos):
  config = model.config
  moments = tiling.tiled(
    lambda x: model.apply({"params": params}, x, method="moments"),
    photos,
    config.tile_size,
    config.tile_size // config.factor,
  )
  return vae.posterior(moments)


def decode(model, params, latents):
  config = model.config
  return tiling.tiled(
    lambda x: model.apply({"params": params}, x, method="decode"),
    latents,
    config.tile_size // config.factor,
    config.tile_size,
  )


@pytest.mark.parametrize("case", CASES)
def test_photos_and_latents_are_those_of_diffusers(case):
  torch = pytest.importorskip("torch")
  changes, sides, loudness = CASES[case]
  oracle, model, params = make(changes, loudness=loudness)
  photos, latents = draw(model.config, sides)
  with torch.no_grad():
    want = oracle.encode(torch_of(photos)).latent_dist
    want = [array_of(want.mean), array_of(want.logvar)]
    back = array_of(oracle.decode(torch_of(latents)).sample)
    oracle.disable_tiling()
    whole = array_of(oracle.decode(torch_of(latents)).sample)
  assert np.abs(back - whole).max() > 0.1, "tiles make no difference here"
  outside = (want[1] == 20).any() and (want[1] == -30).any()
  assert outside == (loudness > 1)

  run = functools.partial(jax.jit, compiler_options=FAST)
  got = run(functools.partial(encode, model))(params, photos)
  scale = max(1, np.abs(want[0]).max())
  np.testing.assert_allclose(got[0], want[0], atol=1e-4 * scale)
  np.testing.assert_allclose(got[1], want[1], atol=1e-4 * scale)
  got = run(functools.partial(decode, model))(params, latents)
  np.testing.assert_allclose(got, back, atol=1e-4)


def test_gradients_are_those_of_diffusers():
  oracle, model, params = make({})
  _, latents = draw(model.config, (5, 11))
  tensor = torch_of(latents).requires_grad_()
  oracle.decode(tensor).sample.square().mean().backward()
  got = jax.jit(
    jax.grad(lambda x: jnp.square(decode(model, params, x)).mean()),
    compiler_options=FAST,
  )(latents)
  want = array_of(tensor.grad)
  np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_a_large_photo_needs_the_memory_of_a_tile():
  config = vae.VAEConfig(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
    tile_size=32,
  )  # fmt: skip
  model = vae.VAE(config)
  params = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
  )["params"]

  def memory(function, side, channels):
    x = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    compiled = jax.jit(function, compiler_options=FAST).lower(params, x)
    return compiled.compile().memory_analysis().temp_size_in_bytes

  def whole(params, x):
    return model.apply({"params": params}, x, method="decode")

  tiled = functools.partial(decode, model)
  # 36 times the pixels of a tile, and the scores of a block of queries.
  one, large = memory(whole, 16, 4), memory(whole, 96, 4)
  assert large > 100 * one
  # The tiles in and out are kept; they are small beside the activations.
  assert memory(tiled, 96, 4) < 5 * one
  assert memory(functools.partial(encode, model), 192, 3) < 5 * one


@hypothesis.settings(max_examples=12)
@hypothesis.given(
  st.integers(1, 3), st.integers(1, 30), st.integers(1, 30), st.integers(1, 3)
)
def test_what_works_on_each_pixel_does_not_see_the_tiles(
  quarter, height, width, factor
):
  x = np.random.default_rng(0).normal(size=(1, height, width, 2))
  x = x.astype(np.float32)
  tile, seen = 4 * quarter, []

  def enlarge(x):
    seen.append(x.shape[1:3])
    return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)

  got = jax.jit(
    lambda x: tiling.tiled(enlarge, x, tile, factor * tile),
    compiler_options=FAST,
  )(x)
  want = x.repeat(factor, axis=1).repeat(factor, axis=2)
  np.testing.assert_allclose(got, want, atol=1e-6)
  # Every size is compiled once, and there are at most three a side.
  assert np.max(seen) <= tile
  assert len(seen) == len(set(seen)) <= 9


def test_a_photo_no_larger_than_a_tile_is_taken_whole():
  seen = []

  def function(x):
    seen.append(x.shape)
    return x

  for tile in (0, 8):
    x = jnp.ones((1, 8, 5, 1), jnp.bfloat16)
    chex.assert_trees_all_equal(tiling.tiled(function, x, tile, tile), x)
  assert seen == [(1, 8, 5, 1)] * 2
  x = jnp.ones((1, 9, 5, 1), jnp.bfloat16)
  assert tiling.tiled(function, x, 8, 8).dtype == jnp.bfloat16
  assert len(seen) > 2
