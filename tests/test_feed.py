"""What training reads and tells: mixtures, coverage, quarantine, moments."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import random_params
import small_run
import toy_agent
from etils import epath

from photochat_jax import (
  captions,
  config,
  encoders,
  feed,
  inputs,
  objective,
  precompute,
  record,
  train,
)
from photochat_jax.checkpoints.manager import Checkpoints
from photochat_jax.data import images, moments_files, packing, synthetic
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.state import TrainState

SAMPLE = pathlib.Path(__file__).parent / "data" / "photochat_sample"
# Compiled in half the time, to a slower program, which runs a few times only.
QUICKLY = {"xla_backend_optimization_level": 0}


def open_feed(run, folder):
  return feed.Feed(run, folder, *inputs.load_tokenizers(run))


def report(folder):
  return json.loads((folder / "data.json").read_text())


@pytest.fixture
def mixed(tmp_path):
  """Real dialogues without photos, and generated ones at a third of them."""
  other = synthetic.generate(1, 9, 2, 2, tmp_path / "other", 8)
  return small_run.run_config(
    data={
      "source": "photochat",
      "path": str(SAMPLE),
      "caption_source": "labels",
      "length": 384,
      "mix": (("photochat", str(other), 0.5),),
    },
  )


def test_sets_are_mixed_and_told_apart(mixed, tmp_path):
  data = open_feed(mixed, tmp_path)
  assert [(d.name, d.weight) for d in data.sets] == (
    [("photochat", 1.0), ("photochat_1", 0.5)]
  )
  assert len(data.photos) > 0  # of the second set only
  batches = data.batches("dialogues", 2, "joint")
  lines = [*data.coverage(), *data.describe("joint", batches)]
  text = "\n".join(lines)
  assert "photochat: train: 40 dialogues, 0 of 40 photos found" in text
  assert "photochat: dev: 16 dialogues" in text
  assert "photochat_1: train: 9 dialogues" in text
  assert "0.67 share/photochat, " in text and "0.33 share/photochat 1" in text
  found = report(tmp_path)
  assert [d["name"] for d in found["sets"]] == ["photochat", "photochat_1"]
  assert {s: c["dialogues"] for s, c in found["sets"][0]["splits"].items()} == (
    {"train": 40, "dev": 16, "test": 16}
  )
  assert found["sets"][0]["splits"]["train"]["photos_found"] == 0
  stage = found["stages"]["joint"]
  assert stage["dialogues"] == 49
  assert stage["left_out/missing_photo"] > 0
  # A partner's side of a photo without a file is dropped, a sharer's is not.
  assert stage["photos_out_missing"] == 40
  # What a run before this one wrote of other stages stays.
  again = open_feed(mixed, tmp_path)
  again.describe("captions", again.batches("captions", 2, "captions"))
  assert set(report(tmp_path)["stages"]) == {"joint", "captions"}
  assert not (tmp_path / "quarantine.jsonl").exists()


def test_a_share_of_the_main_set_is_its_beginning(mixed, tmp_path):
  whole = open_feed(mixed, tmp_path / "whole").sets
  part = open_feed(mixed.with_data(train_share=0.26), tmp_path / "part").sets
  assert part[0].dialogues == whole[0].dialogues[:10]  # Of 40.
  assert part[1].dialogues == whole[1].dialogues
  least = open_feed(mixed.with_data(train_share=1e-6), tmp_path / "least").sets
  assert len(least[0].dialogues) == 1


def test_photos_shared_across_splits_are_counted(tmp_path):
  folder = tmp_path / "set"
  shutil.copytree(SAMPLE, folder)
  records = json.loads((folder / "train" / "train_00.json").read_text())
  (folder / "dev" / "dev_01.json").write_text(json.dumps(records[:3]))
  run = small_run.run_config(
    data={"source": "photochat", "path": str(folder), "length": 384}
  )
  data = open_feed(run, tmp_path)
  assert any("3 photos are shared by train+dev" in s for s in data.coverage())


def test_broken_records_are_quarantined_up_to_a_limit(tmp_path):
  folder = tmp_path / "set"
  shutil.copytree(SAMPLE, folder)
  path = folder / "train" / "train_00.json"
  records = json.loads(path.read_text())
  records[3]["dialogue"][0]["user_id"] = 7
  path.write_text(json.dumps(records))
  data = {"source": "photochat", "path": str(folder), "length": 384}
  run = small_run.run_config(data=data)
  assert len(open_feed(run, tmp_path).sets[0].dialogues) == 39
  (row,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
  row = json.loads(row)
  assert row["position"] == "record 3" and "user_id" in row["reason"]
  strict = small_run.run_config(data=data | {"max_broken": 0.02})
  with pytest.raises(ValueError, match="1 of 40 records .* max_broken=0.02"):
    open_feed(strict, tmp_path)


def test_a_broken_split_that_is_not_trained_on_stops_nothing(tmp_path):
  folder = tmp_path / "set"
  shutil.copytree(SAMPLE, folder)
  (folder / "dev" / "dev_00.json").write_text("[{}]")
  run = small_run.run_config(
    data={"source": "photochat", "path": str(folder), "length": 384}
  )
  data = open_feed(run, tmp_path)
  data.describe("joint", data.batches("dialogues", 2, "joint"))
  splits = report(tmp_path)["sets"][0]["splits"]
  assert "No dialogue of the dev split" in splits["dev"]["error"]
  assert splits["test"]["dialogues"] == 16


def test_photos_that_cannot_be_decoded_are_quarantined(tmp_path):
  folder = synthetic.generate(0, 6, 1, 1, tmp_path / "set", 8)
  run = small_run.run_config(
    data={"source": "photochat", "path": str(folder)}
  )
  first = sorted((folder / "photos" / "synthetic").glob("train_*"))[0]
  first.write_bytes(b"<html>")
  data = open_feed(run, tmp_path)
  batches = data.batches("photos", len(data.photos), "autoencoder")
  assert batches.batch(0)["photos_out_mask"].sum() == len(data.photos) - 1
  assert "1 photos could not be used" in data.take_broken(batches)
  (row,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
  assert "is not a photo" in json.loads(row)["value"]


def test_padding_is_remarked_with_what_to_do(tmp_path):
  run = small_run.run_config(
    data={"num_train": 60, "length": 300, "photos_in": 1, "photos_out": 1}
  )
  data = open_feed(run, tmp_path)
  _, remark = data.describe("joint", data.batches("dialogues", 2, "joint"))
  assert "of its tokens are padding" in remark
  assert "raise data.photos_in" in remark


def test_looking_and_measuring_change_no_photo(tmp_path):
  run = small_run.run_config(data={"flip": True, "crop": True})
  data = open_feed(run, tmp_path)
  one = data.plain_batches("photos", 4, "samples").batch(0)
  still = dataclasses.replace(
    run, data=dataclasses.replace(run.data, flip=False, crop=False)
  )
  two = open_feed(still, tmp_path).batches("photos", 4, "samples").batch(0)
  np.testing.assert_array_equal(one["photos_out"], two["photos_out"])
  changed = data.batches("photos", 4, "samples").batch(0)
  assert (changed["photos_out"] != one["photos_out"]).any()


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
  """A run, random weights, and the moments of its photos that they give."""
  folder = tmp_path_factory.mktemp("moments")
  run = small_run.run_config(data={"flip": True, "path": str(folder / "set")})
  # Its first stage trains the autoencoder.
  run = dataclasses.replace(run, stages=run.stages[1:])
  data, model = open_feed(run, folder), PhotoChat(run.model)
  params = random_params.draw(jax.eval_shape(model.init, jax.random.key(0)))
  weights, transform = encoders.identity(run, params)
  side = run.model.unet.sample_size
  shape = (side, side, 2 * run.model.vae.latent_channels)
  about = moments_files.About("moments", weights, transform, shape)
  encode = jax.jit(model.encode_photo)
  with moments_files.Writer(folder / "moments", about) as writer:
    for name, path in data.photos.items():
      facts = moments_files.FileFacts(path.stat().length, "")
      photo = images.load_photo(path, model.photo_shape[0])
      both = np.stack([photo, photo[:, ::-1]])
      both = np.concatenate(encode(params, both), axis=-1)
      writer.add(name, facts, *both.astype(np.float16))
  return run, folder, params


def feeds(encoded):
  """What trains on photos, and what trains on their moments."""
  run, folder, params = encoded
  cached = open_feed(
    run.with_data(moments=str(folder / "moments")), folder / "cached"
  )
  cached.open_moments(params)
  return open_feed(run, folder), cached


def test_a_step_on_moments_has_the_loss_of_a_step_on_pixels(encoded):
  run, _, params = encoded
  model, (pixels, cached) = PhotoChat(run.model), feeds(encoded)
  empty = pixels.batches("photos", 1, "")._clip.encode_padded("")

  def loss(unet, batch):
    keys = captions.photo_keys(run, 0, 5, batch["example_id"].reshape(-1))
    return objective.loss_terms(
      model, run, run.stages[0], params | {"unet": unet},
      jnp.float32(0.8), batch, keys, jnp.int32(5), empty, None,
    )[0]  # fmt: skip

  step = jax.jit(jax.value_and_grad(loss), compiler_options=QUICKLY)
  for number in (0, 3):
    one = pixels.batches("captions", 4, "draw").batch(number)
    two = cached.batches("captions", 4, "draw").batch(number)
    (wanted, slopes), (got, found) = (
      step(params["unet"], batch) for batch in (one, two)
    )
    # float16 keeps 11 bits; equal bits would mean that moments do not count.
    np.testing.assert_allclose(got, wanted, rtol=2**-11)
    assert got != wanted
    off = optax.tree.norm(jax.tree.map(jnp.subtract, found, slopes))
    assert off < 2**-8 * optax.tree.norm(slopes)
    # Nothing but the moments tells the batches apart.
    other = two | {"moments": two["moments"] + 0.5}
    assert abs(step(params["unet"], other)[0] - wanted) > 2**-9 * wanted


@pytest.mark.parametrize("kind", ["captions", "dialogues"])
def test_batches_of_moments_are_those_of_pixels_flips_included(encoded, kind):
  run, _, params = encoded
  model, (pixels, cached) = PhotoChat(run.model), feeds(encoded)
  encode = jax.jit(model.encode_photo)
  flips = set()
  for number in range(4):
    one = pixels.batches(kind, 4, "draw").batch(number)
    two = cached.batches(kind, 4, "draw").batch(number)
    assert "photos_out" not in two
    for name in set(one) - {"photos_out"}:
      np.testing.assert_array_equal(one[name], two[name], name)
    photos, mask = one["photos_out"][:, 0], one["photos_out_mask"][:, 0]
    wanted = np.concatenate(encode(params, photos), axis=-1)
    mirrored = np.concatenate(encode(params, photos[:, :, ::-1]), axis=-1)
    got = two["moments"][:, 0]
    np.testing.assert_allclose(got[mask], wanted[mask], rtol=2**-10, atol=1e-3)
    assert (np.abs(got - mirrored)[mask].max(axis=(1, 2, 3)) > 0.01).all()
    assert not got[~mask].any()
    bits = [
      packing.random_bits(1, 0, packing.stage_number("draw"), number, int(i))
      for i in one["example_id"][:, 0][mask]
    ]
    flips |= {int(b[0] & np.uint64(1)) for b in bits}
  assert flips == {0, 1}


def test_stale_or_missing_moments_are_refused(encoded, tmp_path):
  run, folder, params = encoded
  run = run.with_data(moments=str(folder / "moments"))
  data = open_feed(run, tmp_path)
  other = toy_agent.random_params(PhotoChat(run.model))
  with pytest.raises(ValueError, match="made by other weights"):
    data.open_moments(other)
  photo = next(iter(data.photos))
  path = epath.Path(tmp_path / "another.jpg")
  path.write_bytes(b"another file")
  data.photos[photo] = path
  with pytest.raises(config.ConfigError, match="tools/precompute.py once more"):
    data.open_moments(params)
  few = 1 / len(data.photos)
  bearing = open_feed(run.with_data(max_broken=few), tmp_path)
  bearing.photos[photo] = path
  bearing.open_moments(params)
  batches = bearing.batches("photos", len(data.photos), "joint")
  assert batches.describe()["moments_missing"] == 1
  assert batches.batch(0)["photos_out_mask"].sum() == len(data.photos) - 1
  assert any("1 of them of another file" in s for s in bearing.coverage())


@pytest.mark.slow  # It compiles a training step twice, and an encoder.
def test_a_run_trains_on_what_the_tool_encoded(encoded, tmp_path, monkeypatch):
  run, _, params = encoded
  run = dataclasses.replace(run, stages=run.stages[:1])
  state = TrainState(
    jnp.int32(0), params, (), {"unet": params["unet"]}, jnp.float32(0.8)
  )
  model = run.as_dict()["model"]
  record.write(run, str(tmp_path / "start"))
  with Checkpoints(tmp_path / "start", model=model) as saved:
    saved.save(0, state, {})
  photos, _ = precompute.find_photos("photochat", run.data.path)
  out = tmp_path / "moments"
  precompute.precompute(str(tmp_path / "start"), photos, out)
  run = dataclasses.replace(
    run, pretrained=config.PretrainedConfig(run=str(tmp_path / "start"))
  )
  train.train(run, tmp_path / "pixels")

  def no_pixels(*_):
    raise AssertionError("A photo was encoded.")

  monkeypatch.setattr(PhotoChat, "encode_photo", no_pixels)
  train.train(run.with_data(moments=str(out)), tmp_path / "cached")
  wanted, got = (
    [
      json.loads(row)["train/photo"]
      for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    ]
    for name in ("pixels", "cached")
  )
  assert len(got) == 2
  np.testing.assert_allclose(got, wanted, rtol=2**-9)
  counts = report(tmp_path / "cached")["moments"]
  assert counts["missing"] == counts["changed"] == 0
