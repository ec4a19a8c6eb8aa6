"""perceiver='caption': a run after another one, that reads what it is shown."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_run
from PIL import Image

from photochat_jax import (
  captioners,
  chat,
  evaluate,
  generate,
  inputs,
  record,
  train,
  transcript,
)
from photochat_jax import config as config_lib
from photochat_jax.captioners import Written
from photochat_jax.checkpoints import pretrained
from photochat_jax.models.photochat import EYES


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
  """A run with eyes, its autoencoder trained for two updates."""
  run = small_run.run_config(data={"num_test": 10})
  run = dataclasses.replace(
    run,
    stages=run.stages[:1],
    eval=dataclasses.replace(run.eval, max_dialogues=0),
  )
  workdir = tmp_path_factory.mktemp("seeing")
  record.write(run, str(workdir))
  train.train(run, str(workdir))
  return run, workdir


def reading_run(seeing, **changes):
  run, workdir = seeing
  model = dataclasses.replace(run.model, perceiver="caption")
  settings = dataclasses.replace(
    small_run.run_config(),
    model=model,
    stages=small_run.stages()[2:],
    eval=run.eval,
    pretrained=config_lib.PretrainedConfig(
      run=str(workdir), captioner=str(workdir)
    ),
    data=dataclasses.replace(run.data, path=str(workdir / "data")),
    **changes,
  )
  return config_lib.build(settings.as_dict())


@pytest.fixture(scope="module")
def captions(seeing):
  """What somebody wrote about every photo."""
  run, workdir = seeing
  found = {}
  for split in ("train", "dev", "test"):
    for dialogue in inputs.read_split(run, workdir, split)[0]:
      for turn in dialogue.turns:
        if turn.photo:
          found[turn.photo.id] = f"shape number {len(found)}"
  rows = (
    {"photo_id": name, "caption": text, "model": "m", "sha256": "0" * 64}
    for name, text in found.items()
  )
  (workdir / "data" / "photo_captions.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in rows)
  )
  return found


@pytest.fixture(scope="module")
def read(seeing, captions, tmp_path_factory):
  """A run that reads, two joint updates after the one with eyes."""
  workdir = tmp_path_factory.mktemp("read")
  run = reading_run(seeing)
  record.write(run, str(workdir))
  train.train(run, str(workdir))
  return run, workdir


def test_it_has_no_eyes_and_begins_where_the_other_ended(seeing, read):
  generator, step = generate.open_generator(*read)
  assert step == 2
  assert not set(EYES) & set(generator.params)
  theirs, _ = generate.open_generator(*seeing)
  assert set(EYES) < set(theirs.params)
  # Of the parts that they share what nobody trained is the same.
  jax.tree.map(
    np.testing.assert_array_equal,
    generator.params["vae"],
    theirs.params["vae"],
  )


def test_its_prompts_hold_the_captions(read, captions):
  dialogues, _ = inputs.read_split(*read, "test")
  generator, _ = generate.open_generator(*read)
  shown = 0
  for dialogue in dialogues:
    for upto, turn in enumerate(dialogue.turns, start=1):
      if turn.photo and turn.speaker == chat.USER:
        assert turn.photo.seen == captions[turn.photo.id]
        context = generate.dialogue.encode_context(
          dialogue.turns, chat.MODEL, generator.tokenizer, generator.spec, upto
        )
        words = generator.tokenizer.decode(context.tokens.tolist())
        assert f"(photo: {turn.photo.seen})" in words
        assert context.photos == ()
        shown += 1
  assert shown


def test_it_is_evaluated_as_any_other(read):
  metrics = evaluate.evaluate(*read)
  assert metrics["perplexity"] > 1
  assert metrics["counts"]["model_turns"] > 4
  kept = transcript.read(read[1] / "eval")
  assert len(kept.replies) >= metrics["counts"]["model_turns"]


def test_captions_are_part_of_what_was_measured(seeing, read, captions):
  before = evaluate.evaluate(*read, folder="before")
  file = seeing[1] / "data" / "photo_captions.jsonl"
  text = file.read_text()
  file.write_text(text.replace("shape number", "form"))
  after = evaluate.evaluate(*read, folder="after")
  file.write_text(text)
  assert before["data"] == after["data"]
  assert before["captions_read"] != after["captions_read"]
  assert before["perplexity"] != after["perplexity"]


def test_without_captions_it_says_what_to_do(seeing, tmp_path):
  run = reading_run(seeing).with_data(path=str(tmp_path / "data"))
  with pytest.raises(ValueError, match="write it with tools/caption_photos.py"):
    inputs.read_split(run, tmp_path, "test")


def test_in_chat_a_captioner_reads_to_it(read, tmp_path, monkeypatch):
  class Captioner:
    def prepare(self, image):
      return image.getpixel((0, 0))

    def write(self, ids, photos):
      return [Written(f"pixel {photos[0][0]}", False)]

  opened = []
  monkeypatch.setattr(
    captioners, "open_own",
    lambda *args, **kwargs: opened.append(args[0]) or (Captioner(), ""),
  )  # fmt: skip
  asked = []
  respond = generate.Generator.respond

  def listen(self, contexts, **kwargs):
    asked.append(self.tokenizer.decode(contexts[0].tokens.tolist()))
    return respond(self, contexts, **kwargs)

  monkeypatch.setattr(generate.Generator, "respond", listen)
  path = tmp_path / "red.png"
  Image.new("RGB", (9, 9), (201, 0, 0)).save(path)
  run, workdir = read
  lines = [f"/photo {path}", "/quit"]
  chat.chat(run, workdir, lambda _: lines.pop(0), lambda _: None)
  assert opened == [run.pretrained.captioner]
  assert "(photo: pixel 201)" in asked[0]
  nobody = dataclasses.replace(run, pretrained=config_lib.PretrainedConfig())
  with pytest.raises(config_lib.ConfigError, match="name a run that captions"):
    chat.chat(nobody, workdir)


def test_a_blip2_is_left_alone(seeing, tmp_path):
  folders = pretrained.Folders("", str(tmp_path), "")
  assert pretrained.read_params(reading_run(seeing).model, folders) == {}


def test_other_parts_must_still_fit(seeing, captions, tmp_path):
  run = reading_run(seeing)
  wider = dataclasses.replace(run.model.language, hidden_size=48)
  other = dataclasses.replace(
    run, model=dataclasses.replace(run.model, language=wider)
  )
  with pytest.raises(config_lib.ConfigError, match="do not fit this config"):
    train.train(other, str(tmp_path))
