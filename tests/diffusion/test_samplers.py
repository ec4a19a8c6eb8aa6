"""DDIM against diffusers' `DDIMScheduler`, trajectory by trajectory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.diffusion import samplers, schedule

CASES = {
  "stable_diffusion": dict(),
  "velocity": dict(prediction_type="v_prediction"),
  "sample_clipped": dict(
    prediction_type="sample", clip_sample=True, set_alpha_to_one=True
  ),
  "trailing": dict(timestep_spacing="trailing"),
  "linspace": dict(timestep_spacing="linspace", beta_schedule="linear"),
  "zero_terminal": dict(
    prediction_type="v_prediction",
    rescale_zero_terminal_snr=True,
    timestep_spacing="trailing",
    set_alpha_to_one=True,
  ),
  "cosine_clipped": dict(beta_schedule="squaredcos_cap_v2", clip_sample=True),
}


def oracle(config):
  diffusers = pytest.importorskip("diffusers")
  return diffusers.DDIMScheduler(
    num_train_timesteps=config.num_train_timesteps,
    beta_start=config.beta_start,
    beta_end=config.beta_end,
    beta_schedule=config.beta_schedule,
    prediction_type=config.prediction_type,
    rescale_betas_zero_snr=config.rescale_zero_terminal_snr,
    clip_sample=config.clip_sample,
    set_alpha_to_one=config.set_alpha_to_one,
    steps_offset=config.steps_offset,
    timestep_spacing=config.timestep_spacing,
  )


def denoiser(numpy):
  """A nonlinear stand-in for the UNet, for jax.numpy or torch."""

  def denoise(latents, t, context):
    hint = context.mean(1)[:, None, None, :]
    return numpy.tanh(latents + hint) * (1 - 0.3 * t / 1000) + 0.2 * hint

  return denoise


def inputs(batch=3):
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(batch, 4, 3, 2)).astype(np.float32)
  context = rng.normal(size=(batch, 5, 2)).astype(np.float32)
  uncond = rng.normal(size=(1, 5, 2)).astype(np.float32)
  return noise, context, uncond


def jax_denoise(latents, t, context):
  return denoiser(jnp)(latents, t[:, None, None, None], context)


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_are_those_of_diffusers(case, scale):
  torch = pytest.importorskip("torch")
  config = schedule.ScheduleConfig(**CASES[case])
  noise, context, uncond = inputs()
  want = torch.tensor(noise)
  scheduler = oracle(config)
  scheduler.set_timesteps(20)
  for t in scheduler.timesteps:
    cond = denoiser(torch)(want, t, torch.tensor(context))
    empty = denoiser(torch)(want, t, torch.tensor(uncond))
    guided = empty + scale * (cond - empty)
    want = scheduler.step(guided, t, want).prev_sample
  got = jax.jit(
    lambda noise: samplers.ddim(
      config,
      jax_denoise,
      noise,
      20,
      guidance_scale=scale,
      context=context,
      uncond_context=uncond,
    )
  )(noise)
  np.testing.assert_allclose(got, want.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_fresh_noise_enters_as_in_diffusers(eta):
  torch = pytest.importorskip("torch")
  config = schedule.ScheduleConfig()
  noise, context, _ = inputs()
  keys = jax.random.split(jax.random.key(3), 3)
  want = torch.tensor(noise)
  scheduler = oracle(config)
  scheduler.set_timesteps(10)
  for i, t in enumerate(scheduler.timesteps):
    fresh = np.stack(
      [
        jax.random.normal(jax.random.fold_in(key, i), noise.shape[1:])
        for key in keys
      ]
    )
    out = denoiser(torch)(want, t, torch.tensor(context))
    want = scheduler.step(
      out, t, want, eta=eta, variance_noise=torch.tensor(fresh)
    ).prev_sample
  got = samplers.ddim(
    config, jax_denoise, noise, 10, eta=eta, context=context, keys=keys
  )
  np.testing.assert_allclose(got, want.numpy(), atol=1e-3)


def test_a_photo_does_not_depend_on_its_batch():
  config = schedule.ScheduleConfig()
  noise, context, uncond = inputs()
  keys = jax.random.split(jax.random.key(3), 3)

  def draw(rows):
    return samplers.ddim(
      config,
      jax_denoise,
      noise[rows],
      5,
      eta=1.0,
      guidance_scale=3.0,
      context=context[rows],
      uncond_context=uncond,
      keys=keys[rows],
    )

  np.testing.assert_allclose(
    draw(np.array([2, 0]))[0], draw(np.arange(3))[2], atol=1e-5
  )


def test_guidance_runs_both_halves_in_one_call_and_one_scale_skips_it():
  config = schedule.ScheduleConfig()
  noise, context, uncond = inputs()
  batches = []

  def denoise(latents, t, context):
    assert t.shape == (latents.shape[0],)
    batches.append(latents.shape[0])
    return jax_denoise(latents, t, context)

  for scale in (4.0, 1.0):
    samplers.ddim(
      config,
      denoise,
      noise,
      5,
      guidance_scale=scale,
      context=context,
      uncond_context=uncond,
    )
  assert set(batches) == {6, 3} and batches[0] == 6


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_visited_steps_are_those_of_diffusers(spacing):
  config = schedule.ScheduleConfig(timestep_spacing=spacing)
  scheduler = oracle(config)
  for num_steps in (1, 2, 7, 20, 30, 50, 333):
    scheduler.set_timesteps(num_steps)
    np.testing.assert_array_equal(
      samplers.timesteps(config, num_steps), scheduler.timesteps.numpy()
    )


def test_as_many_trailing_steps_as_asked_for():
  config = schedule.ScheduleConfig(timestep_spacing="trailing")
  for num_steps in range(1, 1001):
    steps = samplers.timesteps(config, num_steps)
    assert steps.shape == (num_steps,) and steps[0] == 999 and steps[-1] >= 0


def test_a_perfect_denoiser_gives_the_photo_in_any_number_of_steps():
  config = schedule.ScheduleConfig(set_alpha_to_one=True)
  ac = jnp.asarray(schedule.alphas_cumprod(config))
  noise, context, _ = inputs()
  photo = np.random.default_rng(9).normal(size=noise.shape)

  def denoise(latents, t, context):
    ac_t = ac[t][:, None, None, None]
    return (latents - jnp.sqrt(ac_t) * photo) / jnp.sqrt(1 - ac_t)

  for num_steps in (1, 4, 50):
    got = samplers.ddim(config, denoise, noise, num_steps, context=context)
    np.testing.assert_allclose(got, photo, atol=1e-3)


def test_impossible_requests_are_refused():
  config = schedule.ScheduleConfig()
  noise, context, _ = inputs()
  with pytest.raises(ValueError, match="uncond_context"):
    samplers.ddim(
      config, jax_denoise, noise, 5, guidance_scale=2.0, context=context
    )
  with pytest.raises(ValueError, match="keys"):
    samplers.ddim(config, jax_denoise, noise, 5, eta=0.5, context=context)
  for num_steps in (0, 1001):
    with pytest.raises(ValueError, match="num_steps"):
      samplers.timesteps(config, num_steps)
  with pytest.raises(ValueError, match="steps_offset"):
    samplers.timesteps(config, 1000)
