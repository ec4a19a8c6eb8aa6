"""The samplers' numbers: each the plan of a class of diffusers, call by call.

Letters: x latents, T training steps, `now` and `after` the abar (or the noise
level sigma / signal) at which a call starts and to which it leads.
"""

import numpy as np

from photochat_jax.diffusion import plans, schedule
from photochat_jax.diffusion.plans import Plan
from photochat_jax.diffusion.schedule import ScheduleConfig


def ddpm(config: ScheduleConfig, num_steps: int) -> Plan:
  """Ancestral sampling (arXiv:2006.11239, equation 7): `DDPMScheduler`."""
  visited = plans.timesteps(config, num_steps)
  ac = schedule.alphas_cumprod(config, np.float64)
  now, after = ac[visited], np.append(ac[visited[1:]], 1.0)
  alpha = now / after
  if config.variance_type == "fixed_large":
    variance = 1 - alpha
  else:
    variance = (1 - after) / (1 - now) * (1 - alpha)
  return plans.make(
    visited,
    now,
    latents=np.sqrt(alpha) * (1 - after) / (1 - now),
    x0=np.sqrt(after) * (1 - alpha) / (1 - now),
    fresh=np.sqrt(variance) * (visited > 0),
    clip=_clip(config),
  )


def ddim(config: ScheduleConfig, num_steps: int, eta: float = 0.0) -> Plan:
  """Equation 12 of arXiv:2010.02502: `DDIMScheduler`.

  Args:
    config: the schedule.
    num_steps: denoiser calls.
    eta: 0 is deterministic, 1 has the variance of DDPM.
  """
  visited = plans.timesteps(config, num_steps)
  ac = schedule.alphas_cumprod(config, np.float64)
  now = ac[visited]
  after = _ac_at(config, visited - config.num_train_timesteps // num_steps)
  variance = (1 - after) / (1 - now) * (1 - now / after) * eta**2
  return plans.make(
    visited,
    now,
    x0=np.sqrt(after),
    eps=np.sqrt(1 - after - variance),
    fresh=np.sqrt(variance),
    clip=_clip(config),
  )


_ADAMS_BASHFORTH = (
  np.array([1.0]),
  np.array([3, -1]) / 2,
  np.array([23, -16, 5]) / 12,
  np.array([55, -59, 37, -9]) / 24,
)


def pndm(config: ScheduleConfig, num_steps: int) -> Plan:
  """Linear multistep of order 4 (arXiv:2202.09778): `PNDMScheduler`.

  It begins with three steps of Runge-Kutta, four calls each, or, where these
  are skipped, by taking the first step twice.
  """
  steps = plans.timesteps(config, num_steps)
  stride = config.num_train_timesteps // num_steps
  # Of each call: the step told, from where to where x goes, whether x is a new
  # anchor, weights of outputs; and the calls which the multistep rule uses.
  if config.skip_prk_steps:
    calls = [(steps[0], steps[0], steps[0] - stride, True, [1.0])]
    if num_steps > 1:
      again = steps[1]
      calls.append((again, again + stride, again, False, [0.5, 0.5]))
    used, rest = [0], steps[1:]
  else:
    if num_steps < 4:
      raise ValueError(
        f"num_steps is {num_steps}, of which skip_prk_steps=False needs 4 or "
        "more."
      )
    calls, half = [], stride // 2
    for start, end in zip(steps[:3], steps[1:4], strict=True):
      middle = end + half
      calls += [
        (start, start, start - half, True, [1.0]),
        (middle, start, middle, False, [1.0]),
        (middle, start, middle - half, False, [1.0]),
        (end, start, end, False, [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
      ]
    used, rest = [0, 4, 8], steps[3:]
  for step in rest:
    used = [*used[-3:], len(calls)]
    weights = np.zeros(used[-1] - used[0] + 1)
    weights[used[-1] - np.array(used[::-1])] = _ADAMS_BASHFORTH[len(used) - 1]
    calls.append((step, step, step - stride, True, weights))

  told, source, target, anchors, weights = zip(*calls, strict=True)
  outputs = np.zeros((len(calls), max(map(len, weights))))
  for row, values in zip(outputs, weights, strict=True):
    row[: len(values)] = values
  now = _ac_at(config, np.array(source))
  after = _ac_at(config, np.array(target))
  return plans.make(
    np.array(told),
    now,
    outputs=outputs,
    anchors=np.array(anchors),
    latents=np.sqrt(after / now),
    eps=(now - after)
    / (now * np.sqrt(1 - after) + np.sqrt(now * (1 - now) * after)),
  )


def euler(config: ScheduleConfig, num_steps: int) -> Plan:
  """Algorithm 2 of arXiv:2206.00364, no churn: `EulerDiscreteScheduler`.

  There latents grow with the noise, x_0 + s eps, s to 4,096, and the denoiser
  sees them over sqrt(s^2 + 1). Here they are always so divided, which saves
  float32 from large numbers.
  """
  times = plans.spread(config, num_steps)
  train = _train_sigmas(config)
  every = np.arange(len(train))
  if config.interpolation_type == "linear":
    sigmas = np.interp(times, every, train)
  else:
    sigmas = np.geomspace(train[-1], train[0], num_steps + 1)
  if config.use_karras_sigmas:
    sigmas = _karras(sigmas[0], sigmas[-1], num_steps)
    times = np.interp(np.log(sigmas), np.log(train), every)
  sigmas = np.append(sigmas, _last_sigma(config, train))
  largest = sigmas.max()
  now, after = sigmas[:num_steps], sigmas[1 : num_steps + 1]
  norms = np.sqrt(now**2 + 1)
  norms_after = np.append(norms[1:], 1.0)  # What comes out is not divided.
  initial = largest / norms[0]
  if config.timestep_spacing == "leading":
    initial = np.sqrt(largest**2 + 1) / norms[0]
  return plans.make(
    times.astype(np.float32),
    1 / norms**2,
    latents=after / now * norms / norms_after,
    x0=(1 - after / now) / norms_after,
    initial=float(initial),
  )


def dpm_solver(config: ScheduleConfig, num_steps: int) -> Plan:
  """DPM-Solver++ 2M (arXiv:2211.01095): `DPMSolverMultistepScheduler`."""
  train = _train_sigmas(config)
  last = len(train)
  if config.lambda_min_clipped is not None:
    last = int(np.sum(-np.log(train) >= config.lambda_min_clipped))
  if config.timestep_spacing == "trailing":
    times = plans.spread(config, num_steps, last)
    times = times[times >= 0]
  else:
    plans.check(num_steps, last - 1, "training steps but the first")
    times = plans.spread(config, num_steps + 1, last)[:-1]
  times = np.round(times)
  if config.use_karras_sigmas:
    sigmas = _karras(train[-1], train[0], num_steps)
    times = np.interp(np.log(sigmas), np.log(train), np.arange(len(train)))
    if config.beta_schedule != "squaredcos_cap_v2":
      times = np.round(times)
  else:
    sigmas = train[times.astype(int)]
  sigmas = np.append(sigmas, _last_sigma(config, train))

  now, after = sigmas[:-1], sigmas[1:]
  signal_after = 1 / np.sqrt(after**2 + 1)
  with np.errstate(divide="ignore"):  # log(0): no noise is left.
    step = np.log(now) - np.log(after)  # In lambda, equation 9's h.
  # Equation 9: x_0's own weight, and that of its slope over one step.
  x0 = -signal_after * np.expm1(-step)
  slope = 0.5 * x0
  if config.solver_type == "heun":
    with np.errstate(invalid="ignore"):  # 0 / 0 where two levels are equal.
      slope = signal_after * np.nan_to_num(np.expm1(-step) / step + 1)
  first_order = np.full(len(now), config.solver_order == 1)
  first_order[0] = True
  few = config.lower_order_final and len(now) < 15
  if config.euler_at_final or few or config.final_sigmas_type == "zero":
    first_order[-1] = True
  before = np.append(1.0, step[:-1])  # The first row has none before it.
  slope = np.where(first_order, 0.0, slope * step / before)
  return plans.make(
    times.astype(np.int32),
    1 / (now**2 + 1),
    latents=(after * signal_after) / (now / np.sqrt(now**2 + 1)),
    x0=np.stack([x0 + slope, -slope], axis=1),
  )


def lcm(config: ScheduleConfig, num_steps: int) -> Plan:
  """Multistep consistency sampling (arXiv:2310.04378): `LCMScheduler`."""
  origin = config.original_inference_steps
  stride = config.num_train_timesteps // origin if origin > 0 else 0
  if stride < 1:
    raise ValueError(
      f"original_inference_steps is {origin}; choose between 1 and the "
      f"{config.num_train_timesteps} training steps."
    )
  plans.check(num_steps, origin, "steps of original_inference_steps")
  index = np.floor(np.linspace(0, origin, num_steps, endpoint=False))
  visited = ((origin - index) * stride - 1).astype(np.int32)
  now = schedule.alphas_cumprod(config, np.float64)[visited]
  after = np.append(now[1:], 1.0)
  scaled = visited * config.timestep_scaling
  norm = np.sqrt(scaled**2 + 0.5**2)  # The data's deviation, 0.5.
  return plans.make(
    visited,
    now,
    latents=np.sqrt(after) * (0.5 / norm) ** 2,
    x0=np.sqrt(after) * scaled / norm,
    fresh=np.sqrt(1 - after),
    clip=_clip(config),
  )


def _ac_at(config, steps) -> np.ndarray:
  """abar of training steps; below 0 that with which sampling ends."""
  ac = schedule.alphas_cumprod(config, np.float64)
  end = 1.0 if config.set_alpha_to_one else ac[0]
  return np.where(steps >= 0, ac[np.maximum(steps, 0)], end)


def _clip(config):
  return config.clip_sample_range if config.clip_sample else None


def _train_sigmas(config) -> np.ndarray:
  """float64[T]: noise over signal of every training step, rising."""
  ac = schedule.alphas_cumprod(config, np.float64)
  if config.rescale_zero_terminal_snr:
    ac[-1] = 2.0**-24  # As little signal as diffusers leaves, for none.
  return np.sqrt((1 - ac) / ac)


def _last_sigma(config, train) -> float:
  return 0.0 if config.final_sigmas_type == "zero" else train[0]


def _karras(first, last, count, rho=7.0) -> np.ndarray:
  """Equation 5 of arXiv:2206.00364: `count` noise levels, falling."""
  return np.linspace(first ** (1 / rho), last ** (1 / rho), count) ** rho
