"""The vision model of `hf_models` alone, as some tests want it."""

import hf_compare
from hf_models import abstract, randomise

from photochat_jax.checkpoints import blip2, tables
from photochat_jax.models.qformer import QFormerConfig
from photochat_jax.models.vit import ViTConfig

__all__ = ["randomise", "vit_params"]


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
