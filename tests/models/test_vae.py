"""The autoencoder against diffusers' `AutoencoderKL` on torch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import vae

TINY = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
# Name: (differences from TINY, photo sides).
CASES = {
  "plain": ({}, (8, 8)),
  "rectangle": (
    dict(
      block_out_channels=(8, 8, 24),
      layers_per_block=2,
      latent_channels=3,
      norm_num_groups=8,
    ),
    (12, 20),
  ),
}


def torch_vae(config, seed, **scales):
  """diffusers' VAE of our config, every parameter random, and its tree."""
  diffusers = pytest.importorskip("diffusers")
  import torch_weights_diffusion as weights

  blocks = len(config.block_out_channels)
  model = diffusers.AutoencoderKL(
    in_channels=config.in_channels,
    out_channels=config.out_channels,
    latent_channels=config.latent_channels,
    block_out_channels=config.block_out_channels,
    layers_per_block=config.layers_per_block,
    norm_num_groups=config.norm_num_groups,
    down_block_types=("DownEncoderBlock2D",) * blocks,
    up_block_types=("UpDecoderBlock2D",) * blocks,
  )
  weights.randomise(model, seed, **scales)
  return model, weights.conv_params(model.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_diffusers(case):
  torch = pytest.importorskip("torch")
  import torch_weights_diffusion as weights

  changes, (height, width) = CASES[case]
  config = vae.VAEConfig(**(TINY | changes))
  oracle, params = torch_vae(config, seed=1)
  rng = np.random.default_rng(2)
  photos = rng.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
  shape = height // config.factor, width // config.factor
  latents = rng.normal(size=(2, *shape, config.latent_channels))
  latents = latents.astype(np.float32)

  def channels_first(x):
    return torch.tensor(x.transpose(0, 3, 1, 2).copy())

  def channels_last(x):
    return x.detach().permute(0, 2, 3, 1).numpy()

  posterior = oracle.encode(channels_first(photos)).latent_dist
  decoded = oracle.decode(channels_first(latents)).sample
  loss = (
    posterior.mean.square().mean()
    + posterior.logvar.square().mean()
    + decoded.square().mean()
  )
  loss.backward()
  gradients = weights.conv_params(
    {key: parameter.grad for key, parameter in oracle.named_parameters()}
  )
  model = vae.VAE(config)

  def loss(params):
    mean, logvar = model.apply({"params": params}, photos, method="encode")
    back = model.apply({"params": params}, latents, method="decode")
    total = sum(jnp.square(x).mean() for x in (mean, logvar, back))
    return total, (mean, logvar, back)

  compiled = jax.jit(
    jax.value_and_grad(loss, has_aux=True),
    compiler_options={"xla_backend_optimization_level": 0},
  )
  (_, (mean, logvar, back)), by_params = compiled(params)
  np.testing.assert_allclose(mean, channels_last(posterior.mean), atol=1e-4)
  np.testing.assert_allclose(logvar, channels_last(posterior.logvar), atol=1e-4)
  np.testing.assert_allclose(back, channels_last(decoded), atol=1e-4)
  chex.assert_trees_all_close(by_params, gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loud", [None, "attentions"])
def test_every_epsilon_is_that_of_diffusers(loud):
  torch = pytest.importorskip("torch")
  config = vae.VAEConfig(**TINY)
  oracle, params = torch_vae(config, seed=1, kernel_scale=3e-3, loud=loud)
  rng = np.random.default_rng(2)
  photos = rng.uniform(-1, 1, (1, 3, 8, 8)).astype(np.float32)
  latents = rng.normal(size=(1, 4, 4, 4)).astype(np.float32)
  with torch.no_grad():
    mean = oracle.encode(torch.tensor(photos)).latent_dist.mean
    back = oracle.decode(torch.tensor(latents)).sample
  model = vae.VAE(config)
  for method, value, want in (
    ("encode", photos, mean),
    ("decode", latents, back),
  ):
    got = jax.jit(
      lambda p, x, method=method: model.apply(p, x, method=method),
      compiler_options={"xla_backend_optimization_level": 0},
    )({"params": params}, value.transpose(0, 2, 3, 1))
    got = got[0] if method == "encode" else got
    want = want.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_the_variance_is_kept_in_bounds():
  config = vae.VAEConfig(**TINY)
  model = vae.VAE(config)
  photos = jnp.zeros((1, 4, 4, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), photos)["params"]
  params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
  params["quant_conv"]["bias"] = jnp.array([7.0] * 4 + [-99, 99, 5, -5])
  mean, logvar = jax.jit(lambda p: model.apply(p, photos, method="encode"))(
    {"params": params}
  )
  np.testing.assert_array_equal(mean, np.full((1, 2, 2, 4), 7.0))
  np.testing.assert_array_equal(logvar[0, 0, 0], [-30, 20, 5, -5])


def test_moments_mode_and_sample_are_those_of_diffusers():
  torch = pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

  rng = np.random.default_rng(5)
  moments = rng.normal(size=(2, 3, 5, 8)).astype(np.float32)
  moments[0, 0, 0, 4:6] = -99, 9  # The variance of the first has a bound.
  oracle = DiagonalGaussianDistribution(
    torch.tensor(moments.transpose(0, 3, 1, 2).copy())
  )
  mean, logvar = vae.posterior(jnp.asarray(moments))
  np.testing.assert_array_equal(mean, oracle.mode().permute(0, 2, 3, 1))
  np.testing.assert_array_equal(logvar, oracle.logvar.permute(0, 2, 3, 1))
  one, same = (torch.Generator().manual_seed(6) for _ in range(2))
  want = oracle.sample(one)
  noise = torch.randn(oracle.mean.shape, generator=same)
  got = vae.sample(mean, logvar, noise.permute(0, 2, 3, 1).numpy())
  np.testing.assert_allclose(got, want.permute(0, 2, 3, 1), rtol=1e-5)


def test_shapes_dtypes_and_one_init_for_both_halves():
  config = vae.VAEConfig.tiny(dtype="bfloat16", remat=True)
  model = vae.VAE(config)
  photos = jnp.zeros((2, 32, 32, 3))
  out, params = jax.eval_shape(
    model.init_with_output, jax.random.key(0), photos
  )
  assert set(params["params"]) == {
    "encoder",
    "decoder",
    "quant_conv",
    "post_quant_conv",
  }
  chex.assert_shape(out, (2, 32, 32, 3))
  chex.assert_type(out, jnp.bfloat16)
  chex.assert_type(jax.tree.leaves(params), jnp.float32)
  assert config.factor == 4
  mean, logvar = jax.eval_shape(
    lambda p: model.apply(p, photos, method="encode"), params
  )
  chex.assert_shape([mean, logvar], (2, 8, 8, 4))


def test_real_size_has_its_published_parameter_count():
  shapes = jax.eval_shape(
    vae.VAE(vae.VAEConfig.sd15()).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863
  assert vae.VAEConfig.sd15().factor == 8


def test_impossible_numbers_are_refused():
  with pytest.raises(ValueError, match="norm_num_groups"):
    vae.VAEConfig(norm_num_groups=48)
  for size in (100, -32):
    with pytest.raises(ValueError, match="tile_size .* multiple of 32"):
      vae.VAEConfig.sd15(tile_size=size)
  assert vae.VAEConfig.sd15(tile_size=512).tile_size == 512
  model = vae.VAE(vae.VAEConfig(**TINY))
  with pytest.raises(ValueError, match="multiples of 2"):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 9, 8, 3)))
