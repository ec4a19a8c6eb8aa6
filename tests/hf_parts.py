"""Single originals as parameters of ours, for tests beside the modules."""

import hf_compare
from hf_models import abstract

from photochat_jax.checkpoints import blip2, tables, vae
from photochat_jax.models.qformer import QFormerConfig
from photochat_jax.models.vae import VAEConfig
from photochat_jax.models.vit import ViTConfig


def vit_params(model, grad=False):
  """`Blip2VisionModel`, or its gradients, as params of `models.vit.ViT`."""
  names = (
    "image_size",
    "patch_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "qkv_bias",
  )
  config = ViTConfig(**{name: getattr(model.config, name) for name in names})
  arrays = hf_compare.arrays(model, grad)
  return tables.read(
    blip2.table(config, QFormerConfig()),
    {"vision_model": abstract(config)},
    {f"vision_model.{key}": array for key, array in arrays.items()},
  )["vision_model"]


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
