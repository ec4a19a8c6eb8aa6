"""What the `config.json` files of Hugging Face must and may say."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from photochat_jax.checkpoints import files
from photochat_jax.checkpoints.files import WeightsError

REQUIRED = object()
"""In place of a default: the field must be there."""

# Beyond these no model is real, and looking at its shapes would take for ever.
_LARGEST = 2**24
_LIMITS = {
  "num_hidden_layers": 1024,
  "layers_per_block": 16,
  "transformer_layers_per_block": 16,
  "image_size": 2**14,
  "patch_size": 2**14,
  "sample_size": 2**14,
}
_MOST_BLOCKS = 16

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlevel = 3


def shown(value: Any) -> str:
  """A value of a damaged file, short enough for a sentence."""
  text = _repr.repr(value)
  return text if len(text) <= 80 else f"{text[:80]}..."


def check_kind(
  settings: Mapping[str, Any], name: str, kinds: Sequence[str], part: str
) -> None:
  """Refuses the config of another model.

  Args:
    settings: a parsed config.json.
    name: the field that says what it is, `model_type` or `_class_name`.
    kinds: those we have.
    part: what errors call it.

  Raises:
    WeightsError: it is another.
  """
  kind = settings.get(name)
  if kind not in kinds:
    raise WeightsError(
      f"The config of {part} has {name} {shown(kind)}; it must be "
      f"{' or '.join(map(repr, kinds))}."
    )


def check_fixed(
  settings: Mapping[str, Any], fixed: Mapping[str, Sequence[Any]], part: str
) -> None:
  """Refuses variants of an architecture that we do not have.

  Args:
    settings: a parsed config.json.
    fixed: for each field the values that mean what we do; the field may be
      absent, and the first value is its default.
    part: what errors call it.

  Raises:
    WeightsError: naming the field.
  """
  for name, values in fixed.items():
    value = settings.get(name, values[0])
    if isinstance(value, list):
      value = tuple(value)
    if value not in values:
      raise WeightsError(
        f"The config of {part} has {name}={shown(value)}, a variant which is "
        "not implemented; take a checkpoint where it is "
        f"{' or '.join(map(repr, values))}."
      )


def take(
  settings: Mapping[str, Any], defaults: Mapping[str, Any], part: str
) -> dict[str, Any]:
  """The named fields, with defaults, in the defaults' types.

  Whole numbers are positive, or not negative where 0 is the default, and
  within what a model can have; so are those in tuples. Others are positive.

  Args:
    settings: a parsed config.json.
    defaults: by field name: `REQUIRED` (a positive integer), or the default of
      the original class, whose type the value must have.
    part: what errors call it.

  Raises:
    WeightsError: a field is missing, of another type or out of bounds.
  """
  taken = {}
  for name, default in defaults.items():
    value = settings.get(name)
    if value is None:
      value = default
    if value is REQUIRED:
      raise WeightsError(
        f"The config of {part} lacks {name}; fetch it again."
      )
    kind = int if default is REQUIRED else type(default)
    most = _LIMITS.get(name, _LARGEST)
    if kind is int:
      least = 0 if default == 0 else 1
      fits, what = _whole(value, least, most), f"from {least} to {most}"
      what = f"a whole number {what}"
    elif kind is float:
      # A comparison with NaN is false.
      fits = type(value) in (int, float) and 0 < value < 1e30
      value, what = float(value) if fits else value, "a positive number"
    elif kind is tuple:
      value = tuple(value) if isinstance(value, list) else value
      fits = type(value) is tuple and 1 <= len(value) <= _MOST_BLOCKS
      fits = fits and all(_whole(number, 1, most) for number in value)
      what = f"1 to {_MOST_BLOCKS} whole numbers from 1 to {most}"
    else:
      fits, what = type(value) is kind, f"of type {kind.__name__}"
    if not fits:
      raise WeightsError(
        f"The config of {part} has {name}={shown(value)}; it must be {what}."
      )
    taken[name] = value
  return taken


def _whole(value: Any, least: int, most: int) -> bool:
  return type(value) is int and least <= value <= most


def read_file(
  folder: epath.Path,
  read: Callable[[Mapping[str, Any]], Any],
  name: str = "config.json",
) -> Any:
  """What a part makes of its config; its complaints then say which file.

  Args:
    folder: of the part.
    read: from the parsed file to what is returned.
    name: of the file.

  Raises:
    WeightsError: the file is missing or damaged, or `read` raised one.
  """
  path = epath.Path(folder) / name
  content = files.read_json(path)
  try:
    return read(content)
  except ValueError as error:
    raise WeightsError(
      f"{path} cannot be used: {files.reason(error, 400)}."
    ) from error


def build(config_class, part: str, **numbers: Any) -> Any:
  """A model's dataclass, whose own complaints become a `WeightsError`."""
  try:
    return config_class(**numbers)
  except ValueError as error:
    raise WeightsError(
      f"The config of {part} does not fit: {files.reason(error)}; fetch it "
      "again, or take another checkpoint."
    ) from error
