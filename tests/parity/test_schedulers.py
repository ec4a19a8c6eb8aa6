"""Samplers against diffusers' schedulers, trajectory by trajectory.

Each case builds a scheduler of diffusers, reads its config as a user's file
would be read, and draws with both from the same noise.
"""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.diffusion import samplers, schedule, scheduler_classes

# diffusers makes arrays of tensors in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings(
  "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
VELOCITY = SD | dict(prediction_type="v_prediction")
COSINE = dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
TRAINED = dict(trained_betas=(np.linspace(0.03, 0.2, 300) ** 2).tolist())

CLASSES = {
  "DDPMScheduler": {},
  "DDIMScheduler": {},
  "PNDMScheduler": dict(skip_prk_steps=True),
  "EulerDiscreteScheduler": {},
  "DPMSolverMultistepScheduler": {},
  "LCMScheduler": {},
}

# Fields (those which a class lacks are left out), number of steps, guidance.
EVERY_CLASS = {
  "defaults": ({}, 20, 1.0),
  "guided": (SD | dict(steps_offset=1), 20, 7.5),
  "cosine": (COSINE | dict(num_train_timesteps=300), 20, 1.0),
  "trained": (TRAINED | dict(num_train_timesteps=300), 20, 3.0),
  "leading": (VELOCITY | dict(timestep_spacing="leading"), 20, 3.0),
  "trailing": (VELOCITY | dict(timestep_spacing="trailing"), 20, 3.0),
  "linspace": (SD | dict(timestep_spacing="linspace"), 20, 3.0),
  "sample": (SD | dict(prediction_type="sample", steps_offset=1), 20, 3.0),
  "zero_terminal": (
    VELOCITY | dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    20,
    3.0,
  ),
  "ends_at_one": (SD | dict(set_alpha_to_one=True), 7, 1.0),
  "ends_at_first": (SD | dict(set_alpha_to_one=False), 7, 1.0),
  "clipped": (SD | dict(clip_sample=True, clip_sample_range=0.7), 20, 3.0),
  "one_step": (VELOCITY | dict(timestep_spacing="trailing"), 1, 1.0),
  "two_steps": (SD | dict(steps_offset=1), 2, 1.0),
  "seven_steps": (SD | dict(timestep_spacing="trailing"), 7, 1.0),
  "fifty_steps": (SD | dict(timestep_spacing="leading"), 50, 1.0),
}
NOT_FOR = {("PNDMScheduler", "sample"), ("PNDMScheduler", "zero_terminal")}

ZERO = VELOCITY | dict(rescale_betas_zero_snr=True)
KARRAS = dict(use_karras_sigmas=True)
TO_MIN = dict(final_sigmas_type="sigma_min")
LOG = dict(interpolation_type="log_linear")
CLIPPED = COSINE | dict(lambda_min_clipped=-5.1)
PRK = dict(skip_prk_steps=False)
ONE_CLASS = [
  ("DDPMScheduler", SD | dict(variance_type="fixed_large", steps_offset=1), 20),
  ("DDPMScheduler", SD | dict(variance_type="fixed_small_log"), 20),
  ("PNDMScheduler", SD | PRK | dict(steps_offset=1), 20),
  ("PNDMScheduler", VELOCITY | PRK | dict(timestep_spacing="linspace"), 7),
  ("PNDMScheduler", SD | PRK, 4),
  ("EulerDiscreteScheduler", SD | KARRAS, 20),
  ("EulerDiscreteScheduler", ZERO | KARRAS | TO_MIN, 20),
  ("EulerDiscreteScheduler", ZERO | dict(timestep_spacing="leading"), 20),
  ("EulerDiscreteScheduler", SD | LOG | dict(timestep_spacing="leading"), 20),
  ("EulerDiscreteScheduler", VELOCITY | LOG | KARRAS, 7),
  ("EulerDiscreteScheduler", SD | TO_MIN, 20),
  ("DPMSolverMultistepScheduler", SD | dict(solver_order=1), 20),
  ("DPMSolverMultistepScheduler", SD | dict(solver_type="heun"), 20),
  ("DPMSolverMultistepScheduler", SD | TO_MIN, 20),
  ("DPMSolverMultistepScheduler", SD | TO_MIN, 7),
  (
    "DPMSolverMultistepScheduler",
    SD | TO_MIN | dict(lower_order_final=False, solver_type="heun"),
    7,
  ),
  ("DPMSolverMultistepScheduler", SD | TO_MIN | dict(euler_at_final=True), 20),
  ("DPMSolverMultistepScheduler", SD | KARRAS, 20),
  ("DPMSolverMultistepScheduler", SD | KARRAS | TO_MIN, 20),
  ("DPMSolverMultistepScheduler", ZERO | KARRAS, 20),
  (
    "DPMSolverMultistepScheduler",
    COSINE | KARRAS | dict(num_train_timesteps=300),
    20,
  ),
  ("DPMSolverMultistepScheduler", CLIPPED, 20),
  (
    "DPMSolverMultistepScheduler",
    CLIPPED | dict(timestep_spacing="leading", steps_offset=1),
    20,
  ),
  (
    "DPMSolverMultistepScheduler",
    CLIPPED | dict(timestep_spacing="trailing"),
    20,
  ),
  ("LCMScheduler", dict(original_inference_steps=30), 4),
  ("LCMScheduler", dict(timestep_scaling=0.01), 8),
]

