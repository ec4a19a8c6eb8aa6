"""models/vae.py; `tests/parity/test_autoencoder.py` has the original."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import vae

TINY = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)


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
  config = vae.VAEConfig.tiny(dtype="bfloat16", remat="full")
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
