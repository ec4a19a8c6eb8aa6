"""Drawing latents: the diffusion run backwards, as one scan.

Letters: B photos, h and w latent rows and columns, C channels, m context
positions, D context width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from photochat_jax.diffusion import schedule

Denoise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def timesteps(config: schedule.ScheduleConfig, num_steps: int) -> np.ndarray:
  """Training steps that a sampler of `num_steps` visits, falling.

  The three spacings are diffusers' (table 2 of arXiv:2305.08891).

  Args:
    config: the schedule.
    num_steps: how many to visit.

  Returns:
    int32[num_steps].

  Raises:
    ValueError: there are not that many training steps.
  """
  total = config.num_train_timesteps
  if not 1 <= num_steps <= total:
    raise ValueError(
      f"num_steps is {num_steps}; choose between 1 and the "
      f"{total} training steps."
    )
  if config.timestep_spacing == "linspace":
    steps = np.linspace(0, total - 1, num_steps).round()[::-1]
  elif config.timestep_spacing == "leading":
    steps = np.arange(num_steps)[::-1] * (total // num_steps)
    steps = steps + config.steps_offset
  else:
    # An index, not a running sum: rounding must not add or lose a step.
    steps = np.round(total - np.arange(num_steps) * (total / num_steps)) - 1
  if steps[0] >= total:
    raise ValueError(
      f"{num_steps} leading steps with steps_offset {config.steps_offset} "
      f"pass the last of {total}; choose fewer steps or spacing trailing."
    )
  return steps.astype(np.int32)


def ddim(
  config: schedule.ScheduleConfig,
  denoise: Denoise,
  noise: jax.Array,
  num_steps: int,
  eta: float = 0.0,
  guidance_scale: float = 1.0,
  context: jax.Array | None = None,
  uncond_context: jax.Array | None = None,
  keys: jax.Array | None = None,
) -> jax.Array:
  """Draws latents by DDIM (arXiv:2010.02502, equation 12).

  Follows diffusers' `DDIMScheduler` step for step. With `uncond_context`, the
  prediction is guided (arXiv:2207.12598), both halves in one batch.

  Args:
    config: the schedule the UNet was trained with.
    denoise: (latents [N, h, w, C], timesteps int32[N], context [N, m, D]) ->
      the UNet's output [N, h, w, C]; N is B, or 2 B when guided.
    noise: [B, h, w, C] standard normal.
    num_steps: denoiser calls.
    eta: 0 is deterministic, 1 has the variance of DDPM.
    guidance_scale: 1 is the conditional prediction alone.
    context: [B, m, D] text to draw.
    uncond_context: [B, m, D] or [1, m, D], the empty text.
    keys: [B] random keys, one for each photo, needed when eta is not 0. Step i
      draws from fold_in(key, i).

  Returns:
    [B, h, w, C] clean latents, float32.

  Raises:
    ValueError: guidance without `uncond_context`, or eta without `keys`.
  """
  if uncond_context is None and not _is(guidance_scale, 1.0):
    raise ValueError(
      f"guidance_scale {guidance_scale} needs uncond_context, the encoded "
      "empty caption."
    )
  stochastic = not _is(eta, 0.0)
  if stochastic and keys is None:
    raise ValueError(f"eta {eta} needs keys, one random key for each photo.")

  guided = uncond_context is not None and not _is(guidance_scale, 1.0)
  if guided:
    uncond_context = jnp.broadcast_to(uncond_context, context.shape)
    context = jnp.concatenate([uncond_context, context])

  def predict(latents, t):
    if not guided:
      times = jnp.full(latents.shape[0], t)
      return denoise(latents, times, context).astype(jnp.float32)
    latents = jnp.concatenate([latents, latents])
    out = denoise(latents, jnp.full(latents.shape[0], t), context)
    uncond, cond = jnp.split(out.astype(jnp.float32), 2)
    return uncond + guidance_scale * (cond - uncond)

  def step(latents, inputs):
    index, t, ac_t, ac_next = inputs
    x0, eps = schedule.to_x0_eps(config, ac_t, latents, predict(latents, t))
    if config.clip_sample:
      x0 = jnp.clip(x0, -1.0, 1.0)
    if not stochastic:
      return jnp.sqrt(ac_next) * x0 + jnp.sqrt(1 - ac_next) * eps, None
    var = (1 - ac_next) / (1 - ac_t) * (1 - ac_t / ac_next) * eta**2
    mean = jnp.sqrt(ac_next) * x0 + jnp.sqrt(1 - ac_next - var) * eps
    fresh = jax.vmap(
      lambda key: jax.random.normal(
        jax.random.fold_in(key, index), latents.shape[1:]
      )
    )(keys)
    return mean + jnp.sqrt(var) * fresh, None

  visited = timesteps(config, num_steps)
  ac = schedule.alphas_cumprod(config)
  following = visited - config.num_train_timesteps // num_steps
  last = np.float32(1.0) if config.set_alpha_to_one else ac[0]
  ac_next = np.where(following >= 0, ac[np.maximum(following, 0)], last)
  inputs = (np.arange(num_steps), visited, ac[visited], ac_next)
  latents, _ = jax.lax.scan(step, noise.astype(jnp.float32), inputs)
  return latents


def _is(value, number):
  """Whether a setting is known now, outside jit, to be this number."""
  return isinstance(value, (int, float)) and value == number
