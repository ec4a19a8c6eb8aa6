"""This package's own captioner against a plain loop, and the command."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import toy_agent
from PIL import Image

from photochat_jax import (
  beam,
  caption,
  captioners,
  decoding,
  generate,
  inputs,
  record,
)
from photochat_jax.captioners import CaptionError, Written
from photochat_jax.checkpoints import manager
from photochat_jax.data import (
  dialogue,
  images,
  index,
  photochat,
  records,
  synthetic,
)
from photochat_jax.data.schema import Photo
from photochat_jax.decoding_options import Options
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.state import TrainState

METHODS = ("greedy", "beam", "nucleus")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Six photos of noise."""
  folder = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  found = []
  for i in range(6):
    path = folder / f"{i}.png"
    pixels = rng.integers(0, 256, (9, 7 + i, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    found.append(Photo(f"train/{i}", "", None, path))
  return found


@pytest.mark.parametrize(
  "field, value",
  [
    ("method", "best"),
    ("num_beams", 0),
    ("length_penalty", -1.0),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("temperature", 0.0),
    ("seed", -1),
    ("max_tokens", 0),
  ],
)
def test_options_that_make_no_sense(field, value):
  with pytest.raises(ValueError, match=f"{field} is .*it must be"):
    Options(**{field: value})


def test_options_are_told_apart():
  told = {
    str(Options(**changes))
    for changes in (
      {},
      {"num_beams": 3},
      {"length_penalty": 0.5},
      {"method": "greedy"},
      {"method": "nucleus"},
      {"method": "nucleus", "top_p": 0.5},
      {"method": "nucleus", "temperature": 2.0},
      {"method": "nucleus", "seed": 1},
    )
  }
  assert len(told) == 8
  # Greedy is greedy, whatever the numbers of the others.
  assert str(Options("greedy", top_p=0.5)) == str(Options(num_beams=1))


@pytest.fixture(scope="module")
def run():
  return small_run.run_config()


@pytest.fixture(scope="module")
def model(run):
  return PhotoChat(run.model)


@pytest.fixture(scope="module")
def params(model):
  return toy_agent.random_params(model, 3)


@pytest.fixture(scope="module")
def open_captioner(run, model, params):
  @functools.cache
  def make(options):
    settings = dataclasses.replace(run.eval, batch_size=3)
    generator = generate.Generator(
      model,
      params,
      *inputs.load_tokenizers(run),
      inputs.data_spec(run, 3, augment=False),
      settings,
    )
    return captioners.OwnCaptioner(generator, options, "toy")

  return make


def seen(photo, size=8):
  return images.load_vision(photo.path, size)


def options(method, **changes):
  changes = {"num_beams": 3, "top_p": 0.8, "max_tokens": 6} | changes
  return Options(method, **changes)


def test_the_question_is_the_one_that_was_trained(
  run, open_captioner, tmp_path
):
  captioner = open_captioner(options("greedy"))
  llm_tokenizer, _ = inputs.load_tokenizers(run)
  spec = inputs.data_spec(run, 3)
  asked = index.as_questions(small_run.train_dialogues(tmp_path))
  assert len(asked) > 5
  for question in asked:
    example = dialogue.encode_example(question.turns, 0, llm_tokenizer, spec)
    prompt = captioner._prompt
    length = len(prompt.tokens)
    np.testing.assert_array_equal(example.tokens[:length], prompt.tokens)
    np.testing.assert_array_equal(
      example.visual_index[:length], prompt.visual_index
    )
    # What it says next is what it learnt to say, its end included.
    assert not example.loss_kind[:length].any()
    said = llm_tokenizer.encode(question.turns[1].text)
    answer = example.tokens[length : length + len(said) + 1].tolist()
    assert answer == [*said, llm_tokenizer.eos_id]
    assert (example.loss_kind[length:][: len(answer)] == dialogue.TEXT).all()


@functools.partial(jax.jit, static_argnums=0)
def reread(model, params, tokens, places, photo):
  """Logits [L, V] of a row that shows one photo, without a cache."""
  positions = jnp.arange(len(tokens))[None]
  hidden, _ = model.converse(
    params,
    tokens[None],
    positions,
    jnp.ones_like(positions),
    model.perceive(params, photo[None, None]),
    places[None],
  )
  return model.logits(params, hidden)[0]


def test_greedy_captions_equal_a_plain_loop(
  run, model, params, open_captioner, photos
):
  captioner = open_captioner(options("greedy"))
  tokenizer, _ = inputs.load_tokenizers(run)
  prompt = captioner._prompt
  length = len(prompt.tokens)
  silent = [
    i
    for i in range(tokenizer.vocab_size)
    if i != tokenizer.eos_id and not tokenizer.token_bytes(i)
  ]
  assert {tokenizer.img_id, tokenizer.end_img_id, tokenizer.pad_id} < {*silent}
  wanted = []
  for photo in photos[:3]:
    tokens = np.zeros(length + 6, np.int32)
    places = np.full(length + 6, -1, np.int32)
    tokens[:length], places[:length] = prompt.tokens, prompt.visual_index
    for at in range(length, length + 6):
      scores = reread(model, params, tokens, places, seen(photo))
      scores = np.array(scores[at - 1])
      scores[silent] = -np.inf
      tokens[at] = np.argmax(scores)
    said = tokens[length:].tolist()
    cut = tokenizer.eos_id not in said
    said = said if cut else said[: said.index(tokenizer.eos_id)]
    wanted.append(Written(tokenizer.decode(said), cut))
  ids = [photo.id for photo in photos[:3]]
  found = captioner.write(ids, [seen(photo) for photo in photos[:3]])
  assert found == wanted
  assert len({w.text for w in wanted}) > 1  # It looks at the photo.


@pytest.mark.parametrize("method", METHODS)
def test_a_caption_does_not_depend_on_its_batch(
  method, open_captioner, photos
):
  captioner = open_captioner(options(method))
  ids, pixels = [p.id for p in photos], [seen(p) for p in photos]

  def write(*chosen):
    which = [ids[i] for i in chosen]
    return captioner.write(which, [pixels[i] for i in chosen])

  together = write(0, 1, 2)
  programs = [decoding.prefill, beam.decode, decoding.decode]
  compiled = [program._cache_size() for program in programs]
  assert [write(i)[0] for i in range(3)] == together
  assert write(2, 0, 1) == [together[i] for i in (2, 0, 1)]
  assert write(0, 5)[0] == together[0]
  assert all(written.text for written in together)
  assert [program._cache_size() for program in programs] == compiled
  # Only samples follow from the id.
  moved = captioner.write(["elsewhere", ids[1]], pixels[:2])
  assert moved[1] == together[1]
  assert (moved[0] == together[0]) == (method != "nucleus")


def test_beams_find_likelier_captions_than_greed(open_captioner, photos):
  greedy = open_captioner(options("greedy"))
  beams = open_captioner(options("beam"))
  one = open_captioner(options("beam", num_beams=1))
  ids, pixels = [p.id for p in photos[:3]], [seen(p) for p in photos[:3]]
  assert one.write(ids, pixels) == greedy.write(ids, pixels)
  assert one.model == greedy.model
  assert beams.write(ids, pixels) != greedy.write(ids, pixels)


def test_seeds_and_temperature(open_captioner, photos):
  ids, pixels = [p.id for p in photos[:3]], [seen(p) for p in photos[:3]]

  def write(**changes):
    captioner = open_captioner(options("nucleus", **changes))
    return captioner.write(ids, pixels)

  assert write(seed=1) != write(seed=2)
  greedy = open_captioner(options("greedy")).write(ids, pixels)
  # The likeliest alone, be it of the nucleus or of the cold.
  assert write(top_p=1e-6) == write(temperature=1e-6) == greedy


def test_control_ids_are_never_in_a_caption(
  run, model, open_captioner, monkeypatch
):
  tokenizer, _ = inputs.load_tokenizers(run)
  control = [
    tokenizer.img_id,
    tokenizer.end_img_id,
    tokenizer.bos_id,
    tokenizer.pad_id,
  ]
  hi = tokenizer.encode("hi there")
  wishes = [[*control, token] for token in (*hi, tokenizer.eos_id)]
  captioner = open_captioner(options("greedy", max_tokens=len(hi) + 1))
  jax.clear_caches()
  length = len(captioner._prompt.tokens)
  toy_agent.script(monkeypatch, length, [wishes] * 3, 768)
  written = captioner.write(["a"], [np.zeros((8, 8, 3), np.uint8)])
  jax.clear_caches()
  assert written == [Written("hi there", False)]


def test_the_digest_is_of_the_weights_that_see_and_speak(params):
  digest = captioners.weights_digest(params)
  drawn = {**params, "unet": jax.tree.map(lambda x: x + 1, params["unet"])}
  assert captioners.weights_digest(drawn) == digest
  for part in captioners.SEES:
    leaves, tree = jax.tree.flatten(params[part])
    leaves[-1] = np.nextafter(leaves[-1], np.float32(9))
    changed = {**params, part: jax.tree.unflatten(tree, leaves)}
    assert captioners.weights_digest(changed) != digest
  halves = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  assert captioners.weights_digest(halves) != digest


@pytest.fixture(scope="module")
def workdir(run, params, tmp_path_factory):
  """A run with a checkpoint."""
  folder = tmp_path_factory.mktemp("runs") / "toy"
  record.write(run, folder)
  state = TrainState(
    step=jnp.int32(7),
    params=params,
    opt_state=(),
    ema={part: params[part] for part in run.ema.parts},
    latent_scale=jnp.float32(1),
  )
  with manager.Checkpoints(folder, model=run.as_dict()["model"]) as saved:
    saved.save(7, state, {})
    saved.wait()
  return folder


def rows_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


TOOL = pathlib.Path(__file__).parents[1] / "tools" / "caption_photos.py"


def tool(*arguments):
  return subprocess.run(
    [sys.executable, str(TOOL), *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
    cwd=TOOL.parents[1],
    env=os.environ | {"PYTHONPATH": str(TOOL.parents[1])},
  )


def test_the_command_captions_a_data_set(workdir, params, run, tmp_path):
  data = synthetic.generate(0, 6, 2, 2, tmp_path / "data", 8, 0.25)
  found, missing = caption.find_photos("photochat", data)
  assert missing == 0 and len({p.id for p in found}) == len(found) > 8
  found[0].path.unlink()
  found[1].path.write_bytes(b"<html>")
  done = tool(
    f"--path={data}",
    f"--workdir={workdir}",
    "--method=beam",
    "--num_beams=3",
    "--batch_size=3",
    "--max_tokens=6",
  )
  assert done.returncode == 0, done.stderr
  assert f"{len(found) - 1} photos have a file and 1 have none" in done.stdout
  assert f"{len(found) - 2} captions written" in done.stdout
  assert "1 damaged photos" in done.stdout and found[1].id in done.stdout
  assert "learnt last is to chat" in done.stdout
  rows = rows_of(data / caption.FILE)
  assert [row["photo_id"] for row in rows] == [p.id for p in found[2:]]
  # The same as asked for in this process, and what readers then give.
  generator = generate.Generator(
    PhotoChat(run.model),
    params,
    *inputs.load_tokenizers(run),
    inputs.data_spec(run, 3, augment=False),
    dataclasses.replace(run.eval, batch_size=3),
  )
  captioner = captioners.OwnCaptioner(generator, options("beam"), "toy")
  again = tmp_path / "again.jsonl"
  caption.caption_photos(found[2:], captioner, again)
  assert rows_of(again) == rows
  assert {row["model"] for row in rows} == {captioner.model}
  assert captioner.model.startswith("toy@") and "beam 3" in captioner.model
  read, _ = photochat.read_split(data, "train", "written")
  wanted = {row["photo_id"]: row["caption"] for row in rows}
  for photo in records.list_photos(read):
    assert photo.caption == wanted.get(photo.id)


@pytest.mark.parametrize(
  "step, last",
  [
    (0, "nothing to do with words"),
    (2, "nothing to do with words"),
    (3, ""),
    (4, ""),
    (5, "to chat"),
    (7, ""),
    (99, ""),
  ],
)
def test_a_checkpoint_that_learnt_something_else_last_is_told(run, step, last):
  kinds = ("captions", "descriptions", "dialogues", "descriptions")
  stages = tuple(
    dataclasses.replace(run.stages[0], name=str(i), data=kind, steps=2)
    for i, kind in enumerate(kinds)
  )
  told = captioners._advice(dataclasses.replace(run, stages=stages), step)
  assert bool(told) == bool(last) and last in told


def test_the_command_says_what_is_wrong_in_one_sentence(workdir, tmp_path):
  with pytest.raises(CaptionError, match="There is no split of photochat"):
    caption.find_photos("photochat", tmp_path)
  done = tool(f"--path={tmp_path}", f"--workdir={workdir}")
  assert done.returncode == 1
  assert done.stderr.strip().startswith("caption_photos: There is no split")
  with pytest.raises(ValueError, match="config.json is not there"):
    captioners.open_own(tmp_path, Options(), 2)
