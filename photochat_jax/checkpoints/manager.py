"""Checkpoints of a run: save, check, restore.

A checkpoint `WORKDIR/checkpoints/<step>/` has three items: `weights` (all of
the state but the optimiser), `optimizer`, and `meta` (JSON). Both array items
are plain nested dicts of arrays by name, so that reading one needs neither the
classes of this package nor optax, and inference does not read the optimiser.
`meta` holds a digest of every array, because Orbax restores a file with a
flipped bit without a word.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from photochat_jax.ops import partition

_OPTIMIZER = "opt_state"


class CheckpointError(ValueError):
  """A checkpoint which cannot be used; the message is one sentence."""


def first_difference(
  saved: Any, wanted: Any, path: str = "model"
) -> tuple[str, Any, Any] | None:
  """Returns (path, saved value, wanted value) where two settings differ.

  Args:
    saved: nested dicts of settings.
    wanted: others.
    path: the name of the top.

  Returns:
    The first differing field in the order of the names, or None.
  """
  if isinstance(saved, dict) and isinstance(wanted, dict):
    for name in sorted({*saved, *wanted}):
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


class Checkpoints:
  """The checkpoints under one workdir."""

  def __init__(
    self, workdir: str, keep: int = 2, model: dict[str, Any] | None = None
  ):
    """Opens the folder, making it where it is not there.

    Args:
      workdir: folder of the run, a path or a `gs://` address.
      keep: how many of the newest checkpoints are kept.
      model: the settings which fix the parameters' shapes and meaning. They
        are saved with each checkpoint and must be equal on restoring.
    """
    self.directory = epath.Path(workdir).resolve() / "checkpoints"
    self._model = model
    policy = ocp.checkpoint_managers.LatestN(keep)
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(preservation_policy=policy),
      item_handlers={
        "weights": ocp.StandardCheckpointHandler(),
        "optimizer": ocp.StandardCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
      },
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Returns the saved steps, oldest first."""
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    """Returns the newest saved step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, meta: dict[str, Any]) -> bool:
    """Starts writing a checkpoint; the state may be donated afterwards.

    Args:
      step: the state's step; a step which is already saved is left alone.
      state: a pytree of arrays; its part `opt_state` goes to an item of its
        own.
      meta: what else is to be known on resuming, as JSON types.

    Returns:
      Whether it was saved.
    """
    if step in self._manager.all_steps():
      return False
    weights, optimizer = _items(state)
    items = {"weights": ocp.args.StandardSave(partition.unflatten(weights))}
    if optimizer:
      tree = partition.unflatten(optimizer)
      items["optimizer"] = ocp.args.StandardSave(tree)
    meta = {
      **meta,
      "model": self._model,
      "has_optimizer": bool(optimizer),
      "digests": _digests({**weights, **optimizer}),
    }
    items["meta"] = ocp.args.JsonSave(meta)
    return self._manager.save(step, args=ocp.args.Composite(**items))

  def read_meta(self, step: int | None = None) -> dict[str, Any]:
    """Returns the `meta` of a step, of the newest one without a step."""
    step = self._step(step)
    meta = dict(self._read(step, "meta", ocp.args.JsonRestore()))
    self._check_model(step, meta)
    return meta

  def dtypes(self, step: int | None = None) -> dict[str, Any]:
    """Returns the dtype of every saved weight of a step, by its path."""
    step = self._step(step)
    with self._reading(step):
      saved = dict(self._manager.item_metadata(step).get("weights") or {})
    return {path: leaf.dtype for path, leaf in partition.flatten(saved).items()}

  def restore(self, abstract: Any, step: int | None = None) -> Any:
    """Reads a state.

    Args:
      abstract: a pytree like the state, of `jax.ShapeDtypeStruct` (with their
        shardings) or arrays. Where its `opt_state` has no leaf the optimiser
        is not read.
      step: which checkpoint; the newest without.

    Returns:
      A pytree of arrays of the same structure.

    Raises:
      CheckpointError: if there is none, it was saved by a run with other model
        settings, a leaf is missing, extra, or of another shape or dtype, or
        the values are not those that were saved.
    """
    step = self._step(step)
    digests = self.read_meta(step).get("digests") or {}
    weights, optimizer = _items(abstract)
    wanted = {"weights": weights}
    if optimizer:
      wanted["optimizer"] = optimizer
    with self._reading(step):
      metadata = self._manager.item_metadata(step)
      saved = {item: dict(metadata.get(item) or {}) for item in wanted}
    found = {}
    for item, leaves in wanted.items():
      self._check_leaves(step, partition.flatten(saved[item]), leaves)
    for item, leaves in wanted.items():
      tree = ocp.args.StandardRestore(partition.unflatten(leaves))
      found.update(partition.flatten(self._read(step, item, tree)))
    changed = [
      path
      for path, digest in _digests(found).items()
      if digests.get(path, digest) != digest
    ]
    if changed:
      raise CheckpointError(
        f"The checkpoint of step {step} in {self.directory} is damaged: "
        f"{', '.join(changed[:10])} are not what was saved; remove its folder "
        "to go on from the one before it."
      )
    paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
    logging.info("Restored step %d from %s.", step, self.directory)
    return jax.tree_util.tree_unflatten(
      structure, [found[partition.path_of(path)] for path, _ in paths]
    )

  def wait(self) -> None:
    """Returns when every checkpoint begun is whole on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Finishes writing and frees the folder."""
    self._manager.close()

  def _step(self, step: int | None) -> int:
    steps = self.steps()
    if not steps:
      raise CheckpointError(
        f"There is no checkpoint in {self.directory}; train first, or give "
        "the --workdir of a run that has one."
      )
    if step is not None and step not in steps:
      raise CheckpointError(
        f"There is no checkpoint of step {step} in {self.directory}; it has "
        f"the steps {steps}."
      )
    return steps[-1] if step is None else step

  def _read(self, step: int, item: str, args: Any) -> Any:
    composite = ocp.args.Composite(**{item: args})
    with self._reading(step):
      return self._manager.restore(step, args=composite)[item]

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    """Turns what Orbax raises over a broken file into one sentence."""
    try:
      yield
    except (ValueError, OSError, KeyError) as error:
      raise CheckpointError(
        f"The checkpoint of step {step} in {self.directory} is damaged; remove "
        "its folder to go on from the one before it."
      ) from error

  def _check_model(self, step: int, meta: dict[str, Any]) -> None:
    saved = meta.get("model")
    if saved is None or self._model is None:
      return
    found = first_difference(saved, self._model)
    if found:
      name, old, new = found
      raise CheckpointError(
        f"The checkpoint of step {step} in {self.directory} is of another "
        f"config: {name} is {old!r} there and {new!r} here; use that config, "
        "or another --workdir."
      )

  def _check_leaves(
    self, step: int, saved: dict[str, Any], wanted: dict[str, Any]
  ) -> None:
    """Raises a CheckpointError which names every leaf that does not fit."""
    faults = [f"{path} is missing" for path in wanted if path not in saved]
    faults += [f"{path} is not wanted" for path in saved if path not in wanted]
    for path, leaf in wanted.items():
      if path not in saved:
        continue
      old, new = saved[path], leaf
      # Orbax casts a dtype silently; here that is a fault like a shape.
      if tuple(old.shape) != tuple(new.shape) or old.dtype != new.dtype:
        faults.append(
          f"{path} is {old.dtype}{list(old.shape)} there and "
          f"{new.dtype}{list(new.shape)} here"
        )
    if faults:
      shown = "; ".join(faults[:10])
      more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
      raise CheckpointError(
        f"The checkpoint of step {step} in {self.directory} does not fit: "
        f"{shown}{more}."
      )


def _items(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  """Divides a state's `{path: leaf}` into the weights and the optimiser."""
  leaves = partition.flatten(state)
  optimizer = {
    path: leaf
    for path, leaf in leaves.items()
    if path.split("/")[0] == _OPTIMIZER
  }
  weights = {p: leaf for p, leaf in leaves.items() if p not in optimizer}
  return weights, optimizer


def _digests(leaves: dict[str, Any]) -> dict[str, str]:
  """SHA-256 of each array's dtype, shape and bytes, by its path.

  Arrays that this process holds only in part are left out.
  """
  digests = {}
  for path, leaf in leaves.items():
    if not getattr(leaf, "is_fully_addressable", True):
      continue
    array = np.ascontiguousarray(leaf)
    content = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
    content.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    digests[path] = content.hexdigest()
  return digests
