"""The forward diffusion: how much noise at which step, and what to predict.

Letters: T training steps, B photos. abar_t is the cumulative product of
1 - beta (Ho et al. 2020, arXiv:2006.11239); x_t = sqrt(abar_t) x_0 +
sqrt(1 - abar_t) eps.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from photochat_jax.diffusion.scheduler_classes import CLASSES, KNOWN, OUR_NAMES

_CHOICES = {
  "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
  "prediction_type": ("epsilon", "v_prediction", "sample"),
  "timestep_spacing": ("leading", "trailing", "linspace"),
  "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
  "interpolation_type": ("linear", "log_linear"),
  "final_sigmas_type": ("zero", "sigma_min"),
  "solver_order": (1, 2),
  "solver_type": ("midpoint", "heun"),
}


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """Numbers of a noise schedule and of the samplers that go back along it.

  Names and meanings are those of diffusers' scheduler configs. What only some
  samplers read says which.

  Attributes:
    num_train_timesteps: T.
    beta_start: first beta; unused by 'squaredcos_cap_v2'.
    beta_end: last beta; unused by 'squaredcos_cap_v2'.
    beta_schedule: 'linear', 'scaled_linear' (linear in sqrt(beta)) or
      'squaredcos_cap_v2' (cosine, arXiv:2102.09672).
    prediction_type: what the UNet gives: 'epsilon', 'v_prediction'
      (sqrt(abar) eps - sqrt(1 - abar) x_0, arXiv:2202.00512) or 'sample'.
    rescale_zero_terminal_snr: shift the schedule so that abar_T = 0
      (arXiv:2305.08891, algorithm 1); diffusers' `rescale_betas_zero_snr`.
    steps_offset: added to 'leading' sampling steps.
    timestep_spacing: how sampling steps are spread over the T.
    set_alpha_to_one: whether sampling ends at abar = 1, or at abar_0 (ddim,
      pndm).
    clip_sample: clip the predicted x_0 while sampling (ddpm, ddim, lcm).
    trained_betas: all T betas, instead of the schedule above.
    clip_sample_range: where `clip_sample` clips, at plus and minus this.
    variance_type: of ddpm's noise: the posterior's ('fixed_small', of which
      'fixed_small_log' is another name) or beta ('fixed_large').
    skip_prk_steps: whether pndm starts without Runge-Kutta steps.
    use_karras_sigmas: spread the noise levels as arXiv:2206.00364, equation
      5, does (euler, dpm++2m).
    interpolation_type: euler's noise levels between training steps: 'linear',
      or 'log_linear' from the first to the last whatever the spacing.
    final_sigmas_type: whether the last noise level is 'zero' or the smallest
      of training, 'sigma_min' (euler, dpm++2m).
    solver_order: 1 or 2 (dpm++2m).
    solver_type: 'midpoint' or 'heun' (dpm++2m, order 2).
    lower_order_final: end with order 1 if there are fewer than 15 steps
      (dpm++2m).
    euler_at_final: end with order 1 always (dpm++2m).
    lambda_min_clipped: start where the log of sqrt(abar / (1 - abar)) is at
      least this; None for no limit (dpm++2m).
    original_inference_steps: steps of the distilled sampler of which lcm
      takes some.
    timestep_scaling: of lcm's boundary condition (arXiv:2310.04378).
  """

  num_train_timesteps: int = 1000
  beta_start: float = 0.00085
  beta_end: float = 0.012
  beta_schedule: str = "scaled_linear"
  prediction_type: str = "epsilon"
  rescale_zero_terminal_snr: bool = False
  steps_offset: int = 1
  timestep_spacing: str = "leading"
  set_alpha_to_one: bool = False
  clip_sample: bool = False
  trained_betas: tuple[float, ...] | None = None
  clip_sample_range: float = 1.0
  variance_type: str = "fixed_small"
  skip_prk_steps: bool = True
  use_karras_sigmas: bool = False
  interpolation_type: str = "linear"
  final_sigmas_type: str = "zero"
  solver_order: int = 2
  solver_type: str = "midpoint"
  lower_order_final: bool = True
  euler_at_final: bool = False
  lambda_min_clipped: float | None = None
  original_inference_steps: int = 50
  timestep_scaling: float = 10.0

  def __post_init__(self):
    for field, choices in _CHOICES.items():
      if getattr(self, field) not in choices:
        raise ValueError(
          f"{field} is {getattr(self, field)!r}; choose one of {choices}."
        )
    if self.rescale_zero_terminal_snr and self.prediction_type == "epsilon":
      raise ValueError(
        "rescale_zero_terminal_snr leaves no signal at the last step, from "
        "which 'epsilon' cannot recover x_0; set prediction_type to "
        "'v_prediction' or 'sample'."
      )
    betas = self.trained_betas
    if betas is not None:
      if len(betas) != self.num_train_timesteps:
        raise ValueError(
          f"trained_betas has {len(betas)} values; set num_train_timesteps, "
          f"{self.num_train_timesteps}, to the same number."
        )
      if not all(0 < beta < 1 for beta in betas):
        raise ValueError("trained_betas must lie between 0 and 1.")

  @classmethod
  def tiny(cls, **overrides) -> "ScheduleConfig":
    """The toy's schedule: Stable Diffusion's own."""
    return cls(**overrides)

  @classmethod
  def sd15(cls, **overrides) -> "ScheduleConfig":
    """Stable Diffusion 1.5 and 2.1-base."""
    return cls(**overrides)

  @classmethod
  def sd21(cls, **overrides) -> "ScheduleConfig":
    """Stable Diffusion 2.1-base; the 768 px model is 'v_prediction'."""
    return cls(**overrides)


def read_config(settings: Mapping[str, Any]) -> tuple[ScheduleConfig, str]:
  """Reads a `scheduler_config.json` of diffusers.

  What it leaves out is as its class has it by default. What another class
  understands and its own does not has no effect there, and none here.

  Args:
    settings: the file, parsed.

  Returns:
    The schedule, and the class's name in `samplers.SAMPLERS`.

  Raises:
    ValueError: a class or a field that is not known, or a value that cannot
      be honoured; it is named.
  """
  name = settings.get("_class_name")
  if name not in CLASSES:
    raise ValueError(
      f"_class_name is {name!r}; use a scheduler of {', '.join(CLASSES)}."
    )
  strange = sorted(
    field for field in settings if field[0] != "_" and field not in KNOWN
  )
  if strange:
    raise ValueError(
      f"No scheduler known here has the field {', '.join(strange)}; remove it "
      f"from the config of {name} if it may be ignored."
    )
  known, found = CLASSES[name], {}
  for field, default in (known.fields | known.fixed).items():
    value = settings.get(field)
    value = default if value is None else _typed(field, value, default)
    if field in known.fields:
      found[OUR_NAMES.get(field, field)] = value
    elif value != default:
      raise ValueError(
        f"{field} is {value!r} in the config of {name}; only {default!r} can "
        "be used."
      )
  if found.get("lambda_min_clipped") == -math.inf:
    found["lambda_min_clipped"] = None
  config = ScheduleConfig(**found)
  check_sampler(config, known.sampler)
  return config, known.sampler


def write_config(config: ScheduleConfig, sampler: str) -> dict[str, Any]:
  """The `scheduler_config.json` with which diffusers gives the same numbers.

  Args:
    config: the schedule.
    sampler: a name of `samplers.SAMPLERS`; it decides the class.

  Raises:
    ValueError: there is no such sampler, or it cannot follow the schedule.
  """
  check_sampler(config, sampler)
  (name,) = (n for n, known in CLASSES.items() if known.sampler == sampler)
  known = CLASSES[name]
  values = {
    field: getattr(config, OUR_NAMES.get(field, field))
    for field in known.fields
  }
  if config.trained_betas is not None:
    values["trained_betas"] = list(config.trained_betas)
  # None is the default of every field which may be it.
  values = known.unused | known.fixed | values
  values = {field: v for field, v in values.items() if v is not None}
  return {"_class_name": name, **values}


def check_sampler(config: ScheduleConfig, sampler: str) -> None:
  """Raises a ValueError if no such sampler can follow the schedule."""
  names = [known.sampler for known in CLASSES.values()]
  if sampler not in names:
    raise ValueError(f"sampler is {sampler!r}; choose one of {names}.")
  if sampler != "pndm":
    return
  if config.prediction_type == "sample":
    raise ValueError(
      "The sampler pndm averages noise, which a prediction_type of 'sample' "
      "does not give; choose another sampler."
    )
  if config.rescale_zero_terminal_snr:
    raise ValueError(
      "The sampler pndm cannot start where no signal is left, as "
      "rescale_zero_terminal_snr has it; choose another sampler."
    )


def _typed(field: str, value: Any, default: Any) -> Any:
  """A value of a config file in the type of the field's default."""
  if field == "trained_betas":
    return tuple(float(beta) for beta in value)
  if type(default) is float and type(value) is int:
    return float(value)
  if default is not None and type(value) is not type(default):
    raise ValueError(
      f"{field} is {value!r} and must be of type {type(default).__name__}."
    )
  return value


