"""The loss on the dev split: held still, and a mean over all its batches."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import toy_agent

from photochat_jax import (
  captions,
  initial,
  inputs,
  objective,
  sharding,
  train,
  validation,
)
from photochat_jax.checkpoints.manager import Checkpoints
from photochat_jax.config import ConfigError, build
from photochat_jax.data import pipeline, vocabulary
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.state import TrainState

JOINT = 2


def test_it_is_the_mean_over_what_counts_in_all_batches(tmp_path):
  run = small_run.run_config()
  log = dataclasses.replace(run.log, dev_batches=2)
  # Captions are dropped in training and must not be here.
  loss = dataclasses.replace(run.loss, caption_dropout=1.0)
  run = dataclasses.replace(run, log=log, loss=loss)
  llm, clip = inputs.load_tokenizers(run)
  data = pipeline.Pipeline(
    small_run.train_dialogues(tmp_path),
    "dialogues",
    inputs.data_spec(run, 2),
    llm,
    clip,
  )
  table, _ = vocabulary.build_vocabulary_map(llm, clip)
  model, stage = PhotoChat(run.model), run.stages[JOINT]
  params = toy_agent.random_params(model)
  state = TrainState(jnp.int32(1), params, (), {}, jnp.float32(1))
  mesh = sharding.make_mesh()
  measure = validation.DevLoss(
    model, run, initial.Leg(JOINT, stage, 0, 2), mesh, data,
    clip.encode_padded(""), table,
  )  # fmt: skip
  with jax.set_mesh(mesh):
    found = measure(state)
    assert measure(state.replace(step=jnp.int32(7))) == found
    other = jax.tree.map(lambda leaf: leaf * 1.1, params)
    assert measure(state.replace(params=other))["dev/loss"] != found["dev/loss"]

  undropped = dataclasses.replace(
    run, loss=dataclasses.replace(loss, caption_dropout=0.0)
  )
  nats = tokens = photo = photos = 0.0
  for number in (0, 1):
    batch = data.batch(number)
    keys = captions.photo_keys(
      run, JOINT, number, jnp.asarray(batch["example_id"]).reshape(-1)
    )
    _, terms = objective.loss_terms(
      model, undropped, stage, params, jnp.float32(1), batch, keys,
      jnp.int32(0), jnp.asarray(clip.encode_padded("")), table,
    )  # fmt: skip
    count = int(np.sum(batch["photos_out_mask"]))
    nats += float(terms["text_nats"])
    tokens += float(terms["text_tokens"])
    photo += float(terms["photo"]) * count
    photos += count
  np.testing.assert_allclose(found["dev/text_loss"], nats / tokens, rtol=1e-4)
  np.testing.assert_allclose(found["dev/photo"], photo / photos, rtol=1e-4)


def test_the_best_checkpoint_stays(tmp_path):
  run = small_run.run_config(steps=4)
  run = dataclasses.replace(
    run,
    stages=run.stages[:1],
    log=dataclasses.replace(run.log, dev_every=1, dev_batches=1),
    checkpoint=dataclasses.replace(
      run.checkpoint, every_steps=1, keep=1, keep_best=1
    ),
    # So that the first is the best.
    optim=dataclasses.replace(
      run.optim, learning_rate=1.0, warmup_steps=0, grad_clip=0.0
    ),
  )
  train.train(run, tmp_path)
  rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
  dev = {row["step"]: row["dev/loss"] for row in rows if "dev/loss" in row}
  assert list(dev) == [1, 2, 3]
  best = min(dev, key=dev.get)
  with Checkpoints(tmp_path) as saved:
    assert saved.steps() == sorted({best, 4})


def test_best_needs_a_loss_where_something_is_saved():
  run = small_run.run_config().as_dict()
  run["checkpoint"] |= {"keep_best": 1}
  with pytest.raises(ConfigError, match=r"log\.dev_every"):
    build(run)
