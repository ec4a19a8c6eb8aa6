"""CLIP text encoders: HF's `CLIPTextModel` and ours."""

from collections.abc import Mapping
from typing import Any

from photochat_jax.checkpoints import settings as settings_lib
from photochat_jax.checkpoints import tables
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.models.clip_text import CLIPTextConfig

PART = "the text encoder"
# The defaults of transformers' CLIPTextConfig.
_FIELDS = {
  "vocab_size": 49408,
  "hidden_size": 512,
  "intermediate_size": 2048,
  "num_hidden_layers": 12,
  "num_attention_heads": 8,
  "max_position_embeddings": 77,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}


def read_config(
  settings: Mapping[str, Any], **overrides: Any
) -> CLIPTextConfig:
  """The sizes in `text_encoder/config.json`.

  The token ids there are not read: Stable Diffusion's files carry wrong ones
  (bos 0, eos 2), which the original never looks at. They are the tokenizer's.

  Args:
    settings: the parsed file.
    **overrides: fields of ours: token ids, dtype.

  Raises:
    WeightsError: it is of another architecture, or a field is wrong.
  """
  settings_lib.check_kind(settings, "model_type", ("clip_text_model",), PART)
  numbers = settings_lib.take(settings, _FIELDS, PART)
  if numbers["max_position_embeddings"] < 3:
    raise WeightsError(
      f"The config of {PART} has max_position_embeddings="
      f"{numbers['max_position_embeddings']}; it must be 3 or more, for BOS, a "
      "piece of text and EOS."
    )
  return settings_lib.build(CLIPTextConfig, PART, **numbers | overrides)


def write_config(
  config: CLIPTextConfig, dtype: str = "float32"
) -> dict[str, Any]:
  """A `text_encoder/config.json` which transformers opens."""
  return {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    **{name: getattr(config, name) for name in _FIELDS},
    "bos_token_id": config.bos_token_id,
    "eos_token_id": config.eos_token_id,
    "pad_token_id": config.pad_token_id,
    "projection_dim": config.hidden_size,
    "torch_dtype": dtype,
  }


def table(config: CLIPTextConfig) -> tables.Table:
  """The table of `models.clip_text.CLIPText`."""
  layers = range(config.num_hidden_layers)
  start = r"text_model.encoder.layers.{layer}.\1."
  return tables.Table(
    name=PART,
    rows=(
      tables.Row(
        r"(token|position)_embedding/embedding",
        r"text_model.embeddings.\1_embedding.weight",
      ),
      tables.Row(
        r"final_layer_norm/scale", "text_model.final_layer_norm.weight"
      ),
      tables.Row(r"final_layer_norm/bias", "text_model.final_layer_norm.bias"),
      tables.Row(
        r"layers/(layer_norm\d)/scale", f"{start}weight", layers=layers
      ),
      tables.Row(
        r"layers/(self_attn|mlp)/(\w+)/kernel",
        rf"{start}\2.weight",
        tables.DENSE,
        layers,
      ),
      tables.Row(r"layers/(layer_norm\d)/bias", f"{start}bias", layers=layers),
      tables.Row(
        r"layers/(self_attn|mlp)/(\w+)/bias", rf"{start}\2.bias", layers=layers
      ),
    ),
    # transformers 5 saves it without the prefix that files of the hub have.
    aliases=((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),),
    ignored=(
      r"text_model\.embeddings\.position_ids",  # 0, 1, 2, ...
      r"text_projection\.weight",  # Of CLIP's own task.
    ),
  )
