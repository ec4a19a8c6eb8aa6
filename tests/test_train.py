"""The loop: stages in order, exact resume, real dialogues without photos."""

import dataclasses
import json
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
import small_run
from PIL import Image

from photochat_jax import evaluate, inputs, train
from photochat_jax.checkpoints.manager import Checkpoints
from photochat_jax.config import ConfigError
from photochat_jax.progress import Progress
from photochat_jax.runtime import interrupt
from photochat_jax.state import digest

SAMPLE = pathlib.Path(__file__).parent / "data" / "photochat_sample"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run never interrupted: (settings, folder, last state)."""
  folder = tmp_path_factory.mktemp("run")
  run = small_run.run_config(
    checkpoint=dataclasses.replace(
      small_run.run_config().checkpoint, every_steps=1, keep=10
    )
  )
  return run, folder, train.train(run, folder)


def rows(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def copy_until(step, folder, target):
  """A copy of a run that was saved at no later step."""
  shutil.copytree(folder, target)
  for saved in (target / "checkpoints").iterdir():
    if saved.name.isdigit() and int(saved.name) > step:
      shutil.rmtree(saved)
  return target


def pixels(path, size=None):
  with Image.open(path) as photo:
    photo = photo.convert("RGB")
  if size:
    photo = photo.resize((size, size), Image.BICUBIC)
  return np.asarray(photo)


def test_every_stage_leaves_its_rows_samples_and_checkpoint(finished):
  run, folder, state = finished
  assert int(state.step) == 6
  found = rows(folder)
  assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
  assert [row["stage"] for row in found] == (
    ["autoencoder"] * 2 + ["generator"] * 2 + ["joint"] * 2
  )
  assert "train/autoencoder" in found[0]
  assert {"train/text_loss", "train/caption_loss", "train/photo"} <= set(
    found[-1]
  )
  for step, stage in ((2, "autoencoder"), (4, "generator"), (6, "joint")):
    sheet = pixels(folder / "samples" / str(step) / f"{stage}.png")
    # Two photos, each above what was made.
    assert sheet.shape == (2 * 8, 2 * 8, 3)
  assert list((folder / "tensorboard").glob("events*"))


@pytest.mark.parametrize("step", [1, 2, 5])
def test_resuming_anywhere_gives_the_same_bits(finished, tmp_path, step):
  """In a stage, at its boundary, and in the last stage."""
  run, folder, state = finished
  copy_until(step, folder, tmp_path / "run")
  resumed = train.train(run, tmp_path / "run")
  assert digest(resumed) == digest(state)
  assert rows(tmp_path / "run") == rows(folder)


def test_frozen_parameters_are_narrow_from_the_stage_on_that_freezes_them(
  tmp_path,
):
  """At a boundary a part is narrowed; resumed across it, bits are the same."""
  run = small_run.run_config(
    frozen_dtype="bfloat16",
    checkpoint=dataclasses.replace(
      small_run.run_config().checkpoint, every_steps=1, keep=10
    ),
  )
  run = dataclasses.replace(run, stages=run.stages[1:])
  whole = tmp_path / "whole"
  state = train.train(run, whole)

  def dtypes(parameters):
    return {leaf.dtype.name for leaf in jax.tree.leaves(parameters)}

  # The generator's stage trained it; the joint one does not.
  assert dtypes(state.params["text_model"]) == {"bfloat16"}
  assert dtypes(state.params["unet"]) == {"float32"}
  assert dtypes(state.params["language_model"]) == {"float32"}
  for step in (1, 3):
    folder = copy_until(step, whole, tmp_path / str(step))
    assert digest(train.train(run, folder)) == digest(state)


def test_a_finished_run_trains_no_more(finished):
  run, folder, state = finished
  before = rows(folder)
  assert digest(train.train(run, folder)) == digest(state)
  assert rows(folder) == before


def test_the_latents_scale_is_measured_after_the_autoencoder(finished):
  run, folder, state = finished
  with Checkpoints(folder) as saved:
    assert saved.steps() == [1, 2, 3, 4, 5, 6]
  dialogues, _ = inputs.read_split(run, folder, "train")
  paths = {
    turn.photo.path
    for dialogue in dialogues
    for turn in dialogue.turns
    if turn.photo
  }
  model = train.PhotoChat(run.model)
  size = model.photo_shape[0]
  photos = np.stack([pixels(path, size) for path in paths])
  mean, _ = jax.jit(model.encode_photo)(state.params, photos)
  np.testing.assert_allclose(state.latent_scale, 1 / np.std(mean), rtol=2e-2)


def test_asked_to_stop_it_saves_and_says_how_to_go_on(
  tmp_path, capsys, monkeypatch
):
  run = small_run.run_config(steps=3)
  write = Progress.write

  def stop_soon(self, step, *args, **kwargs):
    write(self, step, *args, **kwargs)
    if step == 1:
      signal.raise_signal(signal.SIGINT)

  monkeypatch.setattr(Progress, "write", stop_soon)
  with pytest.raises(interrupt.Interrupted) as stopped:
    train.train(run, tmp_path)
  assert stopped.value.code == 130
  assert "goes on from there" in capsys.readouterr().err
  with Checkpoints(tmp_path) as saved:
    step = saved.latest()
  assert 0 < step < 9
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_real_dialogues_train_their_captions_without_photos(tmp_path, capsys):
  """72 PhotoChat dialogues: labels as captions, no photo file."""
  run = small_run.run_config(
    data={
      "source": "photochat",
      "path": str(SAMPLE),
      "caption_source": "labels",
      "length": 384,
    },
  )
  state = train.train(run, tmp_path)
  said = capsys.readouterr().err
  assert "40 dialogues, 0 of 40 photos found" in said
  assert "Stage autoencoder is skipped" in said
  assert "Stage generator is skipped" in said
  assert int(state.step) == 2
  last = rows(tmp_path)[-1]
  assert last["train/caption_loss"] > 0
  assert last["train/photo"] == 0.0
  metrics = evaluate.evaluate(run, tmp_path)
  assert metrics["perplexity"] > 1
  assert metrics["pixel_accuracy"] is None
  assert "pixel_accuracy" in metrics["reasons"]


def test_real_photographs_train_every_stage(tmp_path):
  """A folder in PhotoChat's layout; photographs of scikit-image."""
  skimage_data = pytest.importorskip("skimage.data")
  folder = tmp_path / "set"
  (folder / "photos" / "train").mkdir(parents=True)
  (folder / "train").mkdir()
  records = []
  for number, name in enumerate(("astronaut", "coffee")):
    photo = Image.fromarray(getattr(skimage_data, name)())
    photo.save(folder / "photos" / "train" / f"{name}.jpg")
    records.append(
      {
        "dialogue_id": number,
        "photo_id": f"train/{name}",
        "photo_url": "",
        "photo_description": f"Objects in the photo: {name.title()}",
        "dialogue": [
          {"message": "may I see it?", "share_photo": False, "user_id": 1},
          {"message": "", "share_photo": True, "user_id": 0},
          {"message": "lovely", "share_photo": False, "user_id": 1},
          {"message": "thanks", "share_photo": False, "user_id": 0},
        ],
      }
    )
  (folder / "train" / "train_00.json").write_text(json.dumps(records))
  run = small_run.run_config(
    steps=1,
    data={
      "source": "photochat",
      "path": str(folder),
      "caption_source": "labels",
    },
  )
  train.train(run, tmp_path / "run")
  found = rows(tmp_path / "run")
  assert [row["stage"] for row in found] == [
    "autoencoder", "generator", "joint"
  ]  # fmt: skip
  assert found[-1]["train/photo"] > 0
  # The sheet's first row is the photographs, cropped square and shrunk.
  sheet = pixels(tmp_path / "run" / "samples" / "1" / "autoencoder.png")
  square = Image.fromarray(skimage_data.astronaut()).resize((8, 8))
  error = [
    np.abs(sheet[:8, x : x + 8].astype(int) - np.asarray(square)).mean()
    for x in (0, 8)
  ]
  assert min(error) < 5


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
  run = small_run.run_config()
  language = dataclasses.replace(run.model.language, vocab_size=700)
  model = dataclasses.replace(run.model, language=language)
  with pytest.raises(ConfigError, match="vocab_size is 700 .* 768 ids"):
    train.train(dataclasses.replace(run, model=model), tmp_path)
