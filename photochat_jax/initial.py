"""Where a run and each of its stages begin: random or pretrained weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from photochat_jax import inputs, optim, record, sharding
from photochat_jax.config import ConfigError, RunConfig, StageConfig
from photochat_jax.models.photochat import Params, PhotoChat
from photochat_jax.ops import partition
from photochat_jax.state import TrainState


@dataclasses.dataclass(frozen=True)
class Leg:
  """A stage's place in the run.

  Attributes:
    index: which of `run.stages`.
    stage: its settings.
    start: the global step of its first update.
    end: the global step at which it is done.
  """

  index: int
  stage: StageConfig
  start: int
  end: int


def abstract_state(
  run: RunConfig, model: PhotoChat, mesh: Any, leg: Leg
) -> TrainState:
  """The shapes, dtypes and shardings of the state in a stage."""

  def init(key):
    return _state(run, leg, model.init(key), jnp.float32(1))

  state = jax.eval_shape(init, jax.random.key(0))
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    state,
    sharding.state_shardings(state, mesh),
  )


def init_state(
  run: RunConfig, model: PhotoChat, mesh: Any, leg: Leg, tokenizer: Any = None
) -> TrainState:
  """The run's first state, each array created where `sharding` puts it.

  Args:
    run: the run.
    model: the model.
    mesh: of `sharding.make_mesh`.
    leg: the first stage.
    tokenizer: the language model's, whose `[img]` and `[/img]` may be new to
      pretrained weights.

  Raises:
    ValueError: the pretrained weights cannot be used.
  """
  abstract = abstract_state(run, model, mesh, leg)
  where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  loaded, scale = _pretrained(run, model, abstract.params, tokenizer)
  if scale is None:
    scale = jnp.float32(run.model.vae.scaling_factor)

  def init(key, loaded, scale):
    fresh = inputs.init_without(model, loaded)(key)
    params = partition.unflatten({**fresh, **loaded})
    return _state(run, leg, params, scale)

  # Donated, so that what was loaded is not held twice.
  make = jax.jit(init, out_shardings=where, donate_argnums=1)
  return make(jax.random.key(run.seed), loaded, scale)


def begin_stage(run: RunConfig, leg: Leg, state: TrainState) -> TrainState:
  """A stage's beginning from the end of the one before.

  The averaged weights become the weights; the optimiser and the averages start
  anew.
  """
  params = {**state.params, **state.ema}
  return _state(run, leg, params, state.latent_scale)


def _state(
  run: RunConfig, leg: Leg, params: Params, latent_scale: jax.Array
) -> TrainState:
  params = optim.hold_frozen(params, run.stages[leg.index :], run.frozen_dtype)
  trainable, _ = optim.split(params, leg.stage.trainable)
  averaged = run.ema.parts if run.ema.decay else ()
  return TrainState(
    step=jnp.int32(leg.start),
    params=params,
    opt_state=optim.make_optimizer(
      run.optim, run.health, leg.stage, trainable
    ).init(trainable),
    # Copies: the state is donated, and no buffer can be given away twice.
    ema={part: jax.tree.map(jnp.copy, params[part]) for part in averaged},
    latent_scale=latent_scale,
  )


def _pretrained(
  run: RunConfig, model: PhotoChat, abstract: Params, tokenizer: Any
) -> tuple[dict[str, jax.Array], jax.Array | None]:
  """`{path: array}` of what `run.pretrained` holds; the latents' scale."""
  wanted = partition.flatten(abstract)

  def place(path: str, array: Any) -> jax.Array:
    leaf = wanted[path]
    array = np.asarray(array).astype(leaf.dtype, copy=False)
    # Every process keeps its own shards only.
    return jax.make_array_from_callback(
      leaf.shape, leaf.sharding, lambda index: array[index]
    )

  if run.pretrained.run:
    return _of_run(run, wanted)
  params = inputs.read_folders(run, tokenizer, place=place)
  return partition.flatten(params), None


def _of_run(
  run: RunConfig, wanted: Mapping[str, Any]
) -> tuple[dict[str, jax.Array], jax.Array]:
  """The newest weights of another run, averaged where they are."""
  workdir = run.pretrained.run
  # On this run's mesh: that one's may have had more devices, and each process
  # is to read what it will hold.
  other = dataclasses.replace(record.read(workdir), mesh=run.mesh)
  state = inputs.read_weights(other, workdir, PhotoChat(other.model))
  found = partition.flatten({**state.params, **state.ema})
  faults = []
  for path, leaf in list(found.items()):
    if path.partition("/")[0] in run.model.absent:
      del found[path]  # Eyes that this model does without.
    elif path not in wanted:
      faults.append(f"{path} is not in this model")
    elif leaf.shape != wanted[path].shape:
      shape = list(wanted[path].shape)
      faults.append(f"{path} is {list(leaf.shape)} there and {shape} here")
  if faults:
    raise ConfigError(
      f"The weights of {workdir} do not fit this config: "
      f"{'; '.join(faults[:10])}{' ...' if faults[10:] else ''}."
    )
  loaded = {p: leaf.astype(wanted[p].dtype) for p, leaf in found.items()}
  return loaded, state.latent_scale
