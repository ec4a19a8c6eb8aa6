"""The loss on the dev split, while training.

It is the stage's own loss with what is random held still: the same batches and
the same noise each time, captions as the data have them and none dropped, the
weights of the stage's end, and averaged parameters where there are any. So two
values differ by the model alone, and the best checkpoint is the one where it is
lowest.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from photochat_jax import captions, objective, sharding
from photochat_jax.config import RunConfig
from photochat_jax.data import pipeline
from photochat_jax.initial import Leg
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.state import TrainState


class DevLoss:
  """Measures a stage's loss on the dev split."""

  def __init__(
    self,
    model: PhotoChat,
    run: RunConfig,
    leg: Leg,
    mesh: Any,
    data: pipeline.Pipeline,
    empty_tokens: np.ndarray,
    vocabulary_map: Any,
  ):
    """Compiles nothing yet.

    Args:
      model: the model.
      run: the run.
      leg: the stage.
      mesh: of `sharding.make_mesh`.
      data: batches of the dev split, of the stage's kind.
      empty_tokens: int32[m], the empty caption for the text encoder.
      vocabulary_map: of the bridge.
    """
    loss = dataclasses.replace(run.loss, caption_dropout=0.0)
    run = dataclasses.replace(run, loss=loss)
    self._run, self._mesh, self._data = run, mesh, data
    self._counts: Any = None

    def terms(state: TrainState, batch, counts, number):
      keys = captions.photo_keys(
        run, leg.index, number, batch["example_id"].reshape(-1)
      )
      _, sums = objective.loss_terms(
        model,
        run,
        leg.stage,
        {**state.params, **state.ema},
        state.latent_scale,
        batch,
        keys,
        jnp.int32(leg.stage.steps),
        jnp.asarray(empty_tokens),
        vocabulary_map,
        counts=counts,
      )
      return sums

    self._terms = jax.jit(terms)

  def __call__(self, state: TrainState) -> dict[str, float]:
    """Returns `dev/loss` and what it is made of."""
    if self._counts is None:
      count = jax.jit(objective.count_batch)
      self._counts = _add(count(batch) for _, batch in self._batches())
    weights = state.weights()
    sums = _add(
      self._terms(weights, batch, self._counts, number)
      for number, batch in self._batches()
    )
    return objective.means(sums, "dev")

  def _batches(self) -> Iterator[tuple[jax.Array, dict[str, jax.Array]]]:
    count = self._run.log.dev_batches
    for number, batch in enumerate(self._data.batches(0, count)):
      yield jnp.int32(number), sharding.shard_batch(batch, self._mesh)


def _add(trees: Iterator[Any]) -> Any:
  total = next(trees)
  for tree in trees:
    total = jax.tree.map(jnp.add, total, tree)
  return total
