"""The optimiser against AdamW written out in numpy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from photochat_jax import optim
from photochat_jax.config import HealthConfig, OptimConfig, StageConfig

STAGE = StageConfig(name="joint", steps=100)
PARAMS = {
  "unet": {"conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,))}},
  "vae": {"conv": {"kernel": jnp.full((3,), 2.0)}},
}


def test_split_and_merge_divide_and_rejoin_every_parameter():
  trainable, frozen = optim.split(PARAMS, ("unet/.*/kernel",))
  assert list(trainable) == ["unet"] and list(trainable["unet"]["conv"]) == [
    "kernel"
  ]
  assert list(frozen["unet"]["conv"]) == ["bias"] and "vae" in frozen
  chex.assert_trees_all_equal(optim.merge(trainable, frozen), PARAMS)


def test_split_refuses_a_regex_that_matches_nothing():
  with pytest.raises(ValueError, match="'lora/.*' matches no parameter"):
    optim.split(PARAMS, ("unet/.*", "lora/.*"))


def test_what_no_stage_to_come_trains_is_held_narrow():
  params = {
    "unet": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
    "vae": {"kernel": jnp.ones(2)},
    "text_model": {"kernel": jnp.ones(2), "count": jnp.ones(2, jnp.int32)},
    "qformer": {"kernel": jnp.ones(2)},
  }
  stages = (
    StageConfig(name="now", steps=1, trainable=("unet/kernel",)),
    StageConfig(name="later", steps=1, trainable=("qformer/.*",)),
    StageConfig(name="left out", steps=0, trainable=("text_model/.*",)),
  )
  held = optim.hold_frozen(params, stages, "bfloat16")
  assert jax.tree.map(lambda leaf: leaf.dtype.name, held) == {
    "unet": {"kernel": "float32", "bias": "bfloat16"},
    # Precomputed moments are known by its weights.
    "vae": {"kernel": "float32"},
    "text_model": {"kernel": "bfloat16", "count": "int32"},
    "qformer": {"kernel": "float32"},
  }


def test_only_the_trainable_tree_is_differentiated():
  trainable, frozen = optim.split(PARAMS, ("vae/.*",))

  def loss(tree):
    params = optim.merge(tree, frozen)
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

  grads = jax.grad(loss)(trainable)
  chex.assert_trees_all_close(
    grads, {"vae": {"conv": {"kernel": jnp.full((3,), 4.0)}}}
  )


def test_the_cosine_schedule_by_hand():
  config = OptimConfig(learning_rate=2.0, warmup_steps=10, final_scale=0.1)
  rate = optim.learning_rate(config, STAGE)
  # Warm-up ends with the tenth update; halfway through the other 90 the
  # cosine is at the mean of 2 and 0.2.
  expected = {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 55: 1.1, 100: 0.2, 500: 0.2}
  for step, value in expected.items():
    np.testing.assert_allclose(rate(step), value, rtol=1e-5, err_msg=step)


@pytest.mark.parametrize(
  "schedule, at_55, at_100", [("constant", 2, 2), ("linear", 1.1, 0.2)]
)
def test_other_schedules_by_hand(schedule, at_55, at_100):
  config = OptimConfig(
    learning_rate=2.0, warmup_steps=10, final_scale=0.1, schedule=schedule
  )
  rate = optim.learning_rate(config, STAGE)
  got = [rate(step) for step in (0, 9, 55, 100)]
  np.testing.assert_allclose(got, [0.2, 2, at_55, at_100], rtol=1e-5)


def test_a_stage_has_its_own_peak_and_a_short_one_no_longer_warm_up():
  config = OptimConfig(learning_rate=2.0, warmup_steps=10)
  stage = StageConfig(steps=4, learning_rate=0.5)
  rate = optim.learning_rate(config, stage)
  np.testing.assert_allclose(
    [rate(step) for step in range(4)], [0.125, 0.25, 0.375, 0.5], rtol=1e-5
  )
  no_warmup = optim.learning_rate(OptimConfig(warmup_steps=0), stage)
  np.testing.assert_allclose(no_warmup(0), 0.5)


def adamw(params, grads_by_step, config, rate, multiplier, decay):
  """Decoupled weight decay (Loshchilov and Hutter 2019) in float64."""
  params = {k: np.asarray(v, np.float64) for k, v in params.items()}
  mean = {k: np.zeros_like(v) for k, v in params.items()}
  square = {k: np.zeros_like(v) for k, v in params.items()}
  for step, grads in enumerate(grads_by_step):
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    scale = min(1.0, config.grad_clip / norm)
    for k, grad in grads.items():
      grad = grad * scale
      mean[k] = config.b1 * mean[k] + (1 - config.b1) * grad
      square[k] = config.b2 * square[k] + (1 - config.b2) * grad**2
      m = mean[k] / (1 - config.b1 ** (step + 1))
      v = square[k] / (1 - config.b2 ** (step + 1))
      update = m / (np.sqrt(v) + config.eps)
      update += config.weight_decay * decay[k] * params[k]
      params[k] = params[k] - rate(step) * multiplier[k] * update
  return params


def test_updates_are_those_of_adamw_with_multipliers_and_decay():
  config = OptimConfig(
    learning_rate=0.1,
    warmup_steps=2,
    schedule="constant",
    grad_clip=0.7,
    weight_decay=0.3,
    eps=1e-3,
    lr_multipliers=(("unet/.*", 0.25), (".*", 1.0)),
    decay=((".*/bias", False), (".*", True)),
  )
  rng = np.random.default_rng(0)
  grads_by_step = [
    jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), PARAMS)
    for _ in range(4)
  ]
  tx = optim.make_optimizer(config, HealthConfig(), STAGE, PARAMS)
  params, state = PARAMS, tx.init(PARAMS)
  for grads in grads_by_step:
    grads = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), grads)
    updates, state = tx.update(grads, state, params, loss=1.0)
    params = optax.apply_updates(params, updates)

  def flat(tree):
    unet = tree["unet"]["conv"]
    vae = tree["vae"]["conv"]["kernel"]
    return {"kernel": unet["kernel"], "bias": unet["bias"], "vae": vae}

  expected = adamw(
    flat(PARAMS),
    [flat(grads) for grads in grads_by_step],
    config,
    rate=lambda step: 0.1 * min(1.0, (step + 1) / 2),
    multiplier={"kernel": 0.25, "bias": 0.25, "vae": 1.0},
    decay={"kernel": 1, "bias": 0, "vae": 1},
  )
  chex.assert_trees_all_close(flat(params), expected, rtol=1e-5, atol=1e-6)


def test_a_parameter_in_no_row_of_a_table_is_named():
  config = OptimConfig(lr_multipliers=(("unet/.*", 1.0),))
  with pytest.raises(ValueError, match="vae/conv/kernel"):
    optim.make_optimizer(config, HealthConfig(), STAGE, PARAMS)


def test_no_clip_and_no_decay_where_they_are_zero():
  config = OptimConfig(
    grad_clip=0.0, weight_decay=0.0, warmup_steps=0, learning_rate=1.0
  )
  tx = optim.make_optimizer(config, HealthConfig(), STAGE, PARAMS)
  grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e4), PARAMS)
  updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, loss=1.0)
  # Adam's first step has size 1 whatever the gradient's.
  chex.assert_trees_all_close(
    updates, jax.tree.map(lambda leaf: -jnp.ones_like(leaf), PARAMS), rtol=1e-3
  )
  mean = state.inner[0].mu["vae"]["conv"]["kernel"]
  np.testing.assert_allclose(mean, np.full(3, 1e3), rtol=1e-5)