CASES = {
  f"{name}-{title}": (name, base | fields, steps, scale)
  for name, base in CLASSES.items()
  for title, (fields, steps, scale) in EVERY_CLASS.items()
  if (name, title) not in NOT_FOR
} | {
  f"{name}-{i}": (name, fields, steps, 3.0)
  for i, (name, fields, steps) in enumerate(ONE_CLASS)
}

PUBLISHED = {
  "stable-diffusion-v1-5": """{
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0",
    "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1,
    "trained_betas": null, "clip_sample": false}""",
  "stable-diffusion-2-1-base": """{
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.10.0.dev0",
    "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": false,
    "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1,
    "trained_betas": null}""",
  "stable-diffusion-2-1": """{
    "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0",
    "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": false,
    "num_train_timesteps": 1000, "prediction_type": "v_prediction",
    "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1,
    "trained_betas": null}""",
  "LCM_Dreamshaper_v7": """{
    "_class_name": "LCMScheduler", "_diffusers_version": "0.22.0.dev0",
    "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": false, "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995, "num_train_timesteps": 1000,
    "original_inference_steps": 50, "prediction_type": "epsilon",
    "rescale_betas_zero_snr": false, "sample_max_value": 1.0,
    "set_alpha_to_one": true, "steps_offset": 1, "thresholding": false,
    "timestep_scaling": 10.0, "timestep_spacing": "leading",
    "trained_betas": null}""",
}


def scheduler_of(name, **fields):
  """A scheduler of diffusers, without the fields that its class lacks."""
  kind = getattr(pytest.importorskip("diffusers"), name)
  known = inspect.signature(kind.__init__).parameters
  return kind(**{k: v for k, v in fields.items() if k in known})


def settings_of(scheduler):
  return dict(scheduler.config) | {"_class_name": type(scheduler).__name__}


@pytest.fixture(scope="module")
def drawn():
  """Noise, captions, keys, and the fresh noise of each call."""
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(2, 4, 3, 2)).astype(np.float32)
  context = rng.normal(size=(2, 5, 2)).astype(np.float32)
  empty = rng.normal(size=(1, 5, 2)).astype(np.float32)
  keys = jax.random.split(jax.random.key(3), 2)

  @jax.jit
  def fresh(call):
    return jax.vmap(
      lambda key: jax.random.normal(
        jax.random.fold_in(key, call), noise.shape[1:]
      )
    )(keys)

  calls = np.stack([fresh(call) for call in range(64)])
  return noise, context, empty, keys, calls


def denoise(xp, latents, t, context):
  """A nonlinear stand-in for the UNet, for jax.numpy or torch."""
  hint = context.mean(1)[:, None, None, :]
  return 0.8 * latents * t / 1000 + 0.3 * xp.tanh(2 * latents + hint)


def theirs(monkeypatch, scheduler, drawn, num_steps, scale, **step):
  """The latents as a pipeline of diffusers draws them."""
  torch = pytest.importorskip("torch")
  noise, context, empty, _, calls = drawn
  context, empty = torch.tensor(context), torch.tensor(empty)
  scheduler.set_timesteps(num_steps)
  if hasattr(scheduler, "set_begin_index"):
    scheduler.set_begin_index(0)
  latents = torch.tensor(noise) * scheduler.init_noise_sigma
  for i, t in enumerate(scheduler.timesteps):
    fresh = torch.tensor(calls[i])
    module = type(scheduler).__module__
    if hasattr(inspect.getmodule(type(scheduler)), "randn_tensor"):
      monkeypatch.setattr(
        f"{module}.randn_tensor", lambda *_, fresh=fresh, **__: fresh
      )
    seen = scheduler.scale_model_input(latents, t)
    cond, uncond = (denoise(torch, seen, t, c) for c in (context, empty))
    out = uncond + scale * (cond - uncond)
    latents = scheduler.step(out, t, latents, **step).prev_sample
  return latents.numpy()


