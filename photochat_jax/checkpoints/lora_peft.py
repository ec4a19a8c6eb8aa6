"""The language model's LoRA as peft's folder.

`adapter_config.json` says how strong it is, `adapter_model.safetensors` has
the matrices. Parameters that the adapter replaces as a whole are there too:
the paper's code trains both tables so, by `modules_to_save`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from photochat_jax.checkpoints import (
  files,
  llama,
  lora_layers,
  lora_settings,
  tables,
)
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.models import lora
from photochat_jax.models.llama import LlamaConfig
from photochat_jax.ops import partition

TABLES = ("embed_tokens", "lm_head")
"""What `modules_to_save` calls the two tables."""

_CONFIG, _STEM = "adapter_config.json", "adapter_model"
_PREFIX = "base_model.model."
_TABLE_KEYS = ("model.embed_tokens.weight", "lm_head.weight")


def read(
  config: LlamaConfig,
  params: Mapping[str, Any],
  folder: epath.PathLike,
  fresh: Sequence[int] = (),
  dtype: Any = None,
) -> dict[str, Any]:
  """Puts an adapter into a language model's parameters.

  Args:
    config: of the language model.
    params: its parameters; LoRA that is there already is dropped. Abstract
      ones do, where the adapter replaces nothing.
    folder: of the adapter, or a hub id.
    fresh: ids whose rows the adapter did not train, see `llama.table`; rows
      that its tables lack become the mean of those that it did train as well.
    dtype: of A and B; None keeps the file's. Parameters that are replaced
      keep theirs.

  Returns:
    The parameters and the adapter's, which are numpy arrays.

  Raises:
    WeightsError: the folder is damaged, holds a variant of LoRA that is not
      implemented, or does not fit the model.
  """
  folder = files.find_folder(folder, (_CONFIG, f"{_STEM}.safetensors"))
  settings = lora_settings.read(files.read_json(folder / _CONFIG))
  tensors = files.Tensors(folder, _STEM)
  faults = lora_layers.Faults(f"the adapter in {folder}")
  params = lora.strip(params)
  table = llama.table(config, _rows(tensors), fresh)
  wanted = tables.entries(table, params)
  modules = lora_layers.dense_modules(wanted)

  found, whole = {}, {}
  for name in tensors:
    module, _, kind = name.removeprefix(_PREFIX).rpartition(".lora_")
    kind = {"A.weight": "down", "B.weight": "up"}.get(kind)
    module = table.canonical(f"{module}.weight").removesuffix(".weight")
    # A table with LoRA is saved as a whole as well, under this name.
    key = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
    key = table.canonical(key)
    if kind and module in modules:
      found.setdefault(module, {})[kind] = name
    elif key in wanted or key in _TABLE_KEYS:
      whole[key] = tensors[name]
    else:
      faults.extra.append(name)
  if not tensors:
    faults.told.append("there are none")
  lora_layers.expect(modules, settings, found, faults)
  faults.missing += [
    key
    for key in wanted
    if settings.saves(key.removesuffix(".weight")) and key not in whole
  ]
  faults.misshapen += [
    (tensor.name, tensor.shape, wanted[key].shape)
    for key, tensor in whole.items()
    if key in wanted and tensor.shape != wanted[key].shape
  ]
  pairs = lora_layers.pair(found, tensors, modules, faults)
  factors = lora_layers.scaled(pairs, settings, faults)
  faults.check()
  if config.tie_word_embeddings:
    _check_tied(whole, faults.name)
    whole.pop("lm_head.weight", None)
  params = lora_layers.replace(params, whole, wanted)
  return lora_layers.insert(params, modules, factors, dtype)


def _rows(tensors: Mapping[str, Any]) -> int | None:
  """Tokens in the adapter's tables, None if it has nothing to do with them."""
  for name, tensor in tensors.items():
    key = name.replace(".base_layer.", ".")
    ends = ("embed_tokens.weight", "lm_head.weight", "lm_head.lora_B.weight")
    if key.endswith(ends) and tensor.shape:
      return tensor.shape[0]
  return None


def _check_tied(whole: Mapping[str, Any], name: str) -> None:
  """Refuses two tables where there is one.

  Without ensure_weight_tying peft trains a copy of a tied table, and leaves
  the other where it was.
  """
  both = [whole[key] for key in _TABLE_KEYS if key in whole]
  if not both:
    return
  if len(both) < 2 or not np.array_equal(*map(np.asarray, both)):
    raise WeightsError(
      f"{name[0].upper()}{name[1:]} trained embed_tokens and lm_head apart, "
      "and the model ties them; take a base model that is saved with "
      "tie_word_embeddings=false, or train with peft's ensure_weight_tying."
    )


def write(
  config: LlamaConfig,
  params: Mapping[str, Any],
  folder: epath.PathLike,
  modules_to_save: Sequence[str] = (),
  vocab_size: int | None = None,
) -> None:
  """Writes a language model's LoRA so that peft opens it.

  `peft.PeftModel.from_pretrained(model, folder)`, where the model has as many
  rows as are written of its tables, if they are.

  Args:
    config: of the language model.
    params: its parameters.
    folder: a new one.
    modules_to_save: ends of the names of modules that were trained as a
      whole and that the base model has not got, for example `TABLES`; of tied
      tables both are written.
    vocab_size: rows of the tables, as for `pretrained.write_llm`.

  Raises:
    WeightsError: there is no LoRA, or the folder already holds weights.
  """
  table = llama.table(config, vocab_size)
  factors = dict(lora_layers.extract(params, table))
  sizes = lora_layers.sizes(factors, "language model")
  tensors = lora_layers.tensors(factors, _PREFIX)

  params = lora.strip(params)
  wanted = tables.entries(table, params)
  whole = [
    entry
    for key, entry in wanted.items()
    if lora_settings.saves(modules_to_save, key.removesuffix(".weight"))
  ]
  tied = config.tie_word_embeddings
  tied = tied and any(entry.key in _TABLE_KEYS for entry in whole)
  leaves = partition.flatten(params)
  chosen = {entry.path: leaves[entry.path] for entry in whole}
  keys = {entry.key for entry in whole}
  for key, array in tables.write(table, partition.unflatten(chosen)):
    module = key.removesuffix(".weight")
    if module in factors:
      # peft refuses to save what has LoRA, but for what lies under that.
      tensors[f"{_PREFIX}{module}.base_layer.weight"] = array
    elif key in keys:
      tensors[_PREFIX + key] = array
    if tied and key in _TABLE_KEYS:
      tensors[f"{_PREFIX}lm_head.weight"] = array

  content = lora_settings.write(
    sizes,
    _targets(factors, wanted),
    [name for name in modules_to_save if name not in factors],
  )
  content["task_type"] = "CAUSAL_LM"
  if tied:
    content["ensure_weight_tying"] = True
  lora_layers.save(folder, _STEM, tensors)
  files.write_json(epath.Path(folder) / _CONFIG, content)


def _targets(
  factors: Mapping[str, Any], wanted: Mapping[str, tables.Entry]
) -> list[str]:
  """The last parts of the modules' names, if they say it all."""
  short = dict.fromkeys(module.rpartition(".")[2] for module in factors)
  named = [
    module
    for module in lora_layers.dense_modules(wanted)
    if module.rpartition(".")[2] in short
  ]
  return list(short if set(named) == set(factors) else factors)