def alphas_cumprod(
  config: ScheduleConfig, dtype: Any = np.float32
) -> np.ndarray:
  """abar_t of every training step, falling: [T] of `dtype`."""
  steps = config.num_train_timesteps
  if config.trained_betas is not None:
    betas = np.asarray(config.trained_betas, np.float64)
  elif config.beta_schedule == "linear":
    betas = np.linspace(config.beta_start, config.beta_end, steps)
  elif config.beta_schedule == "scaled_linear":
    roots = math.sqrt(config.beta_start), math.sqrt(config.beta_end)
    betas = np.linspace(*roots, steps) ** 2
  else:
    time = np.arange(steps + 1) / steps
    bar = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
  alphas = np.cumprod(1 - betas)
  if config.rescale_zero_terminal_snr:
    root = np.sqrt(alphas)
    alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
  return alphas.astype(dtype)


def add_noise(
  ac: jax.Array, x0: jax.Array, noise: jax.Array, t: jax.Array
) -> jax.Array:
  """Diffuses clean latents to step t.

  Args:
    ac: [T] from `alphas_cumprod`.
    x0: [B, ...] clean latents.
    noise: like x0, standard normal.
    t: int[B].

  Returns:
    x_t, like x0.
  """
  signal, sigma = _roots(jnp.asarray(ac)[t], x0.ndim)
  return signal * x0 + sigma * noise


