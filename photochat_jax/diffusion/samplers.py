"""Drawing latents: the diffusion run backwards, as one scan.

Letters: B photos, h and w latent rows and columns, C channels, m context
positions, D context width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from photochat_jax.diffusion import plans, schedule, solvers

Denoise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

SAMPLERS: dict[str, Callable[..., plans.Plan]] = {
  "ddpm": solvers.ddpm,
  "ddim": solvers.ddim,
  "pndm": solvers.pndm,
  "euler": solvers.euler,
  "dpm++2m": solvers.dpm_solver,
  "lcm": solvers.lcm,
}
"""Samplers by name: (config, num_steps) -> plan; 'ddim' takes eta too."""


def plan(
  config: schedule.ScheduleConfig,
  sampler: str,
  num_steps: int,
  eta: float = 0.0,
) -> plans.Plan:
  """What a sampler will do.

  Raises:
    ValueError: there is no such sampler, or the numbers do not suit it.
  """
  schedule.check_sampler(config, sampler)
  if sampler == "ddim":
    if not 0 <= eta <= 1:
      raise ValueError(f"eta is {eta}; choose between 0 and 1.")
    return solvers.ddim(config, num_steps, eta)
  if eta:
    raise ValueError(f"eta is {eta}, which is for the sampler ddim alone.")
  return SAMPLERS[sampler](config, num_steps)


def sample(
  config: schedule.ScheduleConfig,
  sampler: str,
  denoise: Denoise,
  noise: jax.Array,
  num_steps: int,
  *,
  guidance_scale: float = 1.0,
  context: jax.Array | None = None,
  uncond_context: jax.Array | None = None,
  keys: jax.Array | None = None,
  eta: float = 0.0,
) -> jax.Array:
  """Draws latents.

  With `uncond_context`, the prediction is guided (arXiv:2207.12598), both
  halves in one batch.

  Args:
    config: the schedule the UNet was trained with.
    sampler: a name of `SAMPLERS`.
    denoise: (latents [N, h, w, C], timesteps [N], context [N, m, D]) -> the
      UNet's output [N, h, w, C]; N is B, or 2 B when guided. Timesteps are
      int32, of 'euler' float32.
    noise: [B, h, w, C] standard normal.
    num_steps: denoiser calls; 'pndm' makes a few more.
    guidance_scale: 1 is the conditional prediction alone.
    context: [B, m, D] text to draw.
    uncond_context: [B, m, D] or [1, m, D], the empty text.
    keys: [B] random keys, one for each photo, for samplers that add noise on
      the way. Call i draws from fold_in(key, i).
    eta: the noise of 'ddim', from 0, none, to 1, that of 'ddpm'.

  Returns:
    [B, h, w, C] clean latents, float32.

  Raises:
    ValueError: guidance without `uncond_context`, fresh noise without `keys`,
      or what `plan` raises.
  """
  if uncond_context is None and not _is(guidance_scale, 1.0):
    raise ValueError(
      f"guidance_scale {guidance_scale} needs uncond_context, the encoded "
      "empty caption."
    )
  rows, initial, clip = plan(config, sampler, num_steps, eta)
  stochastic = bool(rows.fresh.any())
  if stochastic and keys is None:
    told = f"eta {eta}" if sampler == "ddim" else f"The sampler {sampler}"
    raise ValueError(f"{told} needs keys, one random key for each photo.")

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

  def step(carry, inputs):
    latents, anchor, outputs, x0s = carry
    index, row = inputs
    out, outputs = _weigh(row.outputs, predict(latents, row.times), outputs)
    anchor = jnp.where(row.anchors, latents, anchor)
    x0, eps = schedule.to_x0_eps(config, row.signal, row.sigma, anchor, out)
    if clip is not None:
      x0 = jnp.clip(x0, -clip, clip)
    x0, x0s = _weigh(row.x0, x0, x0s)
    latents = row.latents * anchor + x0 + row.eps * eps
    if stochastic:
      fresh = jax.vmap(
        lambda key: jax.random.normal(
          jax.random.fold_in(key, index), latents.shape[1:]
        )
      )(keys)
      latents = latents + row.fresh * fresh
    return (latents, anchor, outputs, x0s), None

  latents = initial * noise.astype(jnp.float32)
  older = [
    jnp.zeros((weights.shape[1] - 1, *latents.shape))
    for weights in (rows.outputs, rows.x0)
  ]
  rows = jax.tree.map(_single, rows)
  inputs = (np.arange(len(rows.times)), rows)
  carry, _ = jax.lax.scan(step, (latents, latents, *older), inputs)
  return carry[0]


def _weigh(weights, newest, older):
  """Weighed sum of arrays, newest first, and those that may be used again."""
  recent = jnp.concatenate([newest[None], older])
  # Not a product of matrices, which accelerators would round.
  weights = weights.reshape(-1, *(1,) * newest.ndim)
  return jnp.sum(weights * recent, axis=0), recent[:-1]


def _single(array):
  return array.astype(np.float32) if array.dtype == np.float64 else array


def _is(value, number):
  """Whether a setting is known now, outside jit, to be this number."""
  return isinstance(value, (int, float)) and value == number
