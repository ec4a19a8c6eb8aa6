"""One update, pure: (state, batch) -> (state, metrics).

The same function trains the autoencoder alone, the generator alone, the
language model with its eyes, and everything jointly: a stage of the config
says which losses count and which parameters move. It knows no tokenizer and no
file; what draws its own captions (`bridge.draw` of `argmax` and `gumbel`) is
handed the function that tokenises them.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
import jax.numpy as jnp
import numpy as np
import optax

from photochat_jax import losses
from photochat_jax import optim
from photochat_jax.config import RunConfig
from photochat_jax.config import StageConfig
from photochat_jax.models import bridge as bridge_lib
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.models.photochat import to_signed
from photochat_jax.state import TrainState

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]

# What each photo's random numbers are for.
DROPOUT, POSTERIOR, DIFFUSION, GUMBEL = range(4)

# (y int32[X, n], mask bool[X, n]) -> clip_tokens int32[X, m],
# alignment float32[X, m, n], final bool[X, n]; on the host.
Retokenise = Callable[
  [np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]
]


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


def _keys_for(keys: jax.Array, purpose: int) -> jax.Array:
  return jax.vmap(lambda k: jax.random.fold_in(k, purpose))(keys)


def flatten_photos(batch: Batch) -> Batch:
  """The batch's photos to draw, [B, Q, ...] -> [B * Q, ...]."""
  names = (
    "photos_out",
    "photos_out_mask",
    "example_id",
    "clip_tokens",
    "alignment",
    "caption_tokens",
    "caption_mask",
    "caption_final",
  )
  return {
    name: batch[name].reshape(-1, *batch[name].shape[2:])
    for name in names
    if name in batch
  }


def caption_logits(
  model: PhotoChat, params: Any, hidden: jax.Array, caption_index: jax.Array
) -> jax.Array:
  """Logits that predict the captions' tokens.

  Args:
    model: the model.
    params: its parameters.
    hidden: [B, L, D].
    caption_index: int32[B, Q, n], the positions that predict them.

  Returns:
    float32[B * Q, n, V].
  """
  rows, photos, n = caption_index.shape
  index = caption_index.reshape(rows, photos * n, 1)
  gathered = jnp.take_along_axis(hidden, index, axis=1)
  gathered = gathered.reshape(rows * photos, n, hidden.shape[-1])
  return model.logits(params, gathered)


def converse(
  model: PhotoChat, params: Any, batch: Batch
) -> jax.Array:
  """Hidden states [B, L, D] of a batch of dialogues, photos seen."""
  hidden, _ = model.converse(
    params,
    batch["tokens"],
    batch["positions"],
    batch["segments"],
    model.perceive(params, batch["photos_in"]),
    batch["visual_index"],
  )
  return hidden


def photo_context(
  model: PhotoChat,
  run: RunConfig,
  params: Any,
  photos: Batch,
  logits: jax.Array | None,
  empty_tokens: jax.Array,
  vocabulary_map: Any,
  keys: jax.Array,
  tau: jax.Array | float,
) -> jax.Array:
  """What the UNet attends to, [X, m, d]: captions, some of them dropped.

  Args:
    model: the model.
    run: the run.
    params: the parameters.
    photos: from `flatten_photos`, captions drawn already.
    logits: [X, n, V] where the language model wrote the captions, else None.
    empty_tokens: int32[m], the empty caption.
    vocabulary_map: of the bridge.
    keys: [X], each photo's.
    tau: the bridge's temperature.
  """
  if logits is None:
    embeddings = model.embed_caption(params, photos["clip_tokens"])
  else:
    noisy = run.bridge.draw == "gumbel"
    embeddings = model.bridge(
      params,
      logits,
      {
        "tokens": photos["caption_tokens"],
        "mask": photos["caption_mask"],
        "clip_tokens": photos["clip_tokens"],
        "alignment": photos["alignment"],
        "final": photos["caption_final"],
      },
      vocabulary_map,
      _keys_for(keys, GUMBEL) if noisy else None,
      tau,
    )
  empty = model.embed_caption(params, empty_tokens[None])
  dropped = jax.vmap(
    lambda k: jax.random.bernoulli(k, run.loss.caption_dropout)
  )(_keys_for(keys, DROPOUT))
  embeddings = jnp.where(dropped[:, None, None], empty, embeddings)
  return model.read_caption(params, embeddings)


def sample_latents(
  mean: jax.Array, logvar: jax.Array, keys: jax.Array
) -> jax.Array:
  """Draws from the autoencoder's posterior, [X, h, w, C]."""
  noise = jax.vmap(
    lambda k, x: jax.random.normal(k, x.shape, x.dtype)
  )(_keys_for(keys, POSTERIOR), mean)
  return mean + jnp.exp(0.5 * logvar) * noise


def draw_captions(
  run: RunConfig, logits: jax.Array, photos: Batch, keys: jax.Array
) -> jax.Array:
  """The caption the forward pass carries, int32[X, n] (gold prefix).

  Drawn per position, given the gold caption before it: not a free sample.
  """
  y = bridge_lib.draw_tokens(run.bridge, logits, _keys_for(keys, GUMBEL))
  return jnp.where(photos["caption_mask"], y, photos["caption_tokens"])


