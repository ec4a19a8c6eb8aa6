"""What training reads and tells: mixtures, coverage, quarantine, moments."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import small_run
import toy_agent

from photochat_jax import (
  captions,
  config,
  feed,
  inputs,
  precompute,
  record,
  train,
  train_step,
)
from photochat_jax.data import moments, synthetic
from photochat_jax.models.photochat import PhotoChat

SAMPLE = pathlib.Path(__file__).parent / "data" / "photochat_sample"
GENERATOR = 1


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


def generator_run(**data):
  """A run of the generator's stage alone."""
  run = small_run.run_config(data={"flip": True} | data)
  return dataclasses.replace(run, stages=run.stages[GENERATOR:-1])


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
  """A run of random weights, and the moments of its photos."""
  folder = tmp_path_factory.mktemp("moments")
  run = generator_run(path=str(folder / "set"))
  record.write(run, str(folder / "run"))
  state = train.train(run, folder / "run")
  photos, _ = precompute.find_photos("photochat", folder / "set")
  precompute.precompute(str(folder / "run"), photos, folder / "moments")
  return run, folder, state


def losses(folder):
  rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return [row["train/photo"] for row in rows]


def test_training_on_moments_is_training_on_photos(
  encoded, tmp_path, monkeypatch
):
  run, folder, state = encoded
  cached = run.with_data(moments=str(folder / "moments"))

  def no_pixels(*args):
    raise AssertionError("A photo was encoded.")

  monkeypatch.setattr(PhotoChat, "encode_photo", no_pixels)
  again = train.train(cached, tmp_path)
  # float16 keeps 11 bits.
  np.testing.assert_allclose(
    losses(tmp_path), losses(folder / "run"), rtol=2e-3
  )
  assert losses(tmp_path) != losses(folder / "run")
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=5e-3),
    again.params["unet"],
    state.params["unet"],
  )
  assert report(tmp_path)["moments"] == {
    "photos": len(moments.open_store(folder / "moments")) - photos_elsewhere(
      run, tmp_path
    ),
    "missing": 0,
    "changed": 0,
  }


def photos_elsewhere(run, folder):
  """How many photos the dev and test splits have."""
  return sum(
    inputs.read_split(run, folder, split)[1].photos_found
    for split in ("dev", "test")
  )


def test_moments_give_the_latents_of_pixels_flips_included(encoded):
  run, folder, state = encoded
  data = open_feed(run, folder / "run")
  cached = open_feed(
    run.with_data(moments=str(folder / "moments")), folder / "again"
  )
  cached.open_moments(state.params)
  model = PhotoChat(run.model)
  latents = jax.jit(lambda params, batch: train_step.sample_latents(
    *train_step.photo_moments(
      model, params, train_step.flatten_photos(batch)
    ),
    captions.photo_keys(run, 0, 0, batch["example_id"].reshape(-1)),
  ))  # fmt: skip
  for kind in ("captions", "dialogues"):
    one = data.batches(kind, 4, "joint").batch(1)
    two = cached.batches(kind, 4, "joint").batch(1)
    assert two["moments"].dtype == np.float32 and "photos_out" not in two
    for name in set(one) - {"photos_out"}:
      np.testing.assert_array_equal(one[name], two[name], name)
    mask = one["photos_out_mask"].reshape(-1)
    assert mask.any()
    np.testing.assert_allclose(
      latents(state.params, one)[mask],
      latents(state.params, two)[mask],
      rtol=4e-3,
      atol=4e-3,
    )


def test_stale_or_missing_moments_are_refused(encoded, tmp_path):
  run, folder, state = encoded
  run = run.with_data(moments=str(folder / "moments"))
  data = open_feed(run, tmp_path)
  other = toy_agent.random_params(PhotoChat(run.model))
  with pytest.raises(ValueError, match="made by other weights"):
    data.open_moments(other)
  photo = next(iter(data.photos))
  path = tmp_path / "another.jpg"
  path.write_bytes(b"another file")
  data.photos[photo] = path
  few = 1 / len(data.photos)
  with pytest.raises(config.ConfigError, match="tools/precompute.py once more"):
    data.open_moments(state.params)
  bearing = open_feed(run.with_data(max_broken=few), tmp_path)
  bearing.photos[photo] = path
  bearing.open_moments(state.params)
  batches = bearing.batches("photos", len(data.photos), "joint")
  counts = batches.describe()
  assert counts["moments_missing"] == 1
  assert batches.batch(0)["photos_out_mask"].sum() == len(data.photos) - 1
  assert any("1 of them of another file" in s for s in bearing.coverage())
