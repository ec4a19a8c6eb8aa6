"""One update, pure: (state, batch) -> (state, metrics).

A stage of the config says which losses count (`objective`) and which
parameters move. A batch may be cut into parts whose gradients are added up,
and an update that would spoil the run is skipped on the device (`optim.guard`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from photochat_jax import captions, objective, optim
from photochat_jax.config import RunConfig
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.objective import Batch, Metrics
from photochat_jax.state import TrainState


def cut(batch: Batch, parts: int) -> Batch:
  """Cuts a batch, [B, ...] -> [parts, B / parts, ...], for a scan over them.

  Each device gives each part an equal share of its own rows, so nothing is
  sent.
  """
  return {
    name: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
    for name, x in batch.items()
  }


def make_train_step(
  model: PhotoChat,
  run: RunConfig,
  stage_index: int,
  start: int,
  optimizer: optax.GradientTransformation,
  empty_tokens: np.ndarray,
  vocabulary_map: Any,
  retokenise: captions.Retokenise | None = None,
  mesh: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The update of one stage, to be jitted with the state donated.

  Args:
    model: the model.
    run: the run.
    stage_index: which of `run.stages`.
    start: the global step at which the stage begins.
    optimizer: of the stage's trainable parameters.
    empty_tokens: int32[m], the empty caption for the text encoder.
    vocabulary_map: of the bridge.
    retokenise: see `objective.loss_terms`.
    mesh: see `objective.loss_terms`.
  """
  stage = run.stages[stage_index]

  def train_step(state: TrainState, batch: Batch):
    step = state.step - start
    counts = objective.count_batch(batch)
    trainable, frozen = optim.split(state.params, stage.trainable)

    def loss_fn(trainable, batch):
      keys = captions.photo_keys(
        run, stage_index, step, batch["example_id"].reshape(-1)
      )
      return objective.loss_terms(
        model,
        run,
        stage,
        optim.merge(trainable, frozen),
        state.latent_scale,
        batch,
        keys,
        step,
        jnp.asarray(empty_tokens),
        vocabulary_map,
        retokenise,
        mesh,
        counts,
      )

    differentiate = jax.grad(loss_fn, has_aux=True)
    if stage.accumulate == 1:
      grads, metrics = differentiate(trainable, batch)
    else:
      parts = cut(batch, stage.accumulate)
      made = jax.eval_shape(
        differentiate, trainable, jax.tree.map(lambda x: x[0], parts)
      )
      (grads, metrics), _ = jax.lax.scan(
        lambda sums, part: (
          jax.tree.map(jnp.add, sums, differentiate(trainable, part)),
          None,
        ),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made),
        parts,
      )
    updates, opt_state = optimizer.update(
      grads, state.opt_state, trainable, loss=metrics["loss"]
    )
    good = opt_state.skipped == 0
    params = optim.merge(
      optim.choose(
        good, optax.apply_updates(trainable, updates), trainable
      ),
      frozen,
    )
    ema = jax.tree.map(
      lambda old, new: jnp.where(
        good, old + (1.0 - run.ema.decay) * (new - old), old
      ),
      state.ema,
      {part: params[part] for part in state.ema},
    )
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["skipped"] = opt_state.skipped
    return (
      TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=ema,
        latent_scale=state.latent_scale,
      ),
      metrics,
    )

  return train_step


def make_draw_step(
  model: PhotoChat, run: RunConfig, stage_index: int, start: int
) -> Callable[[TrainState, Batch], jax.Array]:
  """The first pass of `bridge.retokenise='two_pass'`: captions, int32[X, n].

  The trainer tokenises them on the host and hands them to the train step in
  the batch.
  """

  def draw_step(state: TrainState, batch: Batch) -> jax.Array:
    keys = captions.photo_keys(
      run, stage_index, state.step - start, batch["example_id"].reshape(-1)
    )
    hidden = objective.converse(model, state.params, batch)
    logits = objective.caption_logits(
      model, state.params, hidden, batch["caption_index"]
    )
    return captions.draw_captions(
      run, logits, objective.flatten_photos(batch), keys
    )

  return draw_step
