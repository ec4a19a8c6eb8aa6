"""Captions drawn while training, and the random numbers of each photo.

Everything random about a photo is keyed by (seed, stage, step, example id), so
that it depends neither on the mesh nor on where the photo stands in a batch.
With `bridge.draw` of `argmax` or `gumbel` the captions are the model's own:
`draw_captions` draws them, and the host's tokenizer, called from the program,
turns them into the text encoder's ids and the alignment.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from photochat_jax.config import RunConfig, StageConfig
from photochat_jax.models import bridge

# (y int32[X, n], mask bool[X, n]) -> clip_tokens int32[X, m],
# alignment float32[X, m, n], final bool[X, n]; on the host.
Retokenise = Callable[
  [np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]
]

# What each photo's random numbers are for.
DROPOUT, POSTERIOR, DIFFUSION, GUMBEL = range(4)


def draws_own(run: RunConfig, stage: StageConfig) -> bool:
  """Whether a stage's photos are drawn from captions of the model's own."""
  return bool(
    stage.data == "dialogues"
    and stage.losses.photo
    and run.bridge.draw != "gold"
  )


def draws_in_program(run: RunConfig, stage: StageConfig) -> bool:
  """Whether it does, and the update's program calls the tokenizer itself."""
  return draws_own(run, stage) and run.bridge.retokenise == "callback"


def photo_keys(
  run: RunConfig, stage_index: int, step: Any, example_id: jax.Array
) -> jax.Array:
  """One key for each photo: of (seed, stage, step in stage, example).

  Args:
    run: the run, for its seed.
    stage_index: the stage's place in the run.
    step: step within the stage.
    example_id: uint32[X].

  Returns:
    Keys [X], the same on every mesh and wherever a photo stands in a batch.
  """
  key = jax.random.fold_in(jax.random.key(run.seed), stage_index)
  key = jax.random.fold_in(key, step)
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(example_id)


def keys_for(keys: jax.Array, purpose: int | jax.Array) -> jax.Array:
  """Keys [X] for one purpose of each photo."""
  return jax.vmap(lambda k: jax.random.fold_in(k, purpose))(keys)


def draw_captions(
  run: RunConfig, logits: jax.Array, photos: dict[str, Any], keys: jax.Array
) -> jax.Array:
  """The captions the forward pass carries, int32[X * K, n] (gold prefix).

  Drawn per position, given the gold caption before it: not a free sample. K is
  `bridge.num_samples`; a photo's samples follow each other.
  """
  count, keys = run.bridge.num_samples, keys_for(keys, GUMBEL)
  if count == 1:
    y = bridge.draw_tokens(run.bridge, logits, keys)[None]
  else:
    # One after the other: the noise is as large as the logits.
    y = jax.lax.map(
      lambda k: bridge.draw_tokens(run.bridge, logits, keys_for(keys, k)),
      jnp.arange(count),
    )
  y = jnp.where(photos["caption_mask"], y, photos["caption_tokens"])
  return y.swapaxes(0, 1).reshape(-1, y.shape[-1])


def retokenise_in_program(
  retokenise: Retokenise, mesh: Any, y: jax.Array, mask: jax.Array, m: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Calls the tokenizer from the program, each device for its own photos."""

  def call(y, mask):
    x, n = y.shape
    # A TPU's compiler takes results of one rank only.
    shapes = (
      jax.ShapeDtypeStruct((x, m), jnp.int32),
      jax.ShapeDtypeStruct((x, m * n), jnp.float32),
      jax.ShapeDtypeStruct((x, n), jnp.bool_),
    )

    def on_host(y, mask):
      z, alignment, final = retokenise(np.asarray(y), np.asarray(mask))
      return z, alignment.reshape(x, m * n), final

    z, alignment, final = jax.pure_callback(on_host, shapes, y, mask)
    return z, alignment.reshape(x, m, n), final

  rows = PartitionSpec(("data", "fsdp"))
  return jax.shard_map(
    call,
    mesh=mesh,
    in_specs=(rows, rows),
    out_specs=(rows, rows, rows),
    check_vma=False,
  )(y, mask)
