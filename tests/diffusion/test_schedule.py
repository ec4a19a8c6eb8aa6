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
  roots = np.sqrt(ac), np.sqrt(1 - ac)
  signal, sigma = (root[t][:, None, None, None] for root in roots)
  got = schedule.to_x0_eps(config, signal, sigma, x_t, target)
  np.testing.assert_allclose(got[0], x0, atol=1e-4)
  np.testing.assert_allclose(got[1], noise, atol=1e-4)
  signal, sigma = (root[300] for root in roots)
  one = schedule.to_x0_eps(config, signal, sigma, x_t[1:2], target[1:2])
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


def test_trained_betas_by_hand():
  config = schedule.ScheduleConfig(
    num_train_timesteps=3, trained_betas=(0.1, 0.5, 0.6)
  )
  np.testing.assert_allclose(
    schedule.alphas_cumprod(config), [0.9, 0.45, 0.18], rtol=1e-6
  )
  exact = schedule.alphas_cumprod(config, np.float64)
  np.testing.assert_allclose(exact, [0.9, 0.45, 0.18], rtol=1e-15)


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
    (dict(variance_type="learned_range"), "variance_type"),
    (dict(solver_order=3), "solver_order"),
    (dict(solver_type="bh2"), "solver_type"),
    (dict(final_sigmas_type="one"), "final_sigmas_type"),
    (dict(interpolation_type="cubic"), "interpolation_type"),
    (dict(trained_betas=(0.1, 0.2)), "num_train_timesteps"),
    (dict(trained_betas=(0.1, 1.0), num_train_timesteps=2), "between 0 and 1"),
  ],
)
def test_impossible_settings_are_refused(numbers, message):
  with pytest.raises(ValueError, match=message):
    schedule.ScheduleConfig(**numbers)


DDIM = {"_class_name": "DDIMScheduler", "_diffusers_version": "0.1"}
DPM = {"_class_name": "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize(
  "settings, message",
  [
    ({}, "_class_name is None"),
    ({"_class_name": "HeunDiscreteScheduler"}, "DDPMScheduler, DDIMScheduler"),
    (DDIM | {"thresholding": True}, "thresholding is True"),
    (DDIM | {"prediction_type": "flow_prediction"}, "prediction_type"),
    (DDIM | {"beta_schedule": "sigmoid"}, "beta_schedule"),
    (DDIM | {"beta_start": "small"}, "beta_start is 'small'"),
    (DDIM | {"clip_sample": 1}, "clip_sample is 1"),
    (DDIM | {"predict_x0": True, "b": 1}, "the field b, predict_x0"),
    (DDIM | {"rescale_betas_zero_snr": True}, "v_prediction"),
    (DPM | {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
    (DPM | {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
    (DPM | {"use_beta_sigmas": True}, "use_beta_sigmas"),
    (DPM | {"use_flow_sigmas": True}, "use_flow_sigmas"),
    (DPM | {"use_lu_lambdas": True}, "use_lu_lambdas"),
    (DPM | {"variance_type": "learned_range"}, "variance_type"),
    (DPM | {"solver_order": 3}, "solver_order"),
    (
      {"_class_name": "EulerDiscreteScheduler", "sigma_max": 700.0},
      "sigma_max is 700.0",
    ),
    (
      {"_class_name": "PNDMScheduler", "prediction_type": "sample"},
      "prediction_type",
    ),
  ],
)
def test_what_a_file_cannot_ask_for_is_named(settings, message):
  with pytest.raises(ValueError, match=message) as caught:
    schedule.read_config(settings)
  assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_fields_of_other_classes_have_no_effect():
  plain = schedule.read_config({"_class_name": "PNDMScheduler"})
  others = dict(clip_sample=True, thresholding=True, use_karras_sigmas=True)
  assert schedule.read_config({"_class_name": "PNDMScheduler", **others}) == (
    plain
  )


def test_no_limit_of_lambda_is_none_here_and_left_out_there():
  # Json has no infinity, which stands for it in diffusers.
  config, sampler = schedule.read_config(
    DPM | {"lambda_min_clipped": -float("inf")}
  )
  assert config.lambda_min_clipped is None
  assert "lambda_min_clipped" not in schedule.write_config(config, sampler)


def test_what_cannot_be_written_is_refused():
  config = schedule.ScheduleConfig(**CASES["zero_terminal"])
  assert schedule.write_config(config, "euler")["rescale_betas_zero_snr"]
  with pytest.raises(ValueError, match="rescale_zero_terminal_snr"):
    schedule.write_config(config, "pndm")
  with pytest.raises(ValueError, match="sampler is 'plms'"):
    schedule.write_config(config, "plms")