def retokenise_in_program(
  retokenise: Retokenise, mesh: Any, y: jax.Array, mask: jax.Array, m: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Calls the tokenizer from the program, each device for its own photos."""

  def call(y, mask):
    x, n = y.shape
    shapes = (
      jax.ShapeDtypeStruct((x, m), jnp.int32),
      jax.ShapeDtypeStruct((x, m, n), jnp.float32),
      jax.ShapeDtypeStruct((x, n), jnp.bool_),
    )
    return jax.pure_callback(
      lambda y, mask: retokenise(np.asarray(y), np.asarray(mask)),
      shapes,
      y,
      mask,
    )

  rows = PartitionSpec(("data", "fsdp"))
  return jax.shard_map(
    call,
    mesh=mesh,
    in_specs=(rows, rows),
    out_specs=(rows, rows, rows),
    check_vma=False,
  )(y, mask)


def loss_terms(
  model: PhotoChat,
  run: RunConfig,
  stage: StageConfig,
  params: Any,
  latent_scale: jax.Array,
  batch: Batch,
  keys: jax.Array,
  step: jax.Array,
  empty_tokens: jax.Array,
  vocabulary_map: Any,
  retokenise: Retokenise | None = None,
  mesh: Any = None,
) -> tuple[jax.Array, Metrics]:
  """The stage's weighted loss and what it is made of.

  Args:
    model: the model.
    run: the run.
    stage: which losses count.
    params: all parameters.
    latent_scale: scalar.
    batch: of the stage's kind (`data.pipeline`).
    keys: [X], each photo's.
    step: step within the stage.
    empty_tokens: int32[m].
    vocabulary_map: of the bridge.
    retokenise: tokenises drawn captions inside the program; None where the
      batch carries the captions to use.
    mesh: the mesh, needed by `retokenise`.
  """
  weights = {
    name: losses.scheduled(value, step)
    for name, value in vars(stage.losses).items()
    if value
  }
  photos = flatten_photos(batch)
  metrics = {}
  total = jnp.zeros(())

  hidden = None
  if "tokens" in batch:
    hidden = converse(model, params, batch)
    if {"text", "caption"} & set(weights):
      text, sums = losses.next_token(
        lambda h: model.logits(params, h),
        hidden,
        batch["tokens"],
        batch["loss_kind"],
        {
          losses.TEXT: weights.get("text", 0.0) * run.loss.text,
          losses.CAPTION: weights.get("caption", 0.0) * run.loss.caption,
        },
        run.loss.chunk,
      )
      total += text
      metrics |= sums

  if "autoencoder" in weights:
    mean, logvar = model.encode_photo(params, photos["photos_out"])
    decoded = model.decode_photo(params, sample_latents(mean, logvar, keys))
    metrics["autoencoder"] = losses.autoencoder(
      to_signed(photos["photos_out"]),
      decoded,
      mean,
      logvar,
      photos["photos_out_mask"],
      run.loss.kl,
    )
    total += weights["autoencoder"] * run.loss.autoencoder * (
      metrics["autoencoder"]
    )

  if "photo" in weights:
    logits = None
    if hidden is not None:
      logits = caption_logits(model, params, hidden, batch["caption_index"])
      if retokenise is not None:
        y = draw_captions(run, logits, photos, keys)
        z, alignment, final = retokenise_in_program(
          retokenise, mesh, y, photos["caption_mask"], empty_tokens.shape[0]
        )
        photos |= {
          "caption_tokens": y,
          "clip_tokens": z,
          "alignment": alignment,
          "caption_final": final,
        }
    context = photo_context(
      model,
      run,
      params,
      photos,
      logits,
      empty_tokens,
      vocabulary_map,
      keys,
      losses.scheduled(run.bridge.tau, step),
    )
    mean, logvar = model.encode_photo(params, photos["photos_out"])
    metrics["photo"] = losses.diffusion(
      model.config.schedule,
      lambda x, t: model.denoise(params, x, t, context),
      sample_latents(mean, logvar, keys) * latent_scale,
      photos["photos_out_mask"],
      _keys_for(keys, DIFFUSION),
      run.loss.min_snr_gamma or None,
    )
    total += weights["photo"] * run.loss.photo * metrics["photo"]
  return total, metrics | {"loss": total}


def make_train_step(
  model: PhotoChat,
  run: RunConfig,
  stage_index: int,
  start: int,
  optimizer: optax.GradientTransformation,
  empty_tokens: np.ndarray,
  vocabulary_map: Any,
  retokenise: Retokenise | None = None,
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
    retokenise: see `loss_terms`.
    mesh: see `loss_terms`.
  """
  stage = run.stages[stage_index]

  def train_step(state: TrainState, batch: Batch):
    step = state.step - start
    keys = photo_keys(
      run, stage_index, step, batch["example_id"].reshape(-1)
    )
    trainable, frozen = optim.split(state.params, stage.trainable)

    def loss_fn(trainable):
      return loss_terms(
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
      )

    grads, metrics = jax.grad(loss_fn, has_aux=True)(trainable)
    updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
    params = optim.merge(optax.apply_updates(trainable, updates), frozen)
    ema = jax.tree.map(
      lambda old, new: old + (1.0 - run.ema.decay) * (new - old),
      state.ema,
      {part: params[part] for part in state.ema},
    )
    metrics["grad_norm"] = optax.tree.norm(grads)
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
    keys = photo_keys(
      run, stage_index, state.step - start, batch["example_id"].reshape(-1)
    )
    hidden = converse(model, state.params, batch)
    logits = caption_logits(
      model, state.params, hidden, batch["caption_index"]
    )
    return draw_captions(run, logits, flatten_photos(batch), keys)

  return draw_step
