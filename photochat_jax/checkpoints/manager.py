"""Checkpoints of a run: save, check, restore.

A checkpoint `WORKDIR/checkpoints/<step>/` has three items: `weights` (all of
the state but the optimiser), `optimizer`, and `meta` (JSON). Both array items
are plain nested dicts of arrays by name, so that reading one needs neither the
classes of this package nor optax, and inference does not read the optimiser.
`meta` holds a digest of every array (`digests`) and a checksum of itself,
because Orbax restores a file with a flipped bit without a word. So a damaged
checkpoint is never used: `restore` names what is wrong with it, and
`restore_newest` goes on from the one before it.

Items are read by Orbax's handlers and not by its manager, which lets all
processes wait for each other where only one of them fails. Here they agree
first.
"""

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from photochat_jax.checkpoints import checks, digests, retention
from photochat_jax.checkpoints.checks import CheckpointDamaged, CheckpointError
from photochat_jax.ops import partition

_OPTIMIZER = "opt_state"


class Checkpoints:
  """The checkpoints under one workdir."""

  def __init__(
    self,
    workdir: str,
    keep: int = 2,
    model: dict[str, Any] | None = None,
    keep_best: int = 0,
    best_metric: str = "dev/loss",
  ):
    """Opens the folder, making it where it is not there.

    Args:
      workdir: folder of the run, a path or a `gs://` address.
      keep: how many of the newest checkpoints are kept.
      model: the settings which fix the parameters' shapes and meaning. They
        are saved with each checkpoint and must be equal on restoring.
      keep_best: how many are kept beside those because they are the best.
      best_metric: by which metric; lower is better. A checkpoint saved without
        it, or with one that is not finite, is none of the best.
    """
    self.directory = epath.Path(workdir).resolve() / "checkpoints"
    self._model = model
    self._best_metric = best_metric
    self._values: dict[int, float] = {}
    self._handler = ocp.StandardCheckpointHandler()
    policies = ocp.checkpoint_managers
    policy = policies.AnyPreservationPolicy(
      [policies.LatestN(keep), retention.Best(keep_best, self._values)]
    )
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(preservation_policy=policy),
      item_handlers={
        "weights": self._handler,
        "optimizer": ocp.StandardCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
      },
    )
    for step in self.steps() if keep_best else ():
      # A damaged one matters when it is to be restored.
      with contextlib.suppress(CheckpointError):
        self._note(step, self._read_meta(step).get("metrics"))

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

  def save(
    self,
    step: int,
    state: Any,
    meta: dict[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> bool:
    """Starts writing a checkpoint; the state may be donated afterwards.

    It returns when the state is on the host. For that the step that makes it
    must be done; its digests, made where it lies in one pass over it, are
    asked for first and cost no more than that pass.

    Args:
      step: the state's step; a step which is already saved is left alone.
      state: a pytree of arrays; its part `opt_state` goes to an item of its
        own.
      meta: what else is to be known on resuming, as JSON types.
      metrics: what tells whether it is one of the best.

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
    metrics = {name: float(x) for name, x in (metrics or {}).items()}
    meta = {
      **meta,
      "model": self._model,
      "metrics": metrics,
      "has_optimizer": bool(optimizer),
      "digests": digests.compute({**weights, **optimizer}),
    }
    meta = json.loads(json.dumps(meta))  # As it will be read.
    meta["checksum"] = checks.checksum(meta)
    items["meta"] = ocp.args.JsonSave(meta)
    self._note(step, metrics)
    return self._manager.save(step, args=ocp.args.Composite(**items))

  def read_meta(self, step: int | None = None) -> dict[str, Any]:
    """Returns the `meta` of a step, of the newest one without a step.

    Raises:
      CheckpointDamaged: it is not what was saved.
      CheckpointError: there is none, or it is of another config.
    """
    step = self._step(step)
    meta = self._read_meta(step)
    self._checks(step).model(meta["model"], self._model)
    return meta

  def dtypes(self, step: int | None = None) -> dict[str, Any]:
    """Returns the dtype of every saved weight of a step, by its path."""
    step = self._step(step)
    saved = self._saved(step, "weights", self._read_meta(step))
    return {path: leaf.dtype for path, leaf in saved.items()}

  def restore(
    self, abstract: Any, step: int | None = None, cast: bool = False
  ) -> Any:
    """Reads a state.

    Args:
      abstract: a pytree like the state, of `jax.ShapeDtypeStruct` (with their
        shardings) or arrays. Where its `opt_state` has no leaf the optimiser
        is not read.
      step: which checkpoint; the newest without.
      cast: whether numbers saved with another precision are rounded to the
        one that is wanted, after they were checked.

    Returns:
      A pytree of arrays of the same structure.

    Raises:
      CheckpointDamaged: the values are not those that were saved.
      CheckpointError: if there is none, it was saved by a run with other model
        settings, a leaf is missing, extra, or of another shape or dtype.
    """
    step = self._step(step)
    weights, optimizer = _items(abstract)
    wanted = {"weights": weights}
    if optimizer:
      wanted["optimizer"] = optimizer
    found: dict[str, Any] = {}
    check = self._checks(step)
    with check.agreed():
      meta = self.read_meta(step)
      saved = {item: self._saved(step, item, meta) for item in wanted}
      for item, leaves in wanted.items():
        check.forms(meta["digests"], saved[item])
        check.leaves(saved[item], leaves, cast)
      for item, leaves in wanted.items():
        tree = partition.unflatten(
          {
            path: jax.ShapeDtypeStruct(
              leaf.shape,
              saved[item][path].dtype,
              sharding=getattr(leaf, "sharding", None),
            )
            for path, leaf in leaves.items()
          }
        )
        with check.reading():
          read = self._handler.restore(
            self._folder(step, item), args=ocp.args.StandardRestore(tree)
          )
        found.update(partition.flatten(read))
    check.digests(meta["digests"], digests.compute(found))
    paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
    cast_leaves = 0
    leaves = []
    for path, leaf in paths:
      array = found.pop(partition.path_of(path))
      if array.dtype != leaf.dtype:
        array = array.astype(leaf.dtype)
        cast_leaves += 1
      leaves.append(array)
    if cast_leaves:
      logging.info("%d arrays of step %d were cast.", cast_leaves, step)
    logging.info("Restored step %d from %s.", step, self.directory)
    return jax.tree_util.tree_unflatten(structure, leaves)

  def restore_newest(
    self, abstract_of: Callable[[int], Any], cast: bool = False
  ) -> tuple[Any, int, list[str]] | None:
    """Reads the newest state that is not damaged.

    The folders of damaged ones are renamed to `<step>.damaged`, so that their
    steps can be saved again and nothing is lost.

    Args:
      abstract_of: gives what `restore` wants for a step.
      cast: as `restore` takes it.

    Returns:
      The state, its step, and a sentence on each newer checkpoint that is
      damaged; None if there is no checkpoint at all.

    Raises:
      CheckpointDamaged: all are damaged; none is renamed.
      CheckpointError: one cannot be used for another reason.
    """
    damaged = {}
    for step in reversed(self.steps()):
      try:
        state = self.restore(abstract_of(step), step, cast)
      except CheckpointDamaged as error:
        logging.error("%s", error)
        damaged[step] = error.what
        continue
      names = retention.put_aside(self.directory, list(damaged))
      if damaged:
        self._manager.reload()
      sentences = [
        f"The checkpoint of step {bad} in {self.directory} is damaged: {what}; "
        f"it is kept as {name}, and the run goes on from step {step}."
        for (bad, what), name in zip(damaged.items(), names, strict=True)
      ]
      return state, step, sentences
    if not damaged:
      return None
    what = "; ".join(f"step {bad}, {what}" for bad, what in damaged.items())
    raise CheckpointDamaged(
      f"Every checkpoint in {self.directory} is damaged ({what}); put a sound "
      "one there, or use another --workdir.",
      what,
    )

  def read_part(
    self, leaves: Mapping[str, Any], step: int | None = None
  ) -> dict[str, np.ndarray]:
    """Reads some of the weights and nothing else.

    Args:
      leaves: `{path: jax.ShapeDtypeStruct}`, of those that are wanted.
      step: which checkpoint; the newest without.

    Returns:
      Numpy arrays by their paths.

    Raises:
      CheckpointDamaged, CheckpointError: as `restore` does.
    """
    step = self._step(step)
    check = self._checks(step)
    meta = self.read_meta(step)
    saved = self._saved(step, "weights", meta)
    saved = {path: leaf for path, leaf in saved.items() if path in leaves}
    check.forms(meta["digests"], saved)
    check.leaves(saved, leaves, cast=False)
    part = partition.unflatten(leaves)
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    with check.reading():
      read = ocp.PyTreeCheckpointHandler().restore(
        self._folder(step, "weights"),
        args=ocp.args.PyTreeRestore(
          item=part,
          restore_args=jax.tree.map(lambda _: as_numpy, part),
          partial_restore=True,
        ),
      )
    found = partition.flatten(read)
    check.digests(meta["digests"], digests.compute(found))
    return found

  def delete_after(self, step: int) -> None:
    """Removes the checkpoints of all later steps, to go back to this one."""
    self.wait()
    for later in self.steps():
      if later > step:
        self._manager.delete(later)
        self._values.pop(later, None)

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

  def _folder(self, step: int, item: str) -> epath.Path:
    return self.directory / str(step) / item

  def _note(self, step: int, metrics: Any) -> None:
    value = (metrics or {}).get(self._best_metric, math.nan)
    self._values.pop(step, None)
    if math.isfinite(value):
      self._values[step] = value

  def _checks(self, step: int) -> checks.Checks:
    return checks.Checks(step, self.directory)

  def _read_meta(self, step: int) -> dict[str, Any]:
    check = self._checks(step)
    with check.reading():
      text = (self._folder(step, "meta") / "metadata").read_text()
    return check.meta(text)

  def _saved(
    self, step: int, item: str, meta: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Shape and dtype of each array of an item, by its path."""
    if item == "optimizer" and not meta["has_optimizer"]:
      return {}
    with self._checks(step).reading():
      metadata = self._handler.metadata(self._folder(step, item))
      return partition.flatten(dict(metadata.tree))


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
