"""CLIP with both towers: HF's `CLIPModel` and ours."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from photochat_jax.checkpoints import clip_text, tables
from photochat_jax.checkpoints import settings as settings_lib
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.models.clip import CLIPConfig, CLIPVisionConfig

PART = "CLIP"
# The defaults of transformers' CLIPVisionConfig.
_VISION = {
  "image_size": 224,
  "patch_size": 32,
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}


def read_config(settings: Mapping[str, Any], **tokens: Any) -> CLIPConfig:
  """The sizes in a `config.json` of `CLIPModel`.

  Args:
    settings: the parsed file.
    **tokens: ids of the text tower; those in the file are not read.

  Raises:
    WeightsError: it is of another architecture, or a field is wrong.
  """
  settings_lib.check_kind(settings, "model_type", ("clip",), PART)
  vision, text = (
    settings.get(f"{tower}_config") or {} for tower in ("vision", "text")
  )
  if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
    raise WeightsError(
      f"The config of {PART} must have vision_config and text_config as JSON "
      "objects; fetch it again."
    )
  numbers = settings_lib.take(vision, _VISION, PART)
  width = settings_lib.take(settings, {"projection_dim": 512}, PART)
  kind = {"model_type": "clip_text_model"}
  return CLIPConfig(
    vision=settings_lib.build(CLIPVisionConfig, PART, **numbers),
    text=clip_text.read_config({**text, **kind}, **tokens),
    **width,
  )


def table(config: CLIPConfig) -> tables.Table:
  """The table of `models.clip.CLIP`."""
  first = "vision_model.embeddings"
  text = clip_text.table(config.text)
  return tables.Table(
    name=PART,
    rows=(
      *(
        dataclasses.replace(row, path=f"text_model/{row.path}")
        for row in text.rows
      ),
      tables.Row(
        r"(visual|text)_projection/kernel",
        r"\1_projection.weight",
        tables.DENSE,
      ),
      tables.Row("vision_model/class_embedding", f"{first}.class_embedding"),
      tables.Row(
        "vision_model/position_embedding", f"{first}.position_embedding.weight"
      ),
      tables.Row(
        "vision_model/patch_embedding/kernel",
        f"{first}.patch_embedding.weight",
        tables.patches(config.vision.patch_size),
      ),
      tables.Row(
        r"vision_model/(pre_layrnorm|post_layernorm)/scale",
        r"vision_model.\1.weight",
      ),
      tables.Row(
        r"vision_model/(pre_layrnorm|post_layernorm)/bias",
        r"vision_model.\1.bias",
      ),
      *tables.vision_layers(range(config.vision.num_hidden_layers)),
    ),
    ignored=(
      r"(vision|text)_model\.embeddings\.position_ids",  # 0, 1, 2, ...
      "logit_scale",  # Of the training.
    ),
  )