def ours(config, sampler, drawn, num_steps, scale, **step):
  noise, context, empty, keys, _ = drawn
  return jax.jit(
    lambda noise: samplers.sample(
      config,
      sampler,
      lambda x, t, c: denoise(jnp, x, t[:, None, None, None], c),
      noise,
      num_steps,
      guidance_scale=scale,
      context=context,
      uncond_context=empty,
      keys=keys,
      **step,
    )
  )(noise)


@pytest.mark.parametrize("case", CASES)
def test_a_trajectory_is_that_of_diffusers(case, drawn, monkeypatch):
  name, fields, num_steps, scale = CASES[case]
  scheduler = scheduler_of(name, **fields)
  config, sampler = schedule.read_config(settings_of(scheduler))
  np.testing.assert_allclose(
    schedule.alphas_cumprod(config), scheduler.alphas_cumprod, atol=2e-6
  )
  want = theirs(monkeypatch, scheduler, drawn, num_steps, scale)
  assert np.isfinite(want).all() and np.abs(want).max() < 100
  rows = samplers.plan(config, sampler, num_steps).rows
  # Times between steps come from logarithms, in float32 there.
  np.testing.assert_allclose(rows.times, scheduler.timesteps, atol=0.02)
  got = ours(config, sampler, drawn, num_steps, scale)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)

  written = json.loads(json.dumps(schedule.write_config(config, sampler)))
  assert schedule.read_config(written) == (config, sampler)
  again = type(scheduler).from_config(written)
  got = theirs(monkeypatch, again, drawn, num_steps, scale)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_fresh_noise_of_ddim_enters_as_in_diffusers(eta, drawn, monkeypatch):
  scheduler = scheduler_of("DDIMScheduler", **SD, clip_sample=False)
  want = theirs(monkeypatch, scheduler, drawn, 20, 3.0, eta=eta)
  config, sampler = schedule.read_config(settings_of(scheduler))
  got = ours(config, sampler, drawn, 20, 3.0, eta=eta)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_configs(case, drawn, monkeypatch):
  settings = json.loads(PUBLISHED[case])
  diffusers = pytest.importorskip("diffusers")
  scheduler = getattr(diffusers, settings["_class_name"]).from_config(settings)
  config, sampler = schedule.read_config(settings)
  steps, scale = (4, 1.0) if sampler == "lcm" else (20, 7.5)
  want = theirs(monkeypatch, scheduler, drawn, steps, scale)
  got = ours(config, sampler, drawn, steps, scale)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)
  # Which are the numbers that our models have by name.
  named = schedule.ScheduleConfig.sd21(prediction_type=config.prediction_type)
  assert sampler == "lcm" or config == named


@pytest.mark.parametrize("sampler", ["ddpm", "pndm", "euler", "dpm++2m"])
def test_another_sampler_on_the_same_schedule(sampler, drawn, monkeypatch):
  fields = dict(timestep_spacing="trailing", set_alpha_to_one=False)
  base = scheduler_of("DDIMScheduler", **VELOCITY, **fields, clip_sample=False)
  config, _ = schedule.read_config(settings_of(base))
  name = schedule.write_config(config, sampler)["_class_name"]
  diffusers = pytest.importorskip("diffusers")
  scheduler = getattr(diffusers, name).from_config(
    base.config, skip_prk_steps=True
  )
  want = theirs(monkeypatch, scheduler, drawn, 20, 3.0)
  got = ours(config, sampler, drawn, 20, 3.0)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", CLASSES)
def test_visited_steps_are_those_of_diffusers(name, spacing):
  scheduler = scheduler_of(
    name, **SD, **CLASSES[name], timestep_spacing=spacing, steps_offset=1
  )
  config, sampler = schedule.read_config(settings_of(scheduler))
  for num_steps in (1, 2, 7, 20, 30, 50, 333):
    if name == "LCMScheduler" and num_steps > 50:
      continue
    scheduler.set_timesteps(num_steps)
    times = samplers.plan(config, sampler, num_steps).rows.times
    np.testing.assert_allclose(times, scheduler.timesteps, rtol=1e-6)


def test_defaults_are_those_of_the_classes():
  for name, known in scheduler_classes.CLASSES.items():
    kind = getattr(pytest.importorskip("diffusers"), name)
    wanted = {
      field: parameter.default
      for field, parameter in inspect.signature(kind).parameters.items()
    }
    assert known.fields | known.fixed | known.unused == wanted, name
