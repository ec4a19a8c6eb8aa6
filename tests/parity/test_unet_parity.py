"""The denoiser against diffusers' `UNet2DConditionModel`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import unet, unet_blocks

torch = pytest.importorskip("torch")
import hf_compare  # noqa: E402
import hf_models  # noqa: E402

# Name: (where it attends, differences, latents' sides, context positions,
# timesteps). Odd sides are rounded up on the way down and must come back.
CASES = {
  "as SD 1.5": ((True, False), {}, (8, 8), 5, (0, 999)),
  "as SD 2.1": (
    (True, True, False),
    {
      "block_out_channels": (8, 16, 24),
      "attention_head_dim": (1, 2, 3),
      "use_linear_projection": True,
    },
    (9, 7),
    2,
    (1, 500),
  ),
  "odd numbers": (
    (False, True, True),
    {
      "block_out_channels": (8, 16, 24),
      "attention_head_dim": (1, 4, 3),
      "in_channels": 3,
      "out_channels": 6,
      "flip_sin_to_cos": False,
      "freq_shift": 1,
    },
    (11, 13),
    7,
    (999, 1),
  ),
  "deep": (
    (False, True),
    {
      "layers_per_block": 2,
      "transformer_layers_per_block": 2,
      "use_linear_projection": True,
    },
    (4, 6),
    3,
    (500, 0),
  ),
}


def inputs(config, sides, positions):
  rng = np.random.default_rng(2)
  shape = 2, *sides, config.in_channels
  latents = rng.standard_normal(shape).astype(np.float32)
  shape = 2, positions, config.cross_attention_dim
  return latents, rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_predictions_and_all_gradients_equal_the_originals(name, tmp_path):
  attention, changes, sides, positions, timesteps = CASES[name]
  pair = hf_models.denoiser(tmp_path, attention, **changes)
  latents, context = inputs(pair.config, sides, positions)
  timesteps = np.array(timesteps, np.int32)
  weights = hf_compare.cotangent((2, *sides, pair.config.out_channels), 3)

  torch_latents = hf_compare.channels_first(latents).requires_grad_()
  torch_context = torch.from_numpy(context).requires_grad_()
  want = pair.oracle(
    torch_latents, torch.from_numpy(timesteps), torch_context
  ).sample
  (want * hf_compare.channels_first(weights)).sum().backward()

  def loss(params, latents, context):
    got = unet.UNet(pair.config).apply(
      {"params": params}, latents, timesteps, context
    )
    return jnp.vdot(got, weights), got

  grads, got = jax.jit(
    jax.grad(loss, (0, 1, 2), has_aux=True), compiler_options=hf_compare.FAST
  )(pair.params, latents, context)
  hf_compare.assert_outputs_equal(got, hf_compare.channels_last(want))
  hf_compare.assert_gradients_equal(grads[0], hf_compare.gradients(pair))
  hf_compare.assert_gradients_equal(
    {"latents": grads[1], "context": grads[2]},
    {
      "latents": hf_compare.channels_last(torch_latents.grad),
      "context": torch_context.grad.numpy(),
    },
  )


@pytest.mark.parametrize("loud", [None, "transformer_blocks"])
def test_every_epsilon_is_that_of_the_original(loud, tmp_path):
  faint = {"kernel_scale": 3e-3, "loud": loud}
  pair = hf_models.denoiser(tmp_path, draw=faint)
  latents, context = inputs(pair.config, (4, 4), 3)
  timesteps = np.array([10, 400], np.int32)
  with torch.no_grad():
    want = pair.oracle(
      hf_compare.channels_first(latents),
      torch.from_numpy(timesteps),
      torch.from_numpy(context),
    ).sample
  got = jax.jit(
    unet.UNet(pair.config).apply, compiler_options=hf_compare.FAST
  )({"params": pair.params}, latents, timesteps, context)
  want = hf_compare.channels_last(want)
  np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_the_gate_is_the_exact_gelu_of_the_original():
  activations = pytest.importorskip("diffusers.models.activations")
  oracle = hf_models.randomise(activations.GEGLU(6, 8), seed=5)
  x = np.random.default_rng(6).standard_normal((40, 6)).astype(np.float32)
  params = {
    "proj": {
      "kernel": oracle.proj.weight.detach().numpy().T,
      "bias": oracle.proj.bias.detach().numpy(),
    }
  }
  got = unet_blocks.GEGLU(8).apply({"params": params}, x)
  want = oracle(torch.from_numpy(x)).detach().numpy()
  np.testing.assert_allclose(got, want, atol=1e-5)
