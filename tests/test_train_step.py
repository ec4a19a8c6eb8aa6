"""What the update may and may not reach, on the whole model."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import toy_agent

from photochat_jax import (
  captions,
  inputs,
  losses,
  objective,
  optim,
  sharding,
  train_step,
  trainer,
)
from photochat_jax.data import pipeline, vocabulary
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.state import TrainState

JOINT = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """Tokenizers, the vocabulary map, and a batch with photos on both sides."""
  run = small_run.run_config()
  llm, clip = inputs.load_tokenizers(run)
  dialogues = small_run.train_dialogues(tmp_path_factory.mktemp("data"))
  data = pipeline.Pipeline(
    dialogues, "dialogues", inputs.data_spec(run, 2), llm, clip
  )
  batch = next(b for b in map(data.batch, range(20)) if later_photo(b))
  table, _ = vocabulary.build_vocabulary_map(llm, clip)
  model = PhotoChat(run.model)
  return {
    "llm": llm,
    "clip": clip,
    "map": table,
    "batch": batch,
    "params": toy_agent.random_params(model),
  }


def later_photo(batch):
  """Whether a photo is drawn after another was seen in its dialogue."""
  for b in range(len(batch["tokens"])):
    for q in np.flatnonzero(batch["photos_out_mask"][b]):
      at = batch["caption_index"][b, q, 0]
      same = batch["segments"][b] == batch["segments"][b, at]
      if (batch["visual_index"][b, :at] >= 0)[same[:at]].any():
        return True
  return False


def photo_gradient(world, matrix, batch=None, **bridge):
  """The photo loss's gradient on every parameter."""
  batch = batch or world["batch"]
  run = small_run.run_config({"matrix": matrix, **bridge})
  stage = dataclasses.replace(
    run.stages[JOINT], losses=dataclasses.replace(
      run.stages[JOINT].losses, text=0.0, caption=0.0
    )
  )
  model = PhotoChat(run.model)
  keys = captions.photo_keys(
    run, JOINT, 0, jnp.asarray(world["batch"]["example_id"]).reshape(-1)
  )

  def loss(params):
    return objective.loss_terms(
      model, run, stage, params, jnp.float32(1), batch, keys,
      jnp.int32(0), world["clip"].encode_padded(""), world["map"],
    )[0]  # fmt: skip

  return jax.jit(jax.grad(loss))(world["params"])


def size(tree):
  return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_pipeline_sends_no_photo_gradient_to_the_language_model(world):
  grads = photo_gradient(world, "none")
  for part in (
    "language_model", "language_projection", "qformer", "vision_model"
  ):  # fmt: skip
    assert size(grads[part]) == 0.0, part
  assert size(grads["unet"]) > 0
  assert size(grads["text_model"]) > 0


@pytest.mark.parametrize("matrix", ["aligned", "all_pairs", "static"])
def test_photo_gradient_reaches_language_and_eyes(world, matrix):
  grads = photo_gradient(world, matrix)
  for part in (
    "language_model", "language_projection", "qformer", "vision_model"
  ):  # fmt: skip
    assert size(grads[part]) > 0, part
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_samples_reach_language_and_eyes_without_a_matrix(world):
  choices = {"matrix": "none", "draw": "gumbel", "estimator": "rloo"}
  run = small_run.run_config(choices)
  batch = draw_first(world, run)
  assert batch["clip_tokens"].shape[1] == 4 * run.data.photos_out
  grads = photo_gradient(world, batch=batch, **choices)
  for part in ("language_model", "language_projection", "qformer", "unet"):
    assert size(grads[part]) > 0, part
  # One caption, drawn four times, says nothing about which is better.
  same = {
    name: np.repeat(array[:, ::4], 4, axis=1)
    for name, array in batch.items()
    if name in ("caption_tokens", "clip_tokens", "alignment", "caption_final")
  }
  grads = photo_gradient(world, batch=batch | same, **choices)
  assert size(grads["language_model"]) < 1e-6 < size(grads["unet"])


