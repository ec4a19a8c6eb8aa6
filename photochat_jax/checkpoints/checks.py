"""What is checked of a checkpoint, and the sentences where it fails."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from photochat_jax.checkpoints import digests

# Settings of the computation: they fix no parameter.
_FREE = frozenset({"dtype", "remat", "scan_unroll", "tile_size"})


class CheckpointError(ValueError):
  """A checkpoint which cannot be used; the message is one sentence."""


class CheckpointDamaged(CheckpointError):
  """A checkpoint which is not what was saved.

  Attributes:
    what: is wrong with it.
  """

  def __init__(self, message: str, what: str):
    super().__init__(message)
    self.what = what


def first_difference(
  saved: Any, wanted: Any, path: str = "model"
) -> tuple[str, Any, Any] | None:
  """Returns (path, saved value, wanted value) where two settings differ.

  Settings of the computation, such as `dtype`, may.

  Args:
    saved: nested dicts of settings.
    wanted: others.
    path: the name of the top.

  Returns:
    The first differing field in the order of the names, or None.
  """
  if isinstance(saved, dict) and isinstance(wanted, dict):
    for name in sorted({*saved, *wanted} - _FREE):
      found = first_difference(
        saved.get(name), wanted.get(name), f"{path}.{name}"
      )
      if found:
        return found
    return None
  if isinstance(saved, list | tuple) and isinstance(wanted, list | tuple):
    saved, wanted = _as_lists(saved), _as_lists(wanted)
  return None if saved == wanted else (path, saved, wanted)


def _as_lists(value: Any) -> Any:
  if isinstance(value, list | tuple):
    return [_as_lists(item) for item in value]
  return value


# Raised by what reads, not by what is read.
_NOT_THE_FILE = (
  PermissionError,
  TimeoutError,
  ConnectionError,
  MemoryError,
  jax.errors.JaxRuntimeError,
)
# TensorStore's words for a bucket that cannot be reached just now.
_AWAY = re.compile(
  "UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED"
  "|RESOURCE_EXHAUSTED"
)


class Checks:
  """The checks of one checkpoint.

  Attributes:
    name: of the checkpoint in sentences.
  """

  def __init__(self, step: int, directory: Any):
    self.name = f"The checkpoint of step {step} in {directory}"

  def damaged(self, what: str) -> CheckpointDamaged:
    """The error which says what is wrong."""
    return CheckpointDamaged(
      f"{self.name} is damaged: {what}; remove its folder to go on from the "
      "one before it.",
      what,
    )

  @contextlib.contextmanager
  def reading(self) -> Iterator[None]:
    """Turns what is raised over a broken file into one sentence."""
    try:
      yield
    except _NOT_THE_FILE:
      raise
    except Exception as error:  # Orbax raises anything, also this.
      cause = error.__cause__ or error
      if _AWAY.search(str(cause)):
        raise  # A good checkpoint must not be put aside for that.
      what = " ".join(str(cause).split())
      what = what if len(what) <= 200 else f"{what[:200]}..."
      raise self.damaged(f"{type(cause).__name__} {what}") from error

  @contextlib.contextmanager
  def agreed(self) -> Iterator[None]:
    """Lets all processes fail where one does; all must enter the block."""
    fault = None
    try:
      yield
    except Exception as error:
      fault = error
    if jax.process_count() > 1:
      failed = multihost_utils.process_allgather(np.int32(fault is not None))
      if fault is None and failed.any():
        numbers = ", ".join(map(str, np.flatnonzero(failed)))
        fault = self.damaged(f"processes {numbers} cannot read it")
    if fault is not None:
      raise fault

  def meta(self, text: str) -> dict[str, Any]:
    """Reads the text of the item `meta`."""
    with self.reading():
      meta = json.loads(text)
      known = dict(meta["digests"])
      is_new = ":" in "".join(known.values())
    if "checksum" not in meta and not is_new:
      raise CheckpointError(
        f"{self.name} was saved by an earlier version, which this one cannot "
        "check; use that version, or another --workdir."
      )
    if meta.get("checksum") != checksum(meta):
      raise self.damaged("meta is not what was saved")
    return meta

  def model(self, saved: Any, wanted: Any) -> None:
    """Raises a CheckpointError if the models' settings differ."""
    if saved is None or wanted is None:
      return
    found = first_difference(saved, wanted)
    if found:
      field, old, new = found
      raise CheckpointError(
        f"{self.name} is of another config: {field} is {old!r} there and "
        f"{new!r} here; use that config, or another --workdir."
      )

  def leaves(
    self, saved: Mapping[str, Any], wanted: Mapping[str, Any], cast: bool
  ) -> None:
    """Raises a CheckpointError which names every leaf that does not fit.

    Args:
      saved: `{path: leaf}` with shape and dtype.
      wanted: others.
      cast: whether another precision fits.
    """
    faults = [f"{path} is missing" for path in wanted if path not in saved]
    faults += [f"{path} is not wanted" for path in saved if path not in wanted]
    for path, new in wanted.items():
      if path not in saved:
        continue
      old = saved[path]
      # Orbax casts a dtype silently; here that is a fault like a shape.
      fits = old.dtype == new.dtype or (cast and _floating(old, new))
      if tuple(old.shape) != tuple(new.shape) or not fits:
        faults.append(
          f"{path} is {old.dtype}{list(old.shape)} there and "
          f"{new.dtype}{list(new.shape)} here"
        )
    if faults:
      shown = "; ".join(faults[:10])
      more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
      raise CheckpointError(f"{self.name} does not fit: {shown}{more}.")

  def forms(self, saved: Mapping[str, str], found: Mapping[str, Any]) -> None:
    """Raises a CheckpointDamaged if Orbax names other shapes or dtypes."""
    for path, leaf in found.items():
      if not saved.get(path, "").startswith(f"{digests.form(leaf)}:"):
        raise self.damaged(f"the form of {path} is not what was saved")

  def digests(self, saved: Mapping[str, str], made: Mapping[str, str]) -> None:
    """Raises a CheckpointDamaged which names the arrays that changed."""
    changed = [path for path in made if saved.get(path) != made[path]]
    if changed:
      more = f" and {len(changed) - 10} more" if len(changed) > 10 else ""
      shown = f"{', '.join(changed[:10])}{more}"
      raise self.damaged(f"{shown} are not what was saved")


def checksum(meta: Mapping[str, Any]) -> str:
  """SHA-256 of all of `meta` but the digests, which show their own damage."""
  rest = {k: v for k, v in meta.items() if k not in ("digests", "checksum")}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _floating(*leaves: Any) -> bool:
  return all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)