def target(
  config: ScheduleConfig,
  ac: jax.Array,
  x0: jax.Array,
  noise: jax.Array,
  t: jax.Array,
) -> jax.Array:
  """What the UNet should give at x_t; arguments as in `add_noise`."""
  if config.prediction_type == "epsilon":
    return noise
  if config.prediction_type == "sample":
    return x0
  signal, sigma = _roots(jnp.asarray(ac)[t], x0.ndim)
  return signal * noise - sigma * x0


def to_x0_eps(
  config: ScheduleConfig,
  signal: jax.Array,
  sigma: jax.Array,
  x_t: jax.Array,
  model_out: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Reads a prediction as clean latents and noise.

  Args:
    config: says what was predicted.
    signal: sqrt(abar_t), a scalar or shaped to multiply x_t.
    sigma: sqrt(1 - abar_t), likewise.
    x_t: [B, ...] noisy latents.
    model_out: like x_t, the UNet's output.

  Returns:
    (x_0, eps), each like x_t.
  """
  if config.prediction_type == "epsilon":
    return (x_t - sigma * model_out) / signal, model_out
  if config.prediction_type == "sample":
    return model_out, (x_t - signal * model_out) / sigma
  return signal * x_t - sigma * model_out, signal * model_out + sigma * x_t


def snr_weight(
  config: ScheduleConfig, ac: jax.Array, t: jax.Array, gamma: float | None
) -> jax.Array:
  """Min-SNR weight of each photo's loss (arXiv:2303.09556).

  The weight of an error in x_0 is min(SNR, gamma); an error in eps is one in
  x_0 times SNR, in v times SNR + 1, hence the divisions.

  Args:
    config: says what is predicted.
    ac: [T] from `alphas_cumprod`.
    t: int[B].
    gamma: the paper recommends 5; None means no weighting.

  Returns:
    float32[B].
  """
  if gamma is None:
    return jnp.ones(t.shape, jnp.float32)
  ac_t = jnp.asarray(ac)[t]
  snr = ac_t / (1 - ac_t)
  weight = jnp.minimum(snr, gamma)
  if config.prediction_type == "epsilon":
    return weight / snr
  if config.prediction_type == "v_prediction":
    return weight / (snr + 1)
  return weight


def _roots(ac_t, ndim):
  """sqrt(abar), sqrt(1 - abar), shaped to multiply arrays of ndim axes."""
  ac_t = jnp.asarray(ac_t)
  if ac_t.ndim:
    ac_t = ac_t.reshape(-1, *(1,) * (ndim - 1))
  return jnp.sqrt(ac_t), jnp.sqrt(1 - ac_t)
