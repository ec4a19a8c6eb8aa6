"""Stable Diffusion's autoencoder: diffusers' `AutoencoderKL` and ours."""

from collections.abc import Mapping
from typing import Any

from photochat_jax.checkpoints import settings as settings_lib
from photochat_jax.checkpoints import tables
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.models.vae import VAEConfig

PART = "the autoencoder"
_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
_FIXED = {
  "act_fn": ("silu",),
  "shift_factor": (None,),
  "latents_mean": (None,),
  "latents_std": (None,),
  "use_quant_conv": (True,),
  "use_post_quant_conv": (True,),
  "mid_block_add_attention": (True,),
}
# The defaults of diffusers' class.
_FIELDS = {
  "in_channels": 3,
  "out_channels": 3,
  "latent_channels": 4,
  "block_out_channels": (64,),
  "layers_per_block": 1,
  "norm_num_groups": 32,
  "scaling_factor": 0.18215,
}


def read_config(settings: Mapping[str, Any]) -> VAEConfig:
  """The sizes in `vae/config.json`.

  Raises:
    WeightsError: it is of another architecture, or a field is wrong.
  """
  settings_lib.check_kind(settings, "_class_name", ("AutoencoderKL",), PART)
  settings_lib.check_fixed(settings, _FIXED, PART)
  numbers = settings_lib.take(settings, _FIELDS, PART)
  levels = len(numbers["block_out_channels"])
  for name, kind in (("down_block_types", _DOWN), ("up_block_types", _UP)):
    blocks = settings.get(name)
    blocks = list(blocks) if isinstance(blocks, tuple) else blocks
    if blocks != [kind] * levels:
      raise WeightsError(
        f"The config of {PART} has {name}={settings_lib.shown(blocks)}; it "
        f"must be a list of {kind!r}, once for each of the {levels} "
        "block_out_channels."
      )
  return settings_lib.build(VAEConfig, PART, **numbers)


def write_config(config: VAEConfig, sample_size: int) -> dict[str, Any]:
  """A `vae/config.json` which diffusers opens.

  Args:
    config: ours.
    sample_size: side of a photo in pixels.
  """
  levels = len(config.block_out_channels)
  return {
    "_class_name": "AutoencoderKL",
    **{name: getattr(config, name) for name in _FIELDS},
    "block_out_channels": list(config.block_out_channels),
    "down_block_types": [_DOWN] * levels,
    "up_block_types": [_UP] * levels,
    "sample_size": sample_size,
  }


def table() -> tables.Table:
  """The table of `models.vae.VAE`."""
  kernels = (
    (r".*/conv_shortcut|(post_)?quant_conv", tables.POINTWISE),
    (r".*/conv(_in|_out|\d)?", tables.CONV),
    (r".*/to_\w+", tables.DENSE),
  )
  # Stable Diffusion's own files have the names of 2022 for the attention.
  attention = r"^(\w+\.mid_block\.attentions\.0)\."
  return tables.Table(
    name=PART,
    rows=tables.module_rows(kernels),
    aliases=(
      (rf"{attention}query\.", r"\1.to_q."),
      (rf"{attention}key\.", r"\1.to_k."),
      (rf"{attention}value\.", r"\1.to_v."),
      (rf"{attention}proj_attn\.", r"\1.to_out.0."),
    ),
  )
