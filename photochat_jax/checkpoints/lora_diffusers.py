"""The UNet's LoRA as diffusers' file, or as that of kohya's trainer.

One safetensors file. A module's matrices have been called in many ways; all of
these are read, with or without `unet.` before them:

* `attn1.to_q.lora_A.weight`: diffusers since it uses peft;
* `attn1.to_q.lora.down.weight`, `attn1.processor.to_q_lora.down.weight` (with
  `to_out_lora` for `to_out.0`): before that;
* `lora_unet_..._attn1_to_q.lora_down.weight`: kohya and many others.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from photochat_jax.checkpoints import (
  files,
  lora_layers,
  lora_settings,
  tables,
  unet,
)
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.models import lora
from photochat_jax.models.unet import UNetConfig

_STEM = "pytorch_lora_weights"
_METADATA = "lora_adapter_metadata"
_PREFIX = "unet."
_TEXT = ("text_encoder", "lora_te")
_KOHYA = "lora_unet_"
_NAME = re.compile(
  r"(.+?)(?:\.lora_(A|B|down|up)"
  r"|(?:[._]lora|\.lora_linear_layer)\.(down|up))\.weight"
  r"|(.+?)(?:[._]lora)?\.(alpha)"
)
_KINDS = {"A": "down", "B": "up"}


def read(
  config: UNetConfig,
  params: Mapping[str, Any],
  path: epath.PathLike,
  skip_text: bool = False,
  dtype: Any = None,
) -> dict[str, Any]:
  """Puts an adapter into a UNet's parameters.

  How strong it is say `.alpha` tensors, or diffusers' metadata; without
  either the matrices' product counts as it is, as in diffusers.

  Args:
    config: of the UNet.
    params: its parameters, or their shapes; LoRA that is there already is
      dropped.
    path: a safetensors file, a folder with one, or a hub id.
    skip_text: leave out what the file holds for a text encoder; otherwise
      that is an error.
    dtype: of A and B; None keeps the file's.

  Returns:
    The parameters and the adapter's, which are numpy arrays.

  Raises:
    WeightsError: the file is damaged or does not fit the model.
  """
  path = _find(epath.Path(path))
  tensors, metadata = files.read_file(path)
  settings = _settings(metadata, path)
  faults = lora_layers.Faults(f"the adapter {path}")
  params = lora.strip(params)
  wanted = tables.entries(unet.table(config), params)
  modules = lora_layers.dense_modules(wanted)
  names = _spellings(wanted)

  found, reasons = {}, {}
  for name in tensors:
    module, kind = _parse(name, names)
    if module in modules:
      found.setdefault(module, {})[kind] = name
    elif name.startswith(_TEXT):
      if not skip_text:
        faults.extra.append(name)
        reasons["those of a text encoder can be left out by skip_text"] = None
    else:
      faults.extra.append(name)
      if module is not None:
        reasons["3x3 convolutions take no LoRA here"] = None
  faults.told += reasons
  if not found:
    faults.told.append("there is none for a dense layer of the UNet")
  alphas = {
    module: tensors[kinds["alpha"]]
    for module, kinds in found.items()
    if "alpha" in kinds
  }
  if alphas and settings:
    faults.told.append(f"its strength is in alphas and in {_METADATA}")
  if settings:
    lora_layers.expect(modules, settings, found, faults)
  pairs = lora_layers.pair(found, tensors, modules, faults)
  if alphas:
    factors = _with_alphas(pairs, alphas, faults)
  else:
    factors = lora_layers.scaled(pairs, settings, faults)
  faults.check()
  return lora_layers.insert(params, modules, factors, dtype)


def _find(path: epath.Path) -> epath.Path:
  """The file, also of a folder with one."""
  if path.exists() and not path.is_dir() or path.suffix == ".safetensors":
    return path
  path = files.find_folder(str(path), ("*.safetensors",))
  found = sorted(path.glob("*.safetensors"))
  named = path / f"{_STEM}.safetensors"
  if named in found or len(found) != 1:
    return path / files.Tensors(path, _STEM).files[0]
  return found[0]


def _settings(
  metadata: Mapping[str, str], path: epath.Path
) -> lora_settings.Settings | None:
  """What diffusers says beside the tensors, if it does."""
  if _METADATA not in metadata:
    return None
  try:
    content = json.loads(metadata[_METADATA])
  except ValueError as error:
    raise WeightsError(
      f"The metadata {_METADATA} of {path} is not JSON ({error}); take "
      "another save of the adapter."
    ) from error
  if not isinstance(content, dict):
    content = {}
  # A pipeline's has the parts' names before each field, a UNet's own has not.
  content = {
    name.removeprefix(_PREFIX): value
    for name, value in content.items()
    if not name.startswith(_TEXT)
  }
  return lora_settings.read(content, f"the adapter {path}")


def _spellings(wanted: Mapping[str, tables.Entry]) -> dict[str, str]:
  """The modules by every name that they have had."""
  names = {}
  for key in wanted:
    module = key.removesuffix(".weight")
    names[_KOHYA + module.replace(".", "_")] = module
    for start in ("", _PREFIX):
      names[start + module] = module
      # It was no list in the processors that diffusers had before peft.
      names[start + module.removesuffix(".0")] = module
  return names


def _parse(name: str, names: Mapping[str, str]) -> tuple[str | None, str]:
  """A tensor's module and what it is of it; None for an unknown module."""
  match = _NAME.fullmatch(name)
  if match is None:
    return None, ""
  module, kind = (group for group in match.groups() if group)
  module = module.replace(".processor.", ".")
  return names.get(module), _KINDS.get(kind, kind)


def _with_alphas(pairs, alphas, faults) -> dict[str, lora_layers.Factors]:
  """Each pair with its alpha over its rank."""
  factors = {}
  for module, (down, up) in pairs.items():
    alpha = alphas.get(module)
    if alpha is None:
      faults.missing.append(f"{module}.alpha")
    elif alpha.shape not in ((), (1,)):
      faults.misshapen.append((alpha.name, alpha.shape, ()))
    else:
      value = float(lora_layers.values(alpha).reshape(()))
      factors[module] = lora_layers.Factors(down, up, value / down.shape[0])
  return factors


def write(
  config: UNetConfig, params: Mapping[str, Any], folder: epath.PathLike
) -> None:
  """Writes a UNet's LoRA so that diffusers opens it.

  By a pipeline's `load_lora_weights(folder)`, or by a UNet's
  `load_lora_adapter(folder, prefix="unet", use_safetensors=True)`. How strong
  it is stands in the metadata, which diffusers reads since 0.34, and a UNet's
  method only with `use_safetensors`.

  Args:
    config: of the UNet.
    params: its parameters.
    folder: a new one.

  Raises:
    WeightsError: there is no LoRA, or the folder already holds weights.
  """
  factors = dict(lora_layers.extract(params, unet.table(config)))
  content = lora_settings.write(
    lora_layers.sizes(factors, "UNet"), list(factors)
  )
  content = {_PREFIX + name: value for name, value in content.items()}
  metadata = {_METADATA: json.dumps(content, indent=2, sort_keys=True)}
  lora_layers.save(
    folder, _STEM, lora_layers.tensors(factors, _PREFIX), metadata
  )
