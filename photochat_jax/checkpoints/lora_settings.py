"""What peft writes beside an adapter's tensors, both ways.

peft keeps it as `adapter_config.json`; diffusers as the same JSON in the
metadata of its file. Here it says three things: how strong the adapter is in
each module, which modules have one, and which are replaced as a whole.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from photochat_jax.checkpoints import settings as settings_lib
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.models import lora

PART = "the adapter"
# Variants whose tensors mean something else, or come with more of them.
_FIXED = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "fan_in_fan_out": (False, None),
  "use_dora": (False, None),
  "lora_bias": (False, None),
  "use_qalora": (False, None),
  "layer_replication": (None, ()),
  "trainable_token_indices": (None, ()),
  "target_parameters": (None, ()),
  "alora_invocation_tokens": (None, ()),
  "use_bdlora": (None,),
  "arrow_config": (None,),
  "kasa_config": (None,),
  "monteclora_config": (None,),
  "velora_config": (None,),
}
# Other ways to begin take something out of the base model's weights, and the
# adapter is then one to what was left.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_DEFAULT_RANK, _DEFAULT_ALPHA = 8, 8


@dataclasses.dataclass(frozen=True)
class Settings:
  """A `peft.LoraConfig`, as far as it counts once training is over.

  Attributes:
    rank: of modules that `ranks` does not name.
    alpha: of modules that `alphas` does not name.
    root: divide alpha by the root of the rank (rank-stabilised LoRA,
      arXiv:2312.03732) and not by the rank.
    ranks: rank by regex of the module's name, or of its end.
    alphas: alpha, likewise.
    targets: modules that have an adapter: a regex of the whole name, ends of
      names, or None where it is not said.
    excluded: those of them that have none after all, likewise.
    layers: numbers of the layers that have adapters; None for all.
    layers_pattern: names that stand before such a number; any without.
    saved: ends of names of modules that are replaced as a whole.
  """

  rank: int
  alpha: float
  root: bool
  ranks: Mapping[str, int]
  alphas: Mapping[str, float]
  targets: str | tuple[str, ...] | None
  excluded: str | tuple[str, ...]
  layers: tuple[int, ...] | None
  layers_pattern: tuple[str, ...]
  saved: tuple[str, ...]

  def rank_of(self, module: str) -> int:
    """The rank of a module's adapter."""
    return _pattern(self.ranks, module, self.rank)

  def scale(self, module: str) -> float:
    """What the product of a module's two matrices is multiplied with."""
    rank = self.rank_of(module)
    alpha = _pattern(self.alphas, module, self.alpha)
    return alpha / (math.sqrt(rank) if self.root else rank)

  def targets_module(self, module: str) -> bool:
    """Whether a dense layer has an adapter (`check_target_module_exists`)."""
    if self.targets is None or _named(self.excluded, module):
      return False
    if self.saves(module):
      return False
    if self.targets == "all-linear":
      found = module != "lm_head"
    else:
      found = _named(self.targets, module)
    if not found or self.layers is None or isinstance(self.targets, str):
      return found
    names = "|".join(self.layers_pattern) or r"[^.]*"
    match = re.match(rf"(?:.*?\.)??(?:{names})\.(\d+)\.", module)
    return match is not None and int(match[1]) in self.layers

  def saves(self, module: str) -> bool:
    """Whether a module is replaced as a whole, or one that it is part of."""
    return saves(self.saved, module)


def saves(names: Sequence[str], module: str) -> bool:
  """Whether a module's name, or that of one it is part of, ends with one."""
  parts = module.split(".")
  return any(
    ".".join(parts[:end]).endswith(tuple(names))
    for end in range(1, len(parts) + 1)
  )


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
  """peft's `get_pattern_key`."""
  for regex, value in patterns.items():
    if re.match(rf"(.*\.)?({regex})$", module):
      return value
  return default


def _named(names: str | tuple[str, ...], module: str) -> bool:
  """Whether a regex matches a name, or a name ends with one of several."""
  if isinstance(names, str):
    return re.fullmatch(names, module) is not None
  return any(module == name or module.endswith(f".{name}") for name in names)


