"""Llama checkpoints: HF's `LlamaForCausalLM` and ours.

The vocabulary is the one place where shapes differ: ours is padded to a
multiple of 128, and grown by the ids that the photo marks need.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from photochat_jax.checkpoints import settings as settings_lib
from photochat_jax.checkpoints import tables
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.models.llama import LlamaConfig
from photochat_jax.ops import rope

PART = "the language model"
_FIXED = {
  "hidden_act": ("silu",),
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "partial_rotary_factor": (1.0, None),
  "quantization_config": (None,),
}
# The defaults of transformers' LlamaConfig.
_FIELDS = {
  "vocab_size": settings_lib.REQUIRED,
  "hidden_size": settings_lib.REQUIRED,
  "intermediate_size": settings_lib.REQUIRED,
  "num_hidden_layers": settings_lib.REQUIRED,
  "num_attention_heads": settings_lib.REQUIRED,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "max_position_embeddings": 2048,
}
_ROPE_TYPES = ("default", "linear", "llama3")
_ROPE_NUMBERS = {
  "factor": 1.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 2048,
}


def read_config(settings: Mapping[str, Any], **overrides: Any) -> LlamaConfig:
  """The sizes in a `config.json`.

  Args:
    settings: the parsed file, of transformers 4 (`rope_theta`,
      `rope_scaling`) or 5 (`rope_parameters`).
    **overrides: fields of ours, such as dtype.

  Raises:
    WeightsError: it is of another architecture, or a field is wrong.
  """
  settings_lib.check_kind(settings, "model_type", ("llama",), PART)
  settings_lib.check_fixed(settings, _FIXED, PART)
  numbers = settings_lib.take(settings, _FIELDS, PART)
  heads = numbers["num_attention_heads"]
  numbers |= settings_lib.take(settings, {"num_key_value_heads": heads}, PART)
  numbers["head_dim"] = None
  if settings.get("head_dim") is not None:
    numbers |= settings_lib.take(
      settings, {"head_dim": settings_lib.REQUIRED}, PART
    )
  numbers |= _read_rope(settings)
  config = settings_lib.build(LlamaConfig, PART, **numbers | overrides)
  with np.errstate(all="ignore"):
    angles = settings_lib.build(
      rope.rope_frequencies,
      PART,
      head_dim=config.size_per_head,
      theta=config.rope_theta,
      scaling=config.rope_scaling,
    )
  if not np.isfinite(angles).all():
    raise WeightsError(
      f"The config of {PART} has rope settings {dict(config.rope_scaling)} "
      "that give no angles; fetch it again."
    )
  return config


def _read_rope(settings: Mapping[str, Any]) -> dict[str, Any]:
  given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
  if not isinstance(given, Mapping):
    raise WeightsError(
      f"The config of {PART} has rope settings {settings_lib.shown(given)}; "
      "they must be a JSON object."
    )
  given = {"rope_theta": settings.get("rope_theta"), **given}
  # How transformers before 4.43 called it.
  kind = given.get("rope_type") or given.get("type") or "default"
  if kind not in _ROPE_TYPES:
    raise WeightsError(
      f"The config of {PART} has rope_type {settings_lib.shown(kind)}; take a "
      f"checkpoint where it is {' or '.join(map(repr, _ROPE_TYPES))}."
    )
  settings_lib.check_fixed(given, {"partial_rotary_factor": (1.0,)}, PART)
  theta = settings_lib.take(given, {"rope_theta": 10000.0}, PART)
  if kind == "default":
    return {**theta, "rope_scaling": None}
  if kind == "llama3":  # As in transformers.
    length = settings.get("max_position_embeddings")
    given = {"original_max_position_embeddings": length, **given}
  # What is missing, `rope_frequencies` says.
  there = {k: v for k, v in _ROPE_NUMBERS.items() if given.get(k) is not None}
  scaling = settings_lib.take(given, there, PART)
  return {**theta, "rope_scaling": {"rope_type": kind, **scaling}}


def write_config(
  config: LlamaConfig, vocab_size: int, dtype: str = "float32", **tokens: Any
) -> dict[str, Any]:
  """A `config.json` which transformers opens.

  Args:
    config: of the parameters.
    vocab_size: rows that are written, see `table`.
    dtype: of the tensors.
    **tokens: bos_token_id, eos_token_id, pad_token_id.
  """
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_hidden_layers,
    "num_attention_heads": config.num_attention_heads,
    "num_key_value_heads": config.num_key_value_heads,
    "head_dim": config.size_per_head,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": config.max_position_embeddings,
    "rms_norm_eps": config.rms_norm_eps,
    # The way of transformers 4, which 5 reads as well.
    "rope_theta": config.rope_theta,
    "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
    "tie_word_embeddings": config.tie_word_embeddings,
    "torch_dtype": dtype,
    **tokens,
  }


def table(
  config: LlamaConfig, rows: int | None = None, fresh: Sequence[int] = ()
) -> tables.Table:
  """The table of `models.llama.Llama`.

  Args:
    config: ours, with the grown vocabulary.
    rows: tokens in the file's tables; `config.vocab_size` without.
    fresh: ids whose rows are new, `[img]` and `[/img]`: on reading they, and
      all rows the file has not, become the mean of the file's other rows.

  Raises:
    WeightsError: the file has more rows than the vocabulary.
  """
  rows = config.vocab_size if rows is None else rows
  if rows > config.vocab_size:
    raise WeightsError(
      f"The language model's checkpoint has {rows} tokens and vocab_size is "
      f"{config.vocab_size}; set it to {rows} or more."
    )
  layers = range(config.num_hidden_layers)
  start = "model.layers.{layer}."
  ignored = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
  if config.tie_word_embeddings:
    ignored.append(r"lm_head\.weight")  # The embedding table again.
  return tables.Table(
    name=PART,
    rows=(
      tables.Row(
        "embed_tokens/embedding",
        "model.embed_tokens.weight",
        _vocabulary(rows, config.vocab_size, fresh),
      ),
      tables.Row(
        "lm_head/kernel",
        "lm_head.weight",
        _transposed(_vocabulary(rows, config.vocab_size, fresh)),
      ),
      tables.Row("norm/scale", "model.norm.weight"),
      tables.Row(
        r"layers/(\w+_layernorm)/scale", rf"{start}\1.weight", layers=layers
      ),
      tables.Row(
        r"layers/(self_attn|mlp)/(\w+_proj)/kernel",
        rf"{start}\1.\2.weight",
        tables.DENSE,
        layers,
      ),
    ),
    # A bare LlamaModel is saved without the prefix.
    aliases=((r"^(embed_tokens|layers|norm)\.", r"model.\1."),),
    ignored=tuple(ignored),
  )


def _vocabulary(
  rows: int, vocab_size: int, fresh: Sequence[int]
) -> tables.Transform:
  """(rows, D) there, (padded vocabulary, D) here; padding is zero."""

  def read(tensor, out):
    out[:rows] = tensor
    out[vocab_size:] = 0
    new = sorted({*fresh, *range(rows, vocab_size)})
    if new:
      known = np.ones(rows, bool)
      known[[number for number in new if number < rows]] = False
      # Summed by slices: the whole table in float64 would be large.
      total = sum(
        part[mask].sum(0, dtype=np.float64)
        for part, mask in zip(
          np.array_split(tensor, -(-rows // 4096)),
          np.array_split(known, -(-rows // 4096)),
          strict=True,
        )
      )
      out[new] = total / known.sum()

  return tables.Transform(read, lambda array: array[:rows])


def _transposed(transform: tables.Transform) -> tables.Transform:
  """The same of a kernel, whose rows are columns here."""
  return tables.Transform(
    lambda tensor, out: transform.read(tensor, out.T),
    lambda array: transform.write(array.T),
  )
