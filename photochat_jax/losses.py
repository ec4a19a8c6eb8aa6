"""The two losses of the paper, the autoencoder's, and their weights.

Every loss is a sum over what counts divided by the number of what counts in
the *global* batch (`count`), so it does not depend on how the batch is cut:
the losses of its parts add up to that of the whole.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from photochat_jax.diffusion import schedule as schedule_lib

# Values of a batch's `loss_kind`.
TEXT, CAPTION = 1, 2

# A weight or a temperature: a number, or ((step, value), ...) between which
# it is interpolated linearly.
Schedule = float | tuple[tuple[int, float], ...]


def scheduled(value: Schedule, step: jax.Array) -> jax.Array | float:
  """A schedule's value at a step of its stage."""
  if not isinstance(value, tuple):
    return value
  steps, values = zip(*value, strict=True)
  return jnp.interp(
    step.astype(jnp.float32),
    jnp.asarray(steps, jnp.float32),
    jnp.asarray(values, jnp.float32),
  )


def next_token(
  logits_fn: Callable[[jax.Array], jax.Array],
  hidden: jax.Array,
  tokens: jax.Array,
  loss_kind: jax.Array,
  weights: dict[int, Any],
  count: jax.Array,
  chunk: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross-entropy of the next token over those that bear a loss.

  Args:
    logits_fn: hidden states [B, c, D] -> float32 logits [B, c, V].
    hidden: [B, L, D].
    tokens: int32[B, L]; the target of position t is token t + 1.
    loss_kind: int8[B, L], aligned with the target: 0, `TEXT` or `CAPTION`.
    weights: weight of each kind.
    count: tokens of the global batch that bear a loss, see `count_tokens`.
    chunk: positions of a row whose logits exist at a time; 0 takes all at
      once. Rows are not cut, so that they stay divided over devices.

  Returns:
    The weighted sum over loss-bearing tokens divided by `count`, and the sums
    from which means and perplexity follow: `text_nats`, `text_tokens`,
    `caption_nats`, `caption_tokens`.
  """
  # The last position of a row predicts nothing.
  hidden, targets, kind = hidden[:, :-1], tokens[:, 1:], loss_kind[:, 1:]
  rows, length, dim = hidden.shape

  def nats(hidden, targets):
    logits = logits_fn(hidden)
    gold = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - gold

  if chunk and chunk < length:
    # Recomputed in the backward pass: only one chunk's logits ever exist.
    extra = -length % chunk
    loss = jax.lax.map(
      jax.checkpoint(lambda x: nats(*x)),
      (
        jnp.pad(hidden, ((0, 0), (0, extra), (0, 0)))
        .reshape(rows, -1, chunk, dim)
        .swapaxes(0, 1),
        jnp.pad(targets, ((0, 0), (0, extra)))
        .reshape(rows, -1, chunk)
        .swapaxes(0, 1),
      ),
    )
    loss = loss.swapaxes(0, 1).reshape(rows, -1)[:, :length]
  else:
    loss = nats(hidden, targets)

  sums = {}
  total = jnp.zeros(())
  for name, k in (("text", TEXT), ("caption", CAPTION)):
    mask = kind == k
    sums[f"{name}_nats"] = jnp.sum(jnp.where(mask, loss, 0.0))
    sums[f"{name}_tokens"] = jnp.sum(mask)
    total = total + weights[k] * sums[f"{name}_nats"]
  return total / jnp.maximum(count, 1), sums


def count_tokens(loss_kind: jax.Array) -> jax.Array:
  """Tokens of int8[B, L] that bear a loss in `next_token`."""
  return jnp.sum(loss_kind[:, 1:] > 0)


def diffusion(
  config: schedule_lib.ScheduleConfig,
  denoise: Callable[[jax.Array, jax.Array], jax.Array],
  latents: jax.Array,
  keys: jax.Array,
  min_snr_gamma: float | None,
) -> jax.Array:
  """The generator's loss of each photo [X]: its prediction's squared error.

  Args:
    config: the noise schedule.
    denoise: (noisy latents [X, h, w, C], steps [X]) -> prediction.
    latents: [X, h, w, C], scaled.
    keys: [X], one for each photo.
    min_snr_gamma: gamma of min-SNR weighting (Hang et al. 2023), or None.
  """
  ac = schedule_lib.alphas_cumprod(config)

  def draw(key, x):
    k_t, k_noise = jax.random.split(key)
    t = jax.random.randint(k_t, (), 0, config.num_train_timesteps)
    return t, jax.random.normal(k_noise, x.shape, x.dtype)

  t, noise = jax.vmap(draw)(keys, latents)
  noisy = schedule_lib.add_noise(ac, latents, noise, t)
  wanted = schedule_lib.target(config, ac, latents, noise, t)
  error = jnp.mean((denoise(noisy, t) - wanted) ** 2, axis=(1, 2, 3))
  return error * schedule_lib.snr_weight(config, ac, t, min_snr_gamma)


def leave_one_out(errors: jax.Array, log_probs: jax.Array) -> jax.Array:
  """RLOO (Kool et al. 2019): samples better than the others are reinforced.

  Args:
    errors: [X, K], what each of a photo's samples costs; a constant here.
    log_probs: [X, K], the samples' log-probability in nats.

  Returns:
    [X]: zeros, whose gradient in the log-probabilities' parameters estimates
    that of the expected error without bias.
  """
  count = errors.shape[-1]
  others = (jnp.sum(errors, -1, keepdims=True) - errors) / (count - 1)
  advantages = jax.lax.stop_gradient(errors - others)
  surrogate = jnp.mean(advantages * log_probs, axis=-1)
  return surrogate - jax.lax.stop_gradient(surrogate)


def autoencoder(
  photos: jax.Array,
  decoded: jax.Array,
  mean: jax.Array,
  logvar: jax.Array,
  mask: jax.Array,
  count: jax.Array,
  kl_weight: float,
) -> jax.Array:
  """Squared reconstruction error plus the weighted Kullback-Leibler term.

  Args:
    photos: [X, H, W, 3] in [-1, 1].
    decoded: the reconstruction, likewise.
    mean: [X, h, w, C] of the posterior.
    logvar: its log-variance.
    mask: bool[X], which photos there are.
    count: photos there are in the global batch.
    kl_weight: weight of the mean KL per latent number, in nats.
  """
  error = jnp.mean((decoded - photos) ** 2, axis=(1, 2, 3))
  kl = 0.5 * jnp.mean(
    mean**2 + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3)
  )
  return masked_mean(error + kl_weight * kl, mask, count)


def masked_mean(
  values: jax.Array, mask: jax.Array, count: jax.Array
) -> jax.Array:
  """Sum of values[X] where mask[X], over `count`; 0 where nothing counts."""
  return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(count, 1)
