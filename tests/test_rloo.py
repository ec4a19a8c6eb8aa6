"""The score-function estimator against the exact expectation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from photochat_jax import captions, losses, objective
from photochat_jax.config import RunConfig

N, V = 2, 3  # Positions, vocabulary: nine captions.
CAPTIONS = list(itertools.product(range(V), repeat=N))


def exact_gradient(logits, costs):
  """Of the expected cost, float64: sum over captions of p(y) L(y)."""
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  found = np.zeros_like(logits)
  for y, cost in zip(CAPTIONS, costs, strict=True):
    of_y = np.prod([p[i, v] for i, v in enumerate(y)])
    one_hot = np.eye(V)[list(y)]
    found += of_y * cost * (one_hot - p)
  return found, p


def estimate(logits, tokens, errors, mask):
  """The gradient that one draw of K captions gives to the logits."""

  def loss(logits):
    log_probs = objective.caption_log_probs(logits, tokens, mask)
    return jnp.sum(losses.leave_one_out(errors, log_probs))

  return jax.grad(loss)(logits)


def test_the_average_over_all_draws_is_the_exact_gradient():
  rng = np.random.default_rng(1)
  logits, costs = rng.normal(size=(N, V)), rng.normal(size=len(CAPTIONS))
  exact, p = exact_gradient(logits, costs)
  one = jax.jit(estimate)
  average = np.zeros((N, V))
  for draw in itertools.product(range(len(CAPTIONS)), repeat=2):  # K = 2
    tokens = np.array([CAPTIONS[k] for k in draw], np.int32)
    chance = np.prod([p[i, v] for y in tokens for i, v in enumerate(y)])
    errors = jnp.asarray([[costs[k] for k in draw]], jnp.float32)
    found = one(
      jnp.asarray(logits[None], jnp.float32), tokens, errors,
      jnp.ones((1, N), bool),
    )  # fmt: skip
    average += chance * np.asarray(found[0])
  np.testing.assert_allclose(average, exact, atol=1e-6)


def test_log_probabilities_by_hand():
  logits = np.log([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1.0, 1.0, 1.0]]])
  padded = np.concatenate([logits, np.full((1, 3, 1), -np.inf)], -1)
  tokens = np.array([[0, 2, 3], [1, 1, 0]], np.int32)
  mask = np.array([[True, True, False]])
  found = objective.caption_log_probs(jnp.asarray(padded), tokens, mask)
  np.testing.assert_allclose(
    found, np.log([[0.5 * 0.7, 0.25 * 0.2]]), rtol=1e-6
  )
  slope = estimate(
    jnp.asarray(padded, jnp.float32), tokens, jnp.array([[1.0, 3.0]]), mask
  )
  # Advantages -2 and 2, halved: p falls out of the difference.
  want = np.zeros((1, 3, 4))
  want[0, 0, :2], want[0, 1, 1:3] = [-1, 1], [1, -1]
  np.testing.assert_allclose(slope, want, atol=1e-6)
  # What it is worth is nothing: the loss that is shown is the photo's.
  assert not np.any(losses.leave_one_out(jnp.ones((2, 3)), jnp.ones((2, 3))))


def test_samples_are_of_their_own_and_stand_together():
  run = RunConfig()
  model = run.model
  bridge = type(run.bridge)(draw="gumbel", estimator="rloo", rloo_samples=3)
  run = type(run)(model=type(model)(**vars(model) | {"bridge": bridge}))
  logits = jnp.zeros((2, 40, 8))
  photos = {
    "caption_mask": jnp.ones((2, 40), bool).at[:, 39].set(False),
    "caption_tokens": jnp.full((2, 40), 7),
  }
  keys = jax.random.split(jax.random.key(0), 2)
  y = captions.draw_captions(run, logits, photos, keys)
  assert y.shape == (6, 40)
  assert len(np.unique(y, axis=0)) == 6
  assert (y[:, 39] == 7).all()
  # A photo's samples are the same in another batch.
  alone = captions.draw_captions(
    run, logits[1:], {k: v[1:] for k, v in photos.items()}, keys[1:]
  )
  np.testing.assert_array_equal(alone, y[3:])
