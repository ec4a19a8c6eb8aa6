"""What diffusers' scheduler classes are told, and what they assume.

A `scheduler_config.json` names a class and may leave out what the class takes
by default, and the classes differ in their defaults. Names and values are
those of diffusers 0.42.
"""

from typing import Any, NamedTuple


class SchedulerClass(NamedTuple):
  """One class, by the arguments of its constructor with their defaults.

  Attributes:
    sampler: its name in `samplers.SAMPLERS`.
    fields: arguments that `ScheduleConfig` has too.
    fixed: arguments of which only the default is understood here.
    unused: arguments that mean nothing while the `fixed` are as they are.
  """

  sampler: str
  fields: dict[str, Any]
  fixed: dict[str, Any]
  unused: dict[str, Any]


OUR_NAMES = {"rescale_betas_zero_snr": "rescale_zero_terminal_snr"}
"""Fields that `ScheduleConfig` calls otherwise."""

_BETAS = dict(
  num_train_timesteps=1000,
  beta_start=0.0001,
  beta_end=0.02,
  beta_schedule="linear",
  trained_betas=None,
  prediction_type="epsilon",
)
_LEADING = dict(timestep_spacing="leading", steps_offset=0)
_LINSPACE = dict(timestep_spacing="linspace", steps_offset=0)
_RESCALE = dict(rescale_betas_zero_snr=False)
_CLIP = dict(clip_sample=True, clip_sample_range=1.0)
_THRESHOLD = dict(thresholding=False)
_THRESHOLD_NUMBERS = dict(
  dynamic_thresholding_ratio=0.995, sample_max_value=1.0
)
_SIGMAS = dict(use_karras_sigmas=False, final_sigmas_type="zero")
_OTHER_SIGMAS = dict(use_exponential_sigmas=False, use_beta_sigmas=False)

CLASSES = {
  "DDPMScheduler": SchedulerClass(
    "ddpm",
    _BETAS | _LEADING | _RESCALE | _CLIP | dict(variance_type="fixed_small"),
    _THRESHOLD,
    _THRESHOLD_NUMBERS,
  ),
  "DDIMScheduler": SchedulerClass(
    "ddim",
    _BETAS | _LEADING | _RESCALE | _CLIP | dict(set_alpha_to_one=True),
    _THRESHOLD,
    _THRESHOLD_NUMBERS,
  ),
  "PNDMScheduler": SchedulerClass(
    "pndm",
    _BETAS | _LEADING | dict(skip_prk_steps=False, set_alpha_to_one=False),
    {},
    {},
  ),
  "EulerDiscreteScheduler": SchedulerClass(
    "euler",
    _BETAS | _LINSPACE | _RESCALE | _SIGMAS | dict(interpolation_type="linear"),
    _OTHER_SIGMAS
    | dict(sigma_min=None, sigma_max=None, timestep_type="discrete"),
    {},
  ),
  "DPMSolverMultistepScheduler": SchedulerClass(
    "dpm++2m",
    _BETAS
    | _LINSPACE
    | _RESCALE
    | _SIGMAS
    | dict(
      solver_order=2,
      solver_type="midpoint",
      lower_order_final=True,
      euler_at_final=False,
      lambda_min_clipped=-float("inf"),
    ),
    _THRESHOLD
    | _OTHER_SIGMAS
    | dict(
      algorithm_type="dpmsolver++",
      use_lu_lambdas=False,
      use_flow_sigmas=False,
      use_dynamic_shifting=False,
      variance_type=None,
    ),
    _THRESHOLD_NUMBERS | dict(flow_shift=1.0, time_shift_type="exponential"),
  ),
  "LCMScheduler": SchedulerClass(
    "lcm",
    _BETAS
    | _LEADING
    | _RESCALE
    | dict(
      beta_start=0.00085,
      beta_end=0.012,
      beta_schedule="scaled_linear",
      clip_sample=False,
      clip_sample_range=1.0,
      set_alpha_to_one=True,
      original_inference_steps=50,
      timestep_scaling=10.0,
    ),
    _THRESHOLD,
    _THRESHOLD_NUMBERS,
  ),
}

KNOWN = frozenset(
  name
  for known in CLASSES.values()
  for name in (*known.fields, *known.fixed, *known.unused)
)
"""Arguments of any class; a class ignores those of the others."""
