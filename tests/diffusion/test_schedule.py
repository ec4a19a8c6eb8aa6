"""The schedule against diffusers' `DDPMScheduler` and hand calculation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.diffusion import schedule

CASES = {
  "stable_diffusion": dict(),
  "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
  "cosine": dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=300),
  "velocity": dict(prediction_type="v_prediction"),
  "zero_terminal": dict(
    prediction_type="v_prediction", rescale_zero_terminal_snr=True
  ),
  "sample": dict(prediction_type="sample", num_train_timesteps=50),
}


def oracle(config):
  diffusers = pytest.importorskip("diffusers")
  return diffusers.DDPMScheduler(
    num_train_timesteps=config.num_train_timesteps,
    beta_start=config.beta_start,
    beta_end=config.beta_end,
    beta_schedule=config.beta_schedule,
    prediction_type=config.prediction_type,
    rescale_betas_zero_snr=config.rescale_zero_terminal_snr,
    clip_sample=False,
  )


@pytest.mark.parametrize("case", CASES)
def test_noise_and_velocity_are_those_of_diffusers(case):
  torch = pytest.importorskip("torch")
  config = schedule.ScheduleConfig(**CASES[case])
  want = oracle(config)
  ac = schedule.alphas_cumprod(config)
  assert ac.dtype == np.float32
  np.testing.assert_allclose(ac, want.alphas_cumprod.numpy(), atol=2e-6)
  rng = np.random.default_rng(0)
  x0, noise = rng.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
  t = np.array([0, 17, config.num_train_timesteps - 1], np.int32)
  args = [torch.tensor(x) for x in (x0, noise, t)]
  np.testing.assert_allclose(
    schedule.add_noise(ac, x0, noise, t),
    want.add_noise(*args).numpy(),
    atol=1e-5,
  )
  if config.prediction_type == "v_prediction":
    np.testing.assert_allclose(
      schedule.target(config, ac, x0, noise, t),
      want.get_velocity(*args).numpy(),
      atol=1e-5,
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_gives_back_what_was_mixed(kind):
  config = schedule.ScheduleConfig(prediction_type=kind)
  ac = schedule.alphas_cumprod(config)
  rng = np.random.default_rng(0)
  x0, noise = rng.normal(size=(2, 3, 2, 2, 4)).astype(np.float32)
  t = np.array([5, 300, 700])
  x_t = schedule.add_noise(ac, x0, noise, t)
  target = schedule.target(config, ac, x0, noise, t)
  got = schedule.to_x0_eps(config, ac[t], x_t, target)
  np.testing.assert_allclose(got[0], x0, atol=1e-4)
  np.testing.assert_allclose(got[1], noise, atol=1e-4)
  one = schedule.to_x0_eps(config, ac[300], x_t[1:2], target[1:2])
  np.testing.assert_allclose(one[0], x0[1:2], atol=1e-4)


def test_no_signal_is_left_at_a_zero_terminal_step():
  config = schedule.ScheduleConfig(**CASES["zero_terminal"])
  ac = schedule.alphas_cumprod(config)
  plain = schedule.alphas_cumprod(schedule.ScheduleConfig())
  assert ac[-1] == 0.0
  np.testing.assert_allclose(ac[0], plain[0], rtol=1e-6)
  noise = jnp.full((1, 2), 3.0)
  last = np.array([config.num_train_timesteps - 1])
  np.testing.assert_array_equal(
    schedule.add_noise(ac, jnp.ones((1, 2)), noise, last), noise
  )


def test_min_snr_weights_by_hand():
  # abar 0.9, 0.5 and 0.2: SNR 9, 1 and 0.25, cut at 5.
  ac = np.array([0.9, 0.5, 0.2], np.float32)
  t = jnp.arange(3)
  want = {
    "sample": [5, 1, 0.25],
    "epsilon": [5 / 9, 1, 1],
    "v_prediction": [5 / 10, 1 / 2, 0.25 / 1.25],
  }
  for kind, values in want.items():
    config = schedule.ScheduleConfig(prediction_type=kind)
    np.testing.assert_allclose(
      schedule.snr_weight(config, ac, t, 5.0), values, rtol=1e-5
    )
    np.testing.assert_array_equal(
      schedule.snr_weight(config, ac, t, None), [1.0, 1.0, 1.0]
    )


def test_everything_works_on_traced_steps():
  config = schedule.ScheduleConfig()
  ac = schedule.alphas_cumprod(config)

  @jax.jit
  def noisy(t):
    ones = jnp.ones((2, 3))
    return schedule.add_noise(ac, ones, ones, t)

  t = np.array([0, 999])
  want = np.sqrt(ac[t]) + np.sqrt(1 - ac[t])
  np.testing.assert_allclose(noisy(t)[:, 0], want, rtol=1e-6)


@pytest.mark.parametrize(
  "numbers,message",
  [
    (dict(beta_schedule="sigmoid"), "beta_schedule"),
    (dict(prediction_type="noise"), "prediction_type"),
    (dict(timestep_spacing="even"), "timestep_spacing"),
    (dict(rescale_zero_terminal_snr=True), "v_prediction"),
  ],
)
def test_impossible_settings_are_refused(numbers, message):
  with pytest.raises(ValueError, match=message):
    schedule.ScheduleConfig(**numbers)