def read(content: Mapping[str, Any], part: str = PART) -> Settings:
  """Reads an `adapter_config.json`.

  How training went (dropout, where it began) does not count.

  Args:
    content: the parsed file.
    part: what errors call it.

  Raises:
    WeightsError: it is not LoRA, a variant that is not implemented, or
      damaged.
  """
  settings_lib.check_fixed(content, _FIXED, part)
  start = content.get("init_lora_weights", True)
  if start not in _STARTS:
    raise WeightsError(
      f"The config of {part} has init_lora_weights="
      f"{settings_lib.shown(start)}, which changes the base model too; save "
      "the adapter with peft's path_initial_model_for_weight_conversion."
    )
  numbers = settings_lib.take(content, {"r": _DEFAULT_RANK}, part)
  found = Settings(
    rank=numbers["r"],
    alpha=_number(content.get("lora_alpha", _DEFAULT_ALPHA), part),
    root=bool(content.get("use_rslora")),
    ranks=_numbers(content, "rank_pattern", part),
    alphas=_numbers(content, "alpha_pattern", part),
    targets=_names(content, "target_modules", part) or None,
    excluded=_names(content, "exclude_modules", part),
    layers=_layers(content, part),
    layers_pattern=_listed(_names(content, "layers_pattern", part)),
    saved=_listed(_names(content, "modules_to_save", part)),
  )
  regexes = [*found.ranks, *found.alphas, *found.layers_pattern]
  regexes += [r for r in (found.targets, found.excluded) if isinstance(r, str)]
  for regex in regexes:
    try:
      re.compile(regex)
    except re.error as error:
      raise WeightsError(
        f"The config of {part} has {settings_lib.shown(regex)}, which is no "
        f"regex ({error})."
      ) from error
  return found


def write(
  modules: Mapping[str, tuple[int, float]],
  targets: Sequence[str],
  saved: Iterable[str] = (),
) -> dict[str, Any]:
  """An `adapter_config.json` which peft opens.

  Args:
    modules: rank and scale of each module with an adapter, by its whole name.
    targets: what `target_modules` says: names that those end with.
    saved: modules that are replaced as a whole.
  """
  alphas = {
    module: lora.alpha_of(scale, rank)
    for module, (rank, scale) in modules.items()
  }
  ranks = {module: rank for module, (rank, _) in modules.items()}
  (rank, _), *_ = collections.Counter(ranks.values()).most_common(1)
  (alpha, _), *_ = collections.Counter(alphas.values()).most_common(1)
  saved = list(saved)
  return {
    "peft_type": "LORA",
    "r": rank,
    "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
    "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
    "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
    "target_modules": list(targets),
    "modules_to_save": saved or None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "use_dora": False,
    "use_rslora": False,
  }


def _number(value: Any, part: str) -> float:
  if type(value) not in (int, float) or not math.isfinite(value):
    raise WeightsError(
      f"The config of {part} has an alpha {settings_lib.shown(value)}; it "
      "must be a number."
    )
  return value


def _numbers(content, name, part) -> dict[str, Any]:
  """Ranks or alphas by regex."""
  found = content.get(name) or {}
  if not isinstance(found, dict) or not all(
    type(value) in (int, float) and math.isfinite(value) and value > 0
    for value in found.values()
  ):
    raise _odd(content, name, part, "numbers by name")
  return found


def _names(content, name, part) -> str | tuple[str, ...]:
  """A regex, or names; () where there are none."""
  found = content.get(name) or ()
  if isinstance(found, str):
    return found
  if not isinstance(found, list | tuple) or not all(
    isinstance(value, str) for value in found
  ):
    raise _odd(content, name, part, "a name or several")
  return tuple(found)


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
  return (names,) if isinstance(names, str) else names


def _layers(content, part) -> tuple[int, ...] | None:
  name = "layers_to_transform"
  found = content.get(name)
  found = [found] if type(found) is int else found
  if not found:
    return None
  if not isinstance(found, list) or {type(n) for n in found} != {int}:
    raise _odd(content, name, part, "a number or several")
  return tuple(found)


def _odd(content, name, part, wanted) -> WeightsError:
  return WeightsError(
    f"The config of {part} has {name}={settings_lib.shown(content[name])}; it "
    f"must be {wanted}."
  )
