"""The forward diffusion: how much noise at which step, and what to predict.

Letters: T training steps, B photos. abar_t is the cumulative product of
1 - beta (Ho et al. 2020, arXiv:2006.11239); x_t = sqrt(abar_t) x_0 +
sqrt(1 - abar_t) eps.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

_CHOICES = {
  "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
  "prediction_type": ("epsilon", "v_prediction", "sample"),
  "timestep_spacing": ("leading", "trailing", "linspace"),
}


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """Numbers of a noise schedule (diffusers' scheduler configs).

  Attributes:
    num_train_timesteps: T.
    beta_start: first beta; unused by 'squaredcos_cap_v2'.
    beta_end: last beta; unused by 'squaredcos_cap_v2'.
    beta_schedule: 'linear', 'scaled_linear' (linear in sqrt(beta)) or
      'squaredcos_cap_v2' (cosine, arXiv:2102.09672).
    prediction_type: what the UNet gives: 'epsilon', 'v_prediction'
      (sqrt(abar) eps - sqrt(1 - abar) x_0, arXiv:2202.00512) or 'sample'.
    rescale_zero_terminal_snr: shift the schedule so that abar_T = 0
      (arXiv:2305.08891, algorithm 1).
    steps_offset: added to 'leading' sampling steps.
    timestep_spacing: how sampling steps are spread over the T.
    set_alpha_to_one: whether sampling ends at abar = 1, or at abar_0.
    clip_sample: clip the predicted x_0 to [-1, 1] while sampling.
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


def alphas_cumprod(config: ScheduleConfig) -> np.ndarray:
  """float32[T]: abar_t of every training step, falling."""
  steps = config.num_train_timesteps
  if config.beta_schedule == "linear":
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
  return alphas.astype(np.float32)


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
  ac_t: jax.Array,
  x_t: jax.Array,
  model_out: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Reads a prediction as clean latents and noise.

  Args:
    config: says what was predicted.
    ac_t: abar_t, a scalar or [B].
    x_t: [B, ...] noisy latents.
    model_out: like x_t, the UNet's output.

  Returns:
    (x_0, eps), each like x_t.
  """
  signal, sigma = _roots(ac_t, x_t.ndim)
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
