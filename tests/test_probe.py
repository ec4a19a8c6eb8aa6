"""The probe where the answers are known."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import toy_agent

from photochat_jax import inputs, probe
from photochat_jax.data import pipeline, vocabulary
from photochat_jax.models.photochat import PhotoChat


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
  run = small_run.run_config()
  llm, clip = inputs.load_tokenizers(run)
  dialogues = small_run.train_dialogues(tmp_path_factory.mktemp("data"))
  data = pipeline.Pipeline(
    dialogues, "dialogues", inputs.data_spec(run, 4, augment=False), llm, clip
  )
  table, _ = vocabulary.build_vocabulary_map(llm, clip)
  params = toy_agent.random_params(PhotoChat(run.model))
  world = probe.look(run, params, 1.0, data.batch(0), table, 2)
  retokenise = vocabulary.Retokeniser(llm, clip, run.bridge.max_tokens)
  return llm, world, retokenise


def test_the_loss_is_that_of_the_captions_as_they_are(setting):
  _, world, _ = setting
  x = len(world.keys)
  assert x > 1 and world.logits.shape[:2] == (x, 16)
  rows = np.arange(x)
  found = probe.measure(world, world.photos["clip_tokens"], rows, 3)
  # Another caption, the same noise: the same where captions are.
  twice = probe.measure(
    world, world.photos["clip_tokens"][[0, 0, 1]], np.array([0, 0, 1])
  )
  np.testing.assert_allclose(twice, found[[0, 0, 1]], rtol=1e-5)
  other = probe.measure(world, world.photos["clip_tokens"][[1]], rows[:1])
  assert abs(other[0] - found[0]) > 1e-6


def test_where_the_loss_is_linear_aligned_is_the_oracle(setting, monkeypatch):
  """Then the first-order guess of a swap is what it costs."""
  llm, world, retokenise = setting
  world = dataclasses.replace(world)  # Nothing compiled for the real loss.
  rng = np.random.default_rng(0)
  slope = None

  def errors(world, context, rows):
    nonlocal slope
    if slope is None:
      shape = len(world.keys), *context.shape[1:]
      slope = rng.normal(size=shape).astype(np.float32)
    return jnp.sum(context * jnp.asarray(slope)[rows], axis=(1, 2))

  monkeypatch.setattr(probe, "errors", errors)
  monkeypatch.setattr(PhotoChat, "read_caption", lambda self, p, x: x)
  # Words of one piece in both vocabularies move no other word.
  writable = np.zeros(world.logits.shape[-1], bool)
  for word in ("ball", "star", "red", "blue", "grass", "snow", "big"):
    (token,) = llm.encode(f" {word}")[-1:]
    z, _, _ = retokenise(
      np.full((1, 16), token), np.arange(16)[None] < 1
    )
    # BOS and one piece; EOS is what the rest is filled with.
    writable[token] = (z[0] != z[0, -1]).sum() == 2
  assert writable.sum() >= 4
  # Only positions whose own token is a whole word count.
  positions = [
    at
    for at in probe.oracle(world, retokenise, 4, writable)
    if writable[at.candidates[0]]
  ]
  assert len(positions) >= 2
  found = probe.gradient(world, "aligned", "straight_through")
  for scores in probe.score(world, positions, found):
    assert scores.top_1 == scores.sign == 1
    assert scores.rank == pytest.approx(1)
    assert scores.cosine == pytest.approx(1, abs=1e-3)
    assert scores.directions > 1
  # The released matrix sends one direction for a caption, so ranks nothing.
  released = probe.gradient(world, "all_pairs", "straight_through")
  for scores in probe.score(world, positions, released):
    assert scores.directions == 1


def test_sampled_goes_to_the_exact_gradient(monkeypatch):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(1, 2, 3)).astype(np.float32)
  costs = rng.normal(size=(3, 3))
  world = types.SimpleNamespace(
    logits=jnp.asarray(logits),
    photos={
      "caption_mask": np.ones((1, 2), bool),
      "caption_tokens": np.zeros((1, 2), np.int32),
    },
  )
  monkeypatch.setattr(
    probe, "measure", lambda world, z, rows: costs[z[:, 0], z[:, 1]]
  )
  found = probe.sampled(world, lambda y, mask: (y, None, None), 64, 60)
  p = np.asarray(jax.nn.softmax(logits[0], axis=-1), np.float64)
  exact = np.zeros((2, 3))
  for y in itertools.product(range(3), repeat=2):
    exact += p[0, y[0]] * p[1, y[1]] * costs[y] * (np.eye(3)[list(y)] - p)
  # 3,840 captions: a standard error of about 0.01.
  np.testing.assert_allclose(found[0], exact, atol=0.05)


def test_scores_by_hand():
  # p is even over four words; the gradient is a quarter of the guess.
  world = types.SimpleNamespace(
    logits=jnp.zeros((1, 1, 4)),
    photos={"caption_mask": np.ones((1, 1), bool)},
  )
  positions = [
    probe.Position(0, 0, np.array([2, 0, 1]), np.array([0.0, -1.0, 2.0]))
  ]
  gradient = np.array([[[0.5, 0.75, 0.25, 0.0]]])
  # Guesses less that of word 2: 0, 1, 2. The best is -1, of word 0.
  (found,) = probe.score(world, positions, gradient)
  assert found.top_1 == 0 and found.sign == 0.5
  assert found.rank == pytest.approx(0.5)
  assert found.cosine == pytest.approx(3 / 5)
  assert found.norm == pytest.approx(np.sqrt(0.875))
  assert found.directions == 1
  (silent,) = probe.score(world, positions, np.zeros((1, 1, 4)))
  assert silent.rank == silent.cosine == silent.norm == silent.directions == 0
