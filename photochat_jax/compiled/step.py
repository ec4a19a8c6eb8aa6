"""A run's training step as shapes: no weights, no data, no tokenizer.

What the trainer jits is jitted here with the same arguments donated and the
same shardings, at any size and for devices that need not be there.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from photochat_jax import (
  captions,
  initial,
  inputs,
  optim,
  sharding,
  train_step,
)
from photochat_jax.config import ConfigError, RunConfig
from photochat_jax.data import pipeline
from photochat_jax.models.photochat import PhotoChat

# Entries of a vocabulary map for each token of the language model, roughly:
# the tokenizers decide, and what they decide is a thousandth of the memory.
_ENTRIES = 2


class AbstractStep(NamedTuple):
  """A jitted step and what it is called with.

  Attributes:
    function: (state, batch, vocabulary map) -> (state, metrics), jitted, the
      state donated.
    state: a `TrainState` of `ShapeDtypeStruct`s with shardings.
    batch: likewise, by name.
    vocabulary_map: likewise; the trainer's step holds it as constants.
  """

  function: Any
  state: Any
  batch: dict[str, Any]
  vocabulary_map: Any

  @property
  def arguments(self) -> tuple[Any, ...]:
    """What `function` is called, traced or lowered with."""
    return self.state, self.batch, self.vocabulary_map


def choose_stage(
  run: RunConfig,
  name: str | None = None,
  batch_size: int | None = None,
  accumulate: int | None = None,
) -> tuple[RunConfig, int]:
  """Finds a stage, and gives it another batch.

  Args:
    run: the run.
    name: of the stage; the last one without.
    batch_size: rows of the global batch; the stage's own without.
    accumulate: parts it is cut into; the stage's own without.

  Returns:
    The run and which of its stages it is.

  Raises:
    ConfigError: no stage is called that.
  """
  names = [stage.name for stage in run.stages]
  if name is not None and name not in names:
    raise ConfigError(
      f"The run has no stage {name!r}; choose one of {', '.join(names)}."
    )
  index = len(names) - 1 if name is None else names.index(name)
  stages = list(run.stages)
  changes = {"batch_size": batch_size, "accumulate": accumulate}
  stages[index] = dataclasses.replace(
    stages[index], **{k: v for k, v in changes.items() if v is not None}
  )
  return dataclasses.replace(run, stages=tuple(stages)), index


def abstract_step(run: RunConfig, mesh: Any, index: int = -1) -> AbstractStep:
  """The step of a stage, ready to be traced under `jax.set_mesh(mesh)`.

  With `bridge.retokenise='callback'` the program calls a tokenizer that is
  never run; with `'two_pass'` the captions are arguments, and the pass that
  draws them is another program, smaller than this one.

  Args:
    run: the run.
    mesh: of `sharding.make_mesh`.
    index: which of `run.stages`.

  Raises:
    ConfigError: the rows cannot be divided over the devices.
  """
  index %= len(run.stages)
  model, stage = PhotoChat(run.model), run.stages[index]
  sharding.check_rows(stage, mesh)
  leg = initial.Leg(index, stage, 0, stage.steps)
  state = initial.abstract_state(run, model, mesh, leg)
  slots = run.model.text.max_position_embeddings
  repeated = NamedSharding(mesh, PartitionSpec())

  def step(state, batch, vocabulary_map):
    trainable, _ = optim.split(state.params, stage.trainable)
    update = train_step.make_train_step(
      model,
      run,
      index,
      leg.start,
      optim.make_optimizer(run.optim, run.health, stage, trainable),
      np.zeros(slots, np.int32),
      vocabulary_map,
      _never if captions.draws_in_program(run, stage) else None,
      mesh,
    )
    return update(state, batch)

  return AbstractStep(
    function=jax.jit(
      step,
      donate_argnums=0,
      out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
    ),
    state=state,
    batch=_batch(run, stage, mesh),
    vocabulary_map=_vocabulary_map(run.model.language.vocab_size, repeated),
  )


def _never(y: np.ndarray, mask: np.ndarray) -> Any:
  """A `captions.Retokenise`, for its place in the program."""
  raise NotImplementedError("A program that is only compiled calls nothing.")


def _batch(run: RunConfig, stage: Any, mesh: Any) -> dict[str, Any]:
  shapes = pipeline.element_spec(
    inputs.data_spec(run, stage.batch_size),
    stage.data,
    run.model.text.max_position_embeddings,
  )
  divided = sharding.batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct(
      (stage.batch_size, *shape), dtype, sharding=divided
    )
    for name, (shape, dtype) in shapes.items()
  }


def _vocabulary_map(vocab_size: int, place: NamedSharding) -> Any:
  def array(dtype, count=_ENTRIES * vocab_size):
    return jax.ShapeDtypeStruct((count,), dtype, sharding=place)

  entries = {
    "rows": array(np.int32),
    "cols": array(np.int32),
    "weights": array(np.float32),
  }
  maps = {name: dict(entries) for name in ("static", "final", "internal")}
  return maps | {"specials": array(np.int32, 3)}
