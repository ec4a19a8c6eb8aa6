"""BLIP-2 checkpoints: the eyes of any of HF's `Blip2*` models, and ours.

The vision model, the Q-Former and its query tokens are read. The checkpoint's
own language model (OPT, T5) and the projection into it are not: our projection
is new. Only where the checkpoint's language model is ours, as in one that
`write_config` described, does the projection count.
"""

from collections.abc import Mapping
from typing import Any

from photochat_jax.checkpoints import settings as settings_lib
from photochat_jax.checkpoints import tables
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.models.qformer import QFormerConfig
from photochat_jax.models.vit import ViTConfig

PART = "the image perceptron"
# The defaults of transformers' Blip2VisionConfig and Blip2QFormerConfig.
_VISION = {
  "image_size": 224,
  "patch_size": 14,
  "hidden_size": 1408,
  "intermediate_size": 6144,
  "num_hidden_layers": 39,
  "num_attention_heads": 16,
  "qkv_bias": True,
  "layer_norm_eps": 1e-6,
}
_QFORMER = {
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
  "cross_attention_frequency": 2,
  "encoder_hidden_size": 1408,
  "layer_norm_eps": 1e-12,
}


def read_config(
  settings: Mapping[str, Any],
) -> tuple[ViTConfig, QFormerConfig]:
  """The sizes in a `config.json` of any `Blip2*` model.

  Raises:
    WeightsError: it is of another architecture, or a field is wrong.
  """
  settings_lib.check_kind(settings, "model_type", ("blip-2",), PART)
  parts = []
  for name in ("vision_config", "qformer_config"):
    part = settings.get(name) or {}
    if not isinstance(part, Mapping):
      raise WeightsError(
        f"The config of {PART} has {name}={settings_lib.shown(part)}; it must "
        "be a JSON object."
      )
    settings_lib.check_fixed(part, {"hidden_act": ("gelu",)}, PART)
    parts.append(part)
  vision, qformer = parts
  numbers = settings_lib.take(qformer, _QFORMER, PART)
  numbers |= settings_lib.take(settings, {"num_query_tokens": 32}, PART)
  seen = settings_lib.take(vision, _VISION, PART)
  # Whatever the file says, as in transformers' Blip2Config.
  numbers["encoder_hidden_size"] = seen["hidden_size"]
  return (
    settings_lib.build(ViTConfig, PART, **seen),
    settings_lib.build(QFormerConfig, PART, **numbers),
  )


def write_config(
  vision: ViTConfig,
  qformer: QFormerConfig,
  language: Mapping[str, Any],
  dtype: str = "float32",
) -> dict[str, Any]:
  """The config of a `Blip2ForConditionalGeneration` around our own Llama.

  Args:
    vision: of the vision model.
    qformer: of the Q-Former.
    language: the language model's config, from `llama.write_config`.
    dtype: of the tensors.
  """
  return {
    "architectures": ["Blip2ForConditionalGeneration"],
    "model_type": "blip-2",
    "num_query_tokens": qformer.num_query_tokens,
    "use_decoder_only_language_model": True,
    "vision_config": {
      "model_type": "blip_2_vision_model",
      "hidden_act": "gelu",
      **{name: getattr(vision, name) for name in _VISION},
    },
    "qformer_config": {
      "model_type": "blip_2_qformer",
      "hidden_act": "gelu",
      **{name: getattr(qformer, name) for name in _QFORMER},
    },
    "text_config": dict(language),
    "torch_dtype": dtype,
  }


def table(
  vision: ViTConfig, qformer: QFormerConfig, projection: bool = False
) -> tables.Table:
  """The table of `vision_model`, `qformer` and `language_projection`.

  Args:
    vision: of the vision model.
    qformer: of the Q-Former; parameters without one ignore the file's.
    projection: whether the file's `language_projection` is ours.
  """
  rows = [
    tables.Row(
      r"vision_model/(class_embedding|position_embedding)",
      r"vision_model.embeddings.\1",
    ),
    tables.Row(
      "vision_model/patch_embedding/kernel",
      "vision_model.embeddings.patch_embedding.weight",
      tables.patches(vision.patch_size),
    ),
    tables.Row(
      "vision_model/patch_embedding/bias",
      "vision_model.embeddings.patch_embedding.bias",
    ),
    tables.Row(
      r"vision_model/post_layernorm/scale", "vision_model.post_layernorm.weight"
    ),
    tables.Row(
      r"vision_model/post_layernorm/bias", "vision_model.post_layernorm.bias"
    ),
    *tables.vision_layers(range(vision.num_hidden_layers)),
    tables.Row("qformer/query_tokens", "query_tokens"),
    tables.Row("qformer/layernorm/scale", "qformer.layernorm.weight"),
    tables.Row("qformer/layernorm/bias", "qformer.layernorm.bias"),
    tables.Row(
      "language_projection/kernel", "language_projection.weight", tables.DENSE
    ),
    tables.Row("language_projection/bias", "language_projection.bias"),
  ]
  every = qformer.cross_attention_frequency
  for place in range(every):
    layers = range(place, qformer.num_hidden_layers, every)
    for outer, theirs in (
      (r"((?:cross)?attention)/(attention|output)/(\w+)", r"\1.\2.\3"),
      (r"((?:intermediate|output)_query)/(\w+)", r"\1.\2"),
    ):
      path = rf"qformer/layers/layer_{place}/{outer}"
      key = "qformer.encoder.layer.{layer}." + theirs
      rows += [
        tables.Row(f"{path}/kernel", f"{key}.weight", tables.DENSE, layers),
        tables.Row(f"{path}/scale", f"{key}.weight", layers=layers),
        tables.Row(f"{path}/bias", f"{key}.bias", layers=layers),
      ]
  ignored = [
    r"language_model\..*",
    # The Q-Former's way with text, and the heads of retrieval models.
    r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\..*",
    r"(qformer\.)?embeddings\..*",
    r"(vision_projection|text_projection|itm_head)\..*",
  ]
  if not projection:
    ignored.append(r"language_projection\..*")
  return tables.Table(name=PART, rows=tuple(rows), ignored=tuple(ignored))


def without_qformer(found: tables.Table) -> tables.Table:
  """The table for `perceiver='linear'`: the file's Q-Former is ignored."""
  return tables.Table(
    found.name,
    found.rows,
    found.aliases,
    (*found.ignored, r"qformer\..*", "query_tokens"),
  )