def test_dropped_caption_sends_no_gradient(world, monkeypatch):
  # A photo drawn from the empty caption says nothing of the caption.
  real = small_run.run_config

  def dropping(bridge):
    run = real(bridge)
    loss = dataclasses.replace(run.loss, caption_dropout=1.0)
    return dataclasses.replace(run, loss=loss)

  monkeypatch.setattr(small_run, "run_config", dropping)
  assert size(photo_gradient(world, "aligned")["language_model"]) == 0.0


def start_state(run, model, params, index):
  trainable, _ = optim.split(params, run.stages[index].trainable)
  optimizer = optim.make_optimizer(
    run.optim, run.health, run.stages[index], trainable
  )
  state = TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(trainable),
    ema={part: params[part] for part in run.ema.parts},
    latent_scale=jnp.float32(1),
  )
  return state, optimizer


def one_step(world, run, batch, retokenise=None):
  model = PhotoChat(run.model)
  state, optimizer = start_state(run, model, world["params"], JOINT)
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    step = train_step.make_train_step(
      model, run, JOINT, 0, optimizer, world["clip"].encode_padded(""),
      world["map"], retokenise, mesh,
    )  # fmt: skip
    return state, *jax.jit(step)(state, batch)


def test_frozen_stays_bit_for_bit_and_averages_follow(world):
  run = small_run.run_config()
  before, after, _ = one_step(world, run, world["batch"])
  for part in ("vae", "text_model"):
    jax.tree.map(
      np.testing.assert_array_equal, after.params[part], before.params[part]
    )
  assert int(after.step) == 1
  wanted = jax.tree.map(
    lambda old, new: np.float32(run.ema.decay) * old
    + np.float32(1 - run.ema.decay) * new,
    before.ema["unet"],
    after.params["unet"],
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    after.ema["unet"],
    wanted,
  )


def test_losses_do_not_depend_on_the_rows_order(world):
  run = small_run.run_config({"draw": "gumbel", "retokenise": "two_pass"})
  swapped = {name: array[::-1] for name, array in world["batch"].items()}
  _, one, first = one_step(world, run, world["batch"])
  _, two, second = one_step(world, run, swapped)
  np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-5)
  np.testing.assert_allclose(first["photo"], second["photo"], rtol=1e-5)


@pytest.mark.parametrize(
  "choices",
  [
    {"draw": "argmax"},
    {"draw": "gumbel"},
    {"draw": "gumbel", "estimator": "rloo", "matrix": "none"},
  ],
)
def test_two_passes_equal_the_callback(world, choices):
  run = small_run.run_config(choices)
  retokenise = vocabulary.Retokeniser(world["llm"], world["clip"], 16)
  _, in_program, metrics = one_step(world, run, world["batch"], retokenise)

  batch = draw_first(world, run)
  # The captions drawn are not the gold ones, or this would show nothing.
  mask, samples = world["batch"]["caption_mask"], run.bridge.num_samples
  gold = np.repeat(world["batch"]["caption_tokens"], samples, axis=1)
  drawn = batch["caption_tokens"]
  assert (drawn != gold)[np.repeat(mask, samples, axis=1)].any()
  _, two_pass, again = one_step(world, run, batch)
  np.testing.assert_allclose(metrics["loss"], again["loss"], rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    in_program.params,
    two_pass.params,
  )


def draw_first(world, run):
  """The batch with captions of the model's own, the first of two passes."""
  model = PhotoChat(run.model)
  state, _ = start_state(run, model, world["params"], JOINT)
  return trainer.Trainer.retokenised(
    types.SimpleNamespace(mesh=sharding.make_mesh()),
    vocabulary.Retokeniser(world["llm"], world["clip"], 16),
    jax.jit(train_step.make_draw_step(model, run, JOINT, 0)),
    state,
    jax.device_put(world["batch"]),
  )


