"""Stable Diffusion's UNet: diffusers' `UNet2DConditionModel` and ours."""

from collections.abc import Mapping
from typing import Any

from photochat_jax.checkpoints import settings as settings_lib
from photochat_jax.checkpoints import tables
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.models.unet import UNetConfig

PART = "the UNet"
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
_FIXED = {
  "center_input_sample": (False,),
  "mid_block_type": ("UNetMidBlock2DCrossAttn",),
  "only_cross_attention": (False,),
  "downsample_padding": (1,),
  "mid_block_scale_factor": (1,),
  "dropout": (0.0,),
  "act_fn": ("silu",),
  "norm_eps": (1e-5,),
  "reverse_transformer_layers_per_block": (None,),
  "encoder_hid_dim": (None,),
  "encoder_hid_dim_type": (None,),
  "dual_cross_attention": (False,),
  "class_embed_type": (None,),
  "addition_embed_type": (None,),
  "num_class_embeds": (None,),
  # Attention's softmax is float32 here in any case.
  "upcast_attention": (False, True, None),
  "resnet_time_scale_shift": ("default",),
  "resnet_skip_time_act": (False,),
  "resnet_out_scale_factor": (1.0,),
  "time_embedding_type": ("positional",),
  "time_embedding_dim": (None,),
  "time_embedding_act_fn": (None,),
  "timestep_post_act": (None,),
  "time_cond_proj_dim": (None,),
  "conv_in_kernel": (3,),
  "conv_out_kernel": (3,),
  "projection_class_embeddings_input_dim": (None,),
  "attention_type": ("default",),
  "class_embeddings_concat": (False,),
  "mid_block_only_cross_attention": (None,),
  "cross_attention_norm": (None,),
}
# The defaults of diffusers' class.
_FIELDS = {
  "sample_size": settings_lib.REQUIRED,
  "in_channels": 4,
  "out_channels": 4,
  "block_out_channels": (320, 640, 1280, 1280),
  "layers_per_block": 2,
  "cross_attention_dim": 1280,
  "norm_num_groups": 32,
  "use_linear_projection": False,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "transformer_layers_per_block": 1,
}


def read_config(settings: Mapping[str, Any]) -> UNetConfig:
  """The sizes in `unet/config.json`.

  Raises:
    WeightsError: it is of another architecture, or a field is wrong.
  """
  settings_lib.check_kind(
    settings, "_class_name", ("UNet2DConditionModel",), PART
  )
  settings_lib.check_fixed(settings, _FIXED, PART)
  numbers = settings_lib.take(settings, _FIELDS, PART)
  down = _attention(settings, "down_block_types", _DOWN)
  up = _attention(settings, "up_block_types", _UP)
  if down != up[::-1]:
    raise WeightsError(
      f"The config of {PART} attends in other blocks on the way up than on "
      "the way down, which is not implemented; take another checkpoint."
    )
  # diffusers calls the number of heads the width of one; where the right name
  # is there it counts.
  name = "num_attention_heads"
  if settings.get(name) is None:
    name = "attention_head_dim"
  several = isinstance(settings.get(name), list)
  heads = settings_lib.take(settings, {name: (8,) if several else 8}, PART)
  config = settings_lib.build(
    UNetConfig, PART, attention=down, num_attention_heads=heads[name], **numbers
  )
  halves = 2 ** (len(down) - 1)
  if config.sample_size % halves:
    raise WeightsError(
      f"The config of {PART} has sample_size={config.sample_size}; it must be "
      f"a multiple of {halves} to be halved {len(down) - 1} times."
    )
  return config


def _attention(
  settings: Mapping[str, Any], name: str, kinds: Mapping[str, bool]
) -> tuple[bool, ...]:
  blocks = settings.get(name)
  if (
    not isinstance(blocks, list | tuple)
    or not blocks
    or any(block not in list(kinds) for block in blocks)
  ):
    raise WeightsError(
      f"The config of {PART} has {name}={settings_lib.shown(blocks)}; take a "
      f"checkpoint with a list of {' and '.join(kinds)} alone."
    )
  return tuple(kinds[block] for block in blocks)


def write_config(config: UNetConfig) -> dict[str, Any]:
  """A `unet/config.json` which diffusers opens."""
  down = {has: name for name, has in _DOWN.items()}
  up = {has: name for name, has in _UP.items()}
  numbers = {name: getattr(config, name) for name in _FIELDS}
  heads = config.num_attention_heads
  return {
    "_class_name": "UNet2DConditionModel",
    **numbers,
    "block_out_channels": list(config.block_out_channels),
    "attention_head_dim": heads if isinstance(heads, int) else list(heads),
    "down_block_types": [down[has] for has in config.attention],
    "up_block_types": [up[has] for has in config.attention[::-1]],
  }


def table(config: UNetConfig) -> tables.Table:
  """The table of `models.unet.UNet`."""
  kernels = (
    (r".*/conv_shortcut", tables.POINTWISE),
    (
      r".*/proj_(in|out)",
      tables.DENSE if config.use_linear_projection else tables.POINTWISE,
    ),
    (r"conv_(in|out)|.*/conv\d?", tables.CONV),
    (r".*/(to_\w+|time_emb_proj|proj|net_2|linear_\d)", tables.DENSE),
  )
  return tables.Table(name=PART, rows=tables.module_rows(kernels))
