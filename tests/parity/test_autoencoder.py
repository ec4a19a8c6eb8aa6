"""The autoencoder against diffusers' `AutoencoderKL`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import vae

torch = pytest.importorskip("torch")
import hf_compare  # noqa: E402
import hf_models  # noqa: E402

# Name: (differences, photos' sides).
CASES = {
  "square": ({}, (8, 8)),
  "as published, odd latents": (
    {"block_out_channels": (8, 16, 24, 24), "layers_per_block": 2},
    (24, 40),
  ),
  "odd numbers": (
    {
      "block_out_channels": (9, 15, 15),
      "norm_num_groups": 3,
      "latent_channels": 3,
      "in_channels": 2,
      "out_channels": 5,
      "scaling_factor": 0.5,
    },
    (12, 20),
  ),
}


def inputs(config, sides):
  rng = np.random.default_rng(2)
  photos = rng.uniform(-1, 1, (2, *sides, config.in_channels))
  shape = 2, *(side // config.factor for side in sides), config.latent_channels
  latents = rng.standard_normal(shape)
  return photos.astype(np.float32), latents.astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_both_halves_and_all_gradients_equal_the_originals(name, tmp_path):
  changes, sides = CASES[name]
  pair = hf_models.autoencoder(tmp_path, **changes)
  assert pair.config.scaling_factor == changes.get("scaling_factor", 0.18215)
  photos, latents = inputs(pair.config, sides)

  torch_photos = hf_compare.channels_first(photos).requires_grad_()
  torch_latents = hf_compare.channels_first(latents).requires_grad_()
  posterior = pair.oracle.encode(torch_photos).latent_dist
  decoded = pair.oracle.decode(torch_latents).sample
  want = [posterior.mean, posterior.logvar, decoded]
  want = [x.permute(0, 2, 3, 1) for x in want]
  weights = [hf_compare.cotangent(x.shape, i) for i, x in enumerate(want)]
  sum(
    (x * torch.from_numpy(weight)).sum()
    for x, weight in zip(want, weights, strict=True)
  ).backward()

  def loss(params, photos, latents):
    def apply(x, method):
      return vae.VAE(pair.config).apply({"params": params}, x, method=method)

    got = *apply(photos, "encode"), apply(latents, "decode")
    return sum(map(jnp.vdot, got, weights)), got

  grads, got = jax.jit(
    jax.grad(loss, (0, 1, 2), has_aux=True), compiler_options=hf_compare.FAST
  )(pair.params, photos, latents)
  for ours, theirs in zip(got, want, strict=True):
    hf_compare.assert_outputs_equal(ours, theirs.detach().numpy())
  hf_compare.assert_gradients_equal(grads[0], hf_compare.gradients(pair))
  hf_compare.assert_gradients_equal(
    {"photos": grads[1], "latents": grads[2]},
    {
      "photos": hf_compare.channels_last(torch_photos.grad),
      "latents": hf_compare.channels_last(torch_latents.grad),
    },
  )


@pytest.mark.parametrize("loud", [None, "attentions"])
def test_every_epsilon_is_that_of_the_original(loud, tmp_path):
  faint = {"kernel_scale": 3e-3, "loud": loud}
  pair = hf_models.autoencoder(tmp_path, draw=faint)
  photos, latents = inputs(pair.config, (8, 8))
  with torch.no_grad():
    seen = pair.oracle.encode(hf_compare.channels_first(photos))
    decoded = pair.oracle.decode(hf_compare.channels_first(latents)).sample
  model = vae.VAE(pair.config)
  for method, x, want in (
    ("encode", photos, seen.latent_dist.mean),
    ("decode", latents, decoded),
  ):
    got = jax.jit(
      lambda p, x, method=method: model.apply(p, x, method=method),
      compiler_options=hf_compare.FAST,
    )({"params": pair.params}, x)
    got = got[0] if method == "encode" else got
    want = hf_compare.channels_last(want)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