def test_next_token_by_hand():
  # Two tokens of text and one of caption over a vocabulary of three.
  table = np.log(
    np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
  )
  hidden = jnp.arange(3.0)[None, :, None] + jnp.array([[[0.0]]])
  hidden = jnp.concatenate([hidden, jnp.zeros((1, 1, 1))], axis=1)
  tokens = jnp.array([[0, 1, 0, 2]])
  kind = jnp.array([[1, losses.TEXT, losses.TEXT, losses.CAPTION]])
  weights = {losses.TEXT: 1.0, losses.CAPTION: 3.0}
  want = -(np.log(0.25) + np.log(0.1) + 3 * np.log(0.6)) / 3
  for chunk in (0, 2):
    loss, sums = losses.next_token(
      lambda h: jnp.asarray(table)[h[..., 0].astype(int)],
      hidden, tokens, kind, weights, losses.count_tokens(kind), chunk,
    )  # fmt: skip
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(sums["text_nats"], -np.log(0.025), rtol=1e-6)
    assert int(sums["caption_tokens"]) == 1


def test_schedule_is_straight_between_points():
  points = ((0, 0.0), (10, 1.0), (20, 0.5))
  for step, want in ((0, 0.0), (5, 0.5), (15, 0.75), (99, 0.5)):
    assert float(losses.scheduled(points, jnp.int32(step))) == want
  assert losses.scheduled(0.3, jnp.int32(7)) == 0.3


def changed_run(**changes):
  """The small run, its joint stage changed."""
  run = small_run.run_config()
  joint = dataclasses.replace(run.stages[JOINT], **changes)
  return dataclasses.replace(run, stages=(*run.stages[:JOINT], joint))


def test_a_batch_in_parts_gives_the_gradient_of_the_whole(world):
  # The two rows have different numbers of tokens and of photos: a mean of
  # their means would be another number.
  counts = [
    objective.count_batch({k: v[i : i + 1] for k, v in world["batch"].items()})
    for i in (0, 1)
  ]
  assert counts[0]["tokens"] != counts[1]["tokens"]
  _, whole, first = one_step(world, changed_run(), world["batch"])
  _, parts, second = one_step(world, changed_run(accumulate=2), world["batch"])
  for name in first:
    np.testing.assert_allclose(first[name], second[name], rtol=2e-5)
  one, two = (state.opt_state.inner[1].mu for state in (whole, parts))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, two
  )


def test_cutting_gives_each_device_a_share_of_its_own_rows():
  parts = train_step.cut({"x": jnp.arange(8)}, 2)["x"]
  # Of two devices with rows 0-3 and 4-7.
  assert parts.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("bad", ["nan", "inf", "spike"])
def test_a_bad_update_is_skipped_and_the_next_batch_taken(world, bad):
  run = changed_run()
  run = dataclasses.replace(
    run, health=dataclasses.replace(run.health, spike_warmup=1)
  )
  model = PhotoChat(run.model)
  state, optimizer = start_state(run, model, world["params"], JOINT)
  step = jax.jit(
    train_step.make_train_step(
      model, run, JOINT, 0, optimizer, world["clip"].encode_padded(""),
      world["map"],
    )
  )  # fmt: skip
  state, metrics = step(state, world["batch"])
  assert int(metrics["skipped"]) == 0
  if bad == "spike":
    usual = state.opt_state.usual / 1e3
    spoilt = state.replace(opt_state=state.opt_state._replace(usual=usual))
  else:
    # The photo's loss follows this number.
    scale = {"nan": np.nan, "inf": np.inf}[bad]
    spoilt = state.replace(latent_scale=jnp.float32(scale))
  after, metrics = step(spoilt, world["batch"])
  after, metrics = step(after, world["batch"])
  assert int(metrics["skipped"]) == 2
  assert int(after.step) == 3
  for name in ("params", "ema"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(after, name), getattr(state, name)
    )
  jax.tree.map(
    np.testing.assert_array_equal, after.opt_state.inner, state.opt_state.inner
  )
  opt_state = after.opt_state._replace(usual=state.opt_state.usual)
  well, metrics = step(
    after.replace(latent_scale=state.latent_scale, opt_state=opt_state),
    world["batch"],
  )
  assert int(metrics["skipped"]) == 0
  assert int(well.opt_state.accepted) == 2
