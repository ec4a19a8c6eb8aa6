"""What the `config.json` files of Hugging Face must and may say."""

from collections.abc import Mapping, Sequence
from typing import Any

from photochat_jax.checkpoints.files import WeightsError

REQUIRED = object()
"""In place of a default: the field must be there."""


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
      f"The config of {part} has {name} {kind!r}; it must be "
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
        f"The config of {part} has {name}={value!r}, a variant which is not "
        f"implemented; only {' and '.join(map(repr, values))} is."
      )


def take(
  settings: Mapping[str, Any], defaults: Mapping[str, Any], part: str
) -> dict[str, Any]:
  """The named fields, with defaults, in the defaults' types.

  Args:
    settings: a parsed config.json.
    defaults: by field name: `REQUIRED` (a positive integer), or the default of
      the original class, whose type the value must have; None takes any.
    part: what errors call it.

  Raises:
    WeightsError: a field is missing or of another type.
  """
  taken = {}
  for name, default in defaults.items():
    value = settings.get(name)
    if value is None:
      value = default
    if value is REQUIRED:
      raise WeightsError(f"The config of {part} lacks {name}.")
    kind = int if default is REQUIRED else type(default)
    if kind is float and type(value) is int:
      value = float(value)
    if kind is tuple and isinstance(value, list):
      value = tuple(value)
    if default is not None and type(value) is not kind:
      raise WeightsError(
        f"The config of {part} has {name}={value!r}; it must be of type "
        f"{kind.__name__}."
      )
    if default is REQUIRED and value < 1:
      raise WeightsError(
        f"The config of {part} has {name}={value}; it must be positive."
      )
    taken[name] = value
  return taken


def build(config_class, part: str, **numbers: Any) -> Any:
  """A model's dataclass, whose own complaints become a `WeightsError`."""
  try:
    return config_class(**numbers)
  except ValueError as error:
    raise WeightsError(f"The config of {part} does not fit: {error}") from error
