"""What a stage minimises, pure: (parameters, batch) -> (loss, metrics).

The same function serves the autoencoder alone, the generator alone, the
language model with its eyes, and everything jointly: a stage of the config
says which losses count. It knows no tokenizer and no file; what draws its own
captions (`bridge.draw` of `argmax` and `gumbel`) is handed the function that
tokenises them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from photochat_jax import captions, losses
from photochat_jax.config import RunConfig, StageConfig
from photochat_jax.models import vae
from photochat_jax.models.photochat import PhotoChat, to_signed

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


def flatten_photos(batch: Batch) -> Batch:
  """The batch's photos to draw, [B, Q, ...] -> [B * Q, ...]."""
  names = (
    "photos_out",
    "moments",
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


def caption_log_probs(
  logits: jax.Array, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
  """Log-probability, in nats, of captions under the logits of one prefix.

  Args:
    logits: [X, n, V].
    tokens: int32[X * K, n], a photo's samples one after the other.
    mask: bool[X, n]: positions that hold a caption token.

  Returns:
    float32[X, K].
  """
  rows, n, _ = logits.shape
  tokens = tokens.reshape(rows, -1, n)
  # -inf where padded entries fill a row that nothing is asked of.
  logits = jnp.where(mask[..., None], logits.astype(jnp.float32), 0.0)
  own = jnp.take_along_axis(logits, tokens.swapaxes(1, 2), axis=-1)
  nats = jax.nn.logsumexp(logits, axis=-1, keepdims=True) - own
  return -jnp.sum(jnp.where(mask[..., None], nats, 0.0), axis=1)


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
      captions.keys_for(keys, captions.GUMBEL) if noisy else None,
      tau,
    )
  empty = model.embed_caption(params, empty_tokens[None])
  dropped = jax.vmap(
    lambda k: jax.random.bernoulli(k, run.loss.caption_dropout)
  )(captions.keys_for(keys, captions.DROPOUT))
  embeddings = jnp.where(dropped[:, None, None], empty, embeddings)
  return model.read_caption(params, embeddings)


def photo_moments(
  model: PhotoChat, params: Any, photos: Batch
) -> tuple[jax.Array, jax.Array]:
  """Mean and log-variance [X, h, w, C] of photos, precomputed if they are."""
  if "moments" in photos:
    return vae.posterior(photos["moments"])
  return model.encode_photo(params, photos["photos_out"])


def sample_latents(
  mean: jax.Array, logvar: jax.Array, keys: jax.Array
) -> jax.Array:
  """Draws from the autoencoder's posterior, [X, h, w, C]."""
  noise = jax.vmap(
    lambda k, x: jax.random.normal(k, x.shape, x.dtype)
  )(captions.keys_for(keys, captions.POSTERIOR), mean)
  return vae.sample(mean, logvar, noise)


def _repeat(x: jax.Array, count: int) -> jax.Array:
  """[X, ...] -> [X * count, ...], copies one after the other."""
  return x if count == 1 else jnp.repeat(x, count, axis=0)


def _draw_captions(
  run: RunConfig,
  logits: jax.Array,
  photos: Batch,
  keys: jax.Array,
  retokenise: captions.Retokenise,
  mesh: Any,
  slots: int,
) -> Batch:
  """The photos' captions as the language model draws them, tokenised."""
  y = captions.draw_captions(run, logits, photos, keys)
  mask = _repeat(photos["caption_mask"], run.bridge.num_samples)
  z, alignment, final = captions.retokenise_in_program(
    retokenise, mesh, y, mask, slots
  )
  return {
    "caption_tokens": y,
    "clip_tokens": z,
    "alignment": alignment,
    "caption_final": final,
  }


def photo_loss(
  model: PhotoChat,
  run: RunConfig,
  params: Any,
  latent_scale: jax.Array,
  photos: Batch,
  logits: jax.Array | None,
  empty_tokens: jax.Array,
  vocabulary_map: Any,
  keys: jax.Array,
  tau: jax.Array | float,
  count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The generator's loss, and what `rloo` adds to it.

  Args:
    model: the model.
    run: the run.
    params: the parameters.
    latent_scale: scalar.
    photos: from `flatten_photos`; several captions for each photo, one after
      the other, where `rloo` has drawn them.
    logits: [X, n, V] where the language model wrote the captions, else None.
    empty_tokens: int32[m], the empty caption.
    vocabulary_map: of the bridge.
    keys: [X], each photo's; its captions share all that is random about it.
    tau: the bridge's temperature.
    count: photos of the global batch.

  Returns:
    The mean over the photos there are, and zero: its gradient is RLOO's.
  """
  samples = len(photos["clip_tokens"]) // len(keys)
  scored = run.bridge.estimator == "rloo" and logits is not None
  context = photo_context(
    model,
    run,
    params,
    photos,
    None if scored else logits,
    empty_tokens,
    vocabulary_map,
    _repeat(keys, samples),
    tau,
  )
  mean, logvar = photo_moments(model, params, photos)
  latents = sample_latents(mean, logvar, keys) * latent_scale
  noise = captions.keys_for(keys, captions.DIFFUSION)
  errors = losses.diffusion(
    model.config.schedule,
    lambda x, t: model.denoise(params, x, t, context),
    _repeat(latents, samples),
    _repeat(noise, samples),
    run.loss.min_snr_gamma or None,
  ).reshape(-1, samples)
  there = photos["photos_out_mask"], count
  loss, reinforced = losses.masked_mean(errors.mean(-1), *there), jnp.zeros(())
  if scored and samples > 1:
    log_probs = caption_log_probs(
      logits, photos["caption_tokens"], photos["caption_mask"]
    )
    reinforced = losses.masked_mean(
      losses.leave_one_out(errors, log_probs), *there
    )
  return loss, reinforced


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
  retokenise: captions.Retokenise | None = None,
  mesh: Any = None,
  counts: Metrics | None = None,
) -> tuple[jax.Array, Metrics]:
  """The stage's weighted loss and what it is made of.

  The metrics are sums too: those of a batch's parts add up to the batch's.

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
    counts: of the global batch, where this one is a part of it: see
      `count_batch`.
  """
  counts = count_batch(batch) if counts is None else counts
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
        counts["tokens"],
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
      counts["photos"],
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
        photos |= _draw_captions(
          run, logits, photos, keys, retokenise, mesh, len(empty_tokens)
        )
    metrics["photo"], reinforced = photo_loss(
      model,
      run,
      params,
      latent_scale,
      photos,
      logits,
      empty_tokens,
      vocabulary_map,
      keys,
      losses.scheduled(run.bridge.tau, step),
      counts["photos"],
    )
    weight = weights["photo"] * run.loss.photo
    total += weight * (metrics["photo"] + reinforced)
  return total, metrics | {"loss": total}


def count_batch(batch: Batch) -> Metrics:
  """What the losses of a batch are divided by: `tokens`, `photos`."""
  counts = {"photos": jnp.sum(batch["photos_out_mask"])}
  if "loss_kind" in batch:
    counts["tokens"] = losses.count_tokens(batch["loss_kind"])
  return counts


def means(metrics: Metrics, split: str = "train") -> dict[str, float]:
  """A batch's metrics for people: by `split/name`, nats as means a token.

  Fetching them waits for the device.
  """
  numbers = {
    f"{split}/{name}": float(value)
    for name, value in metrics.items()
    if not name.endswith(("_nats", "_tokens"))
  }
  for name in ("text", "caption"):
    if f"{name}_nats" in metrics:
      count = max(float(metrics[f"{name}_tokens"]), 1.0)
      numbers[f"{split}/{name}_loss"] = float(metrics[f"{name}_nats"]) / count
  return numbers
