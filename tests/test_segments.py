"""Dialogues that share a row know nothing of each other.

One dialogue of a row is changed in all that it has, its words, its photos and
its captions: what the model says in the others, their losses and every
gradient of those stay as they were. The same comparison is made with the
segments of a row run together, where it must fail.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import toy_agent

from photochat_jax import captions, inputs, objective
from photochat_jax.data import pipeline, vocabulary
from photochat_jax.models.photochat import PhotoChat

JOINT = 2
TOLERANCE = 1e-6
# Compiled in half the time, to a slower program, which runs a few times only.
QUICKLY = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """A model, and a row of three dialogues or more with photos in each."""
  run = small_run.run_config(
    data={"length": 320, "photos_in": 6, "photos_out": 4}
  )
  run = dataclasses.replace(
    run, loss=dataclasses.replace(run.loss, text_on="all")
  )
  llm, clip = inputs.load_tokenizers(run)
  dialogues = small_run.train_dialogues(tmp_path_factory.mktemp("data"))
  source = pipeline.Pipeline(
    dialogues, "dialogues", inputs.data_spec(run, 1), llm, clip
  )
  batch = next(b for b in map(source.batch, range(60)) if fits(b))
  table, _ = vocabulary.build_vocabulary_map(llm, clip)
  model = PhotoChat(run.model)
  params = toy_agent.random_params(model)
  return run, model, params, batch, table, clip.encode_padded("")


def owners(batch):
  """The segment of each photo seen, and of each photo drawn; 0 for none."""
  (segments,), visual = batch["segments"], batch["visual_index"][0]
  k = toy_agent.config().num_visual_tokens
  seen = [
    segments[visual // k == p].max(initial=0)
    for p in range(batch["photos_in"].shape[1])
  ]
  mask = batch["caption_mask"][0].any(axis=-1)
  drawn = np.where(mask, segments[batch["caption_index"][0, :, 0]], 0)
  return np.asarray(seen), drawn


def fits(batch):
  seen, drawn = owners(batch)
  return set(seen) >= {1, 2, 3} and len(set(drawn) - {0}) >= 2


def changed(batch, segment, seed=1):
  """The batch with other words, photos and captions in one segment."""
  rng = np.random.default_rng(seed)
  out = {name: array.copy() for name, array in batch.items()}
  here = (batch["segments"][0] == segment) & (batch["visual_index"][0] < 0)
  out["tokens"][0, here] = rng.integers(5, 700, here.sum())
  seen, drawn = owners(batch)
  for name, mine in (("photos_in", seen), ("photos_out", drawn)):
    photos = out[name][0]
    photos[mine == segment] = 255 - photos[mine == segment]
  tokens = out["clip_tokens"][0]
  tokens[drawn == segment, 1:4] = rng.integers(5, 700, 3)
  return out


def without(batch, segment):
  """The batch in which one segment bears no loss."""
  _, drawn = owners(batch)
  out = {name: array.copy() for name, array in batch.items()}
  out["loss_kind"][batch["segments"] == segment] = 0
  out["photos_out_mask"][0, drawn == segment] = False
  return out


@pytest.fixture(scope="module")
def logits_of(world):
  """(batch) -> logits [L, V] of its row."""
  _, model, params, *_ = world

  def run(batch):
    return model.logits(params, objective.converse(model, params, batch))

  run = jax.jit(run, compiler_options=QUICKLY)
  return lambda batch: np.asarray(run(batch))[0]


@pytest.fixture(scope="module")
def loss_of(world):
  """(batch) -> the loss and its gradient on every parameter."""
  run, model, params, batch, table, empty = world
  keys = captions.photo_keys(
    run, JOINT, 0, jnp.asarray(batch["example_id"]).reshape(-1)
  )

  def loss(params, batch):
    return objective.loss_terms(
      model, run, run.stages[JOINT], params, jnp.float32(1), batch, keys,
      jnp.int32(0), empty, table,
    )[0]  # fmt: skip

  step = jax.jit(jax.value_and_grad(loss), compiler_options=QUICKLY)
  return lambda batch: step(params, batch)


def difference(one, two):
  """The largest difference of two trees, relative to the largest value."""
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
  return max(
    float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(a).max(), 1e-6))
    for a, b in pairs
  )


@pytest.mark.parametrize("segment", [1, 2, 3])
def test_what_others_say_does_not_depend_on_a_segment(
  world, logits_of, segment
):
  batch = world[3]
  before = logits_of(batch)
  after = logits_of(changed(batch, segment))
  segments = batch["segments"][0]
  others = (segments != segment) & (segments > 0)
  assert np.abs(before - after)[others].max() <= TOLERANCE
  assert np.abs(before - after)[segments == segment].max() > 1e-3


@pytest.mark.parametrize("segment", [1, 2, 3])
def test_losses_and_gradients_of_others_do_not_depend_on_it(
  world, loss_of, segment
):
  batch = world[3]
  one = loss_of(without(batch, segment))
  two = loss_of(without(changed(batch, segment), segment))
  assert difference(one, two) <= TOLERANCE
  # It has a part in the whole loss, or this would show nothing.
  assert difference(loss_of(batch), loss_of(changed(batch, segment))) > 1e-3


def test_the_comparison_fails_where_segments_run_together(
  world, loss_of, logits_of
):
  batch = world[3]

  def together(batch):
    return batch | {"segments": (batch["segments"] > 0).astype(np.int32)}

  one = loss_of(together(without(batch, 1)))
  two = loss_of(together(without(changed(batch, 1), 1)))
  assert difference(one, two) > 1e-3
  before = logits_of(together(batch))
  after = logits_of(together(changed(batch, 1)))
  assert np.abs(before - after)[batch["segments"][0] == 3].max() > 1e-3


def test_the_comparison_fails_where_a_boundary_bears_a_loss(world, loss_of):
  batch = {name: array.copy() for name, array in world[3].items()}
  first = np.flatnonzero(batch["segments"][0] == 2)[0]
  assert batch["loss_kind"][0, first] == 0
  assert batch["loss_kind"][0, first + 1] > 0  # text_on is 'all'
  batch["loss_kind"][0, first] = 1
  one = loss_of(without(batch, 1))
  two = loss_of(without(changed(batch, 1), 1))
  assert difference(one, two) > 1e-3


def test_a_packed_dialogue_is_read_as_if_it_were_alone(world, logits_of):
  """Positions restart, and photos are found, wherever it stands in a row."""
  batch = world[3]
  packed, segments = logits_of(batch), batch["segments"][0]
  for segment in (2, 3):
    here = np.flatnonzero(segments == segment)
    alone = {name: array.copy() for name, array in batch.items()}
    for name, empty in (
      ("tokens", 0), ("segments", 0), ("positions", 0), ("visual_index", -1)
    ):  # fmt: skip
      alone[name][:] = empty
      alone[name][0, : len(here)] = batch[name][0, here]
    assert alone["positions"][0, : len(here)].tolist() == [*range(len(here))]
    single = logits_of(alone)[: len(here)]
    finite = np.isfinite(single)
    np.testing.assert_allclose(
      packed[here][finite], single[finite], atol=1e-5
    )
