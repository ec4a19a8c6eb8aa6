"""The autoencoder of `hf_models` without its config, as some tests want it."""

from hf_models import abstract, randomise

from photochat_jax.checkpoints import tables, vae
from photochat_jax.models.vae import VAEConfig

__all__ = ["conv_params", "randomise"]


def conv_params(state):
  """diffusers' `AutoencoderKL`: tensors by name -> params of `VAE`."""
  start = "encoder.down_blocks."
  parts = [key.removeprefix(start).split(".") for key in state if start in key]
  levels = 1 + max(int(number) for number, *_ in parts)
  layers = 1 + max(int(p[2]) for p in parts if p[1] == "resnets")
  config = VAEConfig(
    in_channels=state["encoder.conv_in.weight"].shape[1],
    out_channels=state["decoder.conv_out.weight"].shape[0],
    latent_channels=state["decoder.conv_in.weight"].shape[1],
    block_out_channels=tuple(
      state[f"{start}{level}.resnets.0.conv1.weight"].shape[0]
      for level in range(levels)
    ),
    layers_per_block=layers,
    norm_num_groups=1,  # No shape tells it.
  )
  arrays = {key: value.detach().numpy() for key, value in state.items()}
  return tables.read(vae.table(), abstract(config), arrays)
