"""What holds for every sampler.

That each is diffusers' own, call by call, is shown in
`tests/parity/test_schedulers.py`.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_agent

from photochat_jax.diffusion import plans, samplers, schedule
from photochat_jax.models.photochat import PhotoChat


def denoise(latents, t, context):
  """A nonlinear stand-in for the UNet."""
  hint = context.mean(1)[:, None, None, :]
  return jnp.tanh(latents + hint) * (1 - 0.3 * t[:, None, None, None] / 1000)


def inputs(batch=3):
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(batch, 4, 3, 2)).astype(np.float32)
  context = rng.normal(size=(batch, 5, 2)).astype(np.float32)
  uncond = rng.normal(size=(1, 5, 2)).astype(np.float32)
  return noise, context, uncond


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_photo_does_not_depend_on_its_batch(sampler):
  config = schedule.ScheduleConfig(prediction_type="v_prediction")
  noise, context, uncond = inputs()
  keys = jax.random.split(jax.random.key(3), 3)

  def draw(rows):
    return samplers.sample(
      config,
      sampler,
      denoise,
      noise[rows],
      5,
      eta=1.0 if sampler == "ddim" else 0.0,
      guidance_scale=3.0,
      context=context[rows],
      uncond_context=uncond,
      keys=keys[rows],
    )

  np.testing.assert_allclose(
    draw(np.array([2, 0]))[0], draw(np.arange(3))[2], atol=1e-5
  )


@pytest.mark.parametrize(
  "sampler, eta", [("ddim", 0.5), ("ddpm", 0.0), ("lcm", 0.0)]
)
def test_fresh_noise_follows_the_keys(sampler, eta):
  config = schedule.ScheduleConfig(prediction_type="v_prediction")
  noise, context, _ = inputs()
  noise[1], context[1] = noise[0], context[0]
  keys = jax.random.split(jax.random.key(3), 3)
  draw = functools.partial(
    samplers.sample,
    config,
    sampler,
    denoise,
    noise,
    3,
    eta=eta,
    context=context,
  )
  drawn = draw(keys=keys)
  assert np.abs(drawn[0] - drawn[1]).max() > 0.1
  np.testing.assert_array_equal(drawn, draw(keys=keys))
  same = draw(keys=keys[np.array([0, 0, 2])])
  np.testing.assert_allclose(same[0], same[1], atol=1e-6)


def test_the_other_samplers_ask_for_no_keys():
  config = schedule.ScheduleConfig()
  for sampler in ("ddim", "pndm", "euler", "dpm++2m"):
    assert not samplers.plan(config, sampler, 5).rows.fresh.any()


def test_guidance_runs_both_halves_in_one_call_and_one_scale_skips_it():
  config = schedule.ScheduleConfig()
  noise, context, uncond = inputs()
  batches = []

  def watched(latents, t, context):
    assert t.shape == (latents.shape[0],)
    batches.append(latents.shape[0])
    return denoise(latents, t, context)

  for scale in (4.0, 1.0):
    samplers.sample(
      config,
      "ddim",
      watched,
      noise,
      5,
      guidance_scale=scale,
      context=context,
      uncond_context=uncond,
    )
  assert set(batches) == {6, 3} and batches[0] == 6


def test_as_many_trailing_steps_as_asked_for():
  config = schedule.ScheduleConfig(timestep_spacing="trailing")
  for num_steps in range(1, 1001):
    steps = plans.timesteps(config, num_steps)
    assert steps.shape == (num_steps,) and steps[0] == 999 and steps[-1] >= 0


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_perfect_denoiser_gives_the_photo_in_any_number_of_steps(sampler):
  # Its one photo's noise is the same everywhere on the way: no averaging of
  # the past and no fresh noise leads away from it.
  config = schedule.ScheduleConfig(
    set_alpha_to_one=True, timestep_spacing="trailing"
  )
  ac = jnp.asarray(schedule.alphas_cumprod(config))
  noise, context, _ = inputs()
  keys = jax.random.split(jax.random.key(3), 3)
  photo = np.random.default_rng(9).normal(size=noise.shape)

  def perfect(latents, t, context):
    ac_t = ac[t.astype(jnp.int32)][:, None, None, None]
    return (latents - jnp.sqrt(ac_t) * photo) / jnp.sqrt(1 - ac_t)

  for num_steps in (1, 4, 50):
    got = samplers.sample(
      config, sampler, perfect, noise, num_steps, context=context, keys=keys
    )
    np.testing.assert_allclose(got, photo, atol=1e-3)


def test_a_model_draws_with_the_sampler_of_its_settings():
  model = PhotoChat(toy_agent.config())
  params = toy_agent.random_params(model)
  drawn = {}
  for sampler in ("ddim", "ddpm"):
    settings = types.SimpleNamespace(
      **(vars(toy_agent.SETTINGS) | dict(sampler=sampler))
    )
    generator = toy_agent.generator(model, params, settings=settings)
    photos = generator.draw(["a b", "c"], [1, 2]).astype(int)
    moved = generator.draw(["c", "a b"], [2, 1])[::-1].astype(int)
    np.testing.assert_allclose(photos, moved, atol=1)
    drawn[sampler] = photos
  assert np.abs(drawn["ddim"] - drawn["ddpm"]).max() > 1


NO_PRK = schedule.ScheduleConfig(skip_prk_steps=False)
ZERO = schedule.ScheduleConfig(
  prediction_type="v_prediction", rescale_zero_terminal_snr=True
)


@pytest.mark.parametrize(
  "config, sampler, num_steps, eta, message",
  [
    (schedule.ScheduleConfig(), "ddim", 0, 0.0, "num_steps is 0"),
    (schedule.ScheduleConfig(), "ddim", 1001, 0.0, "1 and the 1000"),
    (schedule.ScheduleConfig(), "ddim", 1000, 0.0, "steps_offset"),
    (schedule.ScheduleConfig(), "dpm++2m", 1000, 0.0, "1 and the 999"),
    (schedule.ScheduleConfig(), "lcm", 51, 0.0, "original_inference_steps"),
    (schedule.ScheduleConfig(), "heun", 5, 0.0, "sampler is 'heun'"),
    (schedule.ScheduleConfig(), "euler", 5, 0.5, "eta is 0.5"),
    (schedule.ScheduleConfig(), "ddim", 5, 1.5, "eta is 1.5"),
    (NO_PRK, "pndm", 3, 0.0, "skip_prk_steps"),
    (ZERO, "pndm", 5, 0.0, "rescale_zero_terminal_snr"),
    (
      schedule.ScheduleConfig(prediction_type="sample"),
      "pndm",
      5,
      0.0,
      "prediction_type",
    ),
    (
      schedule.ScheduleConfig(original_inference_steps=2000),
      "lcm",
      5,
      0.0,
      "original_inference_steps is 2000",
    ),
  ],
)
def test_impossible_plans_are_refused(config, sampler, num_steps, eta, message):
  with pytest.raises(ValueError, match=message):
    samplers.plan(config, sampler, num_steps, eta)


def test_impossible_requests_are_refused():
  config = schedule.ScheduleConfig()
  noise, context, _ = inputs()
  draw = functools.partial(
    samplers.sample, config, denoise=denoise, noise=noise, num_steps=5
  )
  with pytest.raises(ValueError, match="uncond_context"):
    draw("ddim", guidance_scale=2.0, context=context)
  with pytest.raises(ValueError, match="eta 0.5 needs keys"):
    draw("ddim", eta=0.5, context=context)
  for sampler in ("ddpm", "lcm"):
    with pytest.raises(ValueError, match=f"{sampler} needs keys"):
      draw(sampler, context=context)
