"""Captions for photos: the file, the two captioners, the command."""

import dataclasses
import functools
import hashlib
import json
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

from photochat_jax import caption, captioners, generate, inputs, record
from photochat_jax.captioners import CaptionError, Options, Written
from photochat_jax.checkpoints import manager
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.data import dialogue, images, index, photochat, synthetic
from photochat_jax.data.schema import Photo
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.state import TrainState

METHODS = ("greedy", "beam", "nucleus")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Seven photos of noise."""
  folder = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  found = []
  for i in range(7):
    path = folder / f"{i}.png"
    pixels = rng.integers(0, 256, (9, 7 + i, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    found.append(Photo(f"train/{i}", "", None, path))
  return found


class Fake:
  """Says the width of a photo, and notes what it was asked."""

  def __init__(self, model="fake@1 greedy", batch_size=2, stop_after=99):
    self.model, self.batch_size = model, batch_size
    self.asked, self._left = [], stop_after

  def prepare(self, image):
    return image.size[0]

  def write(self, ids, photos):
    if self._left == 0:
      raise KeyboardInterrupt
    self._left -= 1
    assert 0 < len(ids) <= self.batch_size
    self.asked += ids
    return [Written(f" {wide}\n wide\0", wide == 8) for wide in photos]


def rows_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_for_each_photo(photos, tmp_path):
  path = tmp_path / caption.FILE
  summary = caption.caption_photos(photos, Fake(), path)
  assert rows_of(path) == [
    {
      "photo_id": photo.id,
      "caption": f"{7 + i} wide",
      "model": "fake@1 greedy",
      "sha256": hashlib.sha256(photo.path.read_bytes()).hexdigest(),
    }
    for i, photo in enumerate(photos)
  ]
  assert (summary.photos, summary.written, summary.cut) == (7, 7, 1)
  assert (summary.had, summary.left, summary.odd_lines) == (0, 0, 0)
  assert "7 captions written in 0s" in str(summary)
  assert "damaged" not in str(summary)


def test_a_killed_run_goes_on(photos, tmp_path):
  path = tmp_path / caption.FILE
  with pytest.raises(KeyboardInterrupt):
    caption.caption_photos(photos, Fake(stop_after=2), path)
  whole = path.read_bytes()
  assert len(rows_of(path)) == 4  # Flushed as they came.
  # Killed within a row, between bytes of a letter, even.
  path.write_bytes(whole[:-1] + b'\n{"photo_id": "train/4", "cap\xc3')
  fake = Fake()
  summary = caption.caption_photos(photos, fake, path)
  assert fake.asked == [photo.id for photo in photos[4:]]
  assert (summary.had, summary.written, summary.odd_lines) == (4, 3, 0)
  assert path.read_bytes().startswith(whole)
  assert [row["photo_id"] for row in rows_of(path)] == [p.id for p in photos]
  # Nothing is left to do, and nothing is written.
  before = path.read_bytes()
  assert caption.caption_photos(photos, Fake(stop_after=0), path).had == 7
  assert path.read_bytes() == before


def test_a_last_row_without_its_end_is_kept(photos, tmp_path):
  path = tmp_path / caption.FILE
  caption.caption_photos(photos[:2], Fake(), path)
  path.write_bytes(path.read_bytes()[:-1])
  fake = Fake()
  caption.caption_photos(photos, fake, path)
  assert fake.asked == [photo.id for photo in photos[2:]]
  assert len(rows_of(path)) == 7


def test_lines_that_are_no_rows_stay_and_are_counted(photos, tmp_path):
  path = tmp_path / caption.FILE
  odd = [
    b"hello",
    b"[]",
    b'{"photo_id": "train/0"}',
    b'{"photo_id": "train/0", "caption": 1, "model": "m", "sha256": "s"}',
    b"[" * 100_000,
    b"\xff\xfe",
    b"",
  ]
  path.write_bytes(b"".join(line + b"\n" for line in odd))
  summary = caption.caption_photos(photos[:1], Fake(), path)
  assert (summary.odd_lines, summary.written) == (7, 1)
  assert "7 lines of the file are no captions" in str(summary)
  assert path.read_bytes().splitlines()[:7] == odd


def test_another_model_and_another_file_are_captioned_anew(photos, tmp_path):
  path = tmp_path / caption.FILE
  first, second = photos[0], tmp_path / "b.png"
  second.write_bytes(photos[1].path.read_bytes())
  two = [first, Photo("b", "", None, second)]
  caption.caption_photos(two, Fake(), path)
  other = Fake("other@2 greedy")
  caption.caption_photos(two, other, path)
  assert other.asked == [first.id, "b"]
  Image.new("RGB", (12, 5)).save(second)
  other = Fake("other@2 greedy")
  caption.caption_photos(two, other, path)
  assert other.asked == ["b"]
  # Back to the first model: what it said counts again, unasked.
  fake = Fake()
  summary = caption.caption_photos(two[:1], fake, path)
  assert (fake.asked, summary.had) == ([], 1)
  assert [(r["photo_id"], r["caption"], r["model"]) for r in rows_of(path)] == [
    (first.id, "7 wide", "fake@1 greedy"),
    ("b", "8 wide", "fake@1 greedy"),
    (first.id, "7 wide", "other@2 greedy"),
    ("b", "8 wide", "other@2 greedy"),
    ("b", "12 wide", "other@2 greedy"),
    (first.id, "7 wide", "fake@1 greedy"),
  ]


def test_damaged_and_silent_photos_are_named(photos, tmp_path):
  class Silent(Fake):
    def write(self, ids, photos):
      texts = super().write(ids, photos)
      return [w if w.text != " 10\n wide\0" else Written(" \n", 0) for w in texts]

  (tmp_path / "web.jpg").write_bytes(b"<html>")
  (tmp_path / "cut.png").write_bytes(photos[0].path.read_bytes()[:60])
  bad = [Photo(n, "", None, tmp_path / n) for n in ("web.jpg", "cut.png", "no")]
  path = tmp_path / caption.FILE
  fake = Silent(batch_size=3)
  summary = caption.caption_photos([bad[0], *photos, *bad[1:]], fake, path)
  assert [name for name, _ in summary.damaged] == ["web.jpg", "cut.png", "no"]
  assert summary.empty == ["train/3"]
  assert summary.written == 6 and len(rows_of(path)) == 6
  text = str(summary)
  for part in ("3 damaged photos", "web.jpg is not a photo", "empty: train/3"):
    assert part in text
  # No row stands for them, so they are tried again.
  again = Silent()
  assert len(caption.caption_photos(photos, again, path).empty) == 1
  assert again.asked == ["train/3"]


def test_a_limit(photos, tmp_path):
  path = tmp_path / caption.FILE
  fake = Fake()
  summary = caption.caption_photos(photos, fake, path, limit=3)
  assert fake.asked == [photo.id for photo in photos[:3]]
  assert (summary.written, summary.left) == (3, 4)
  summary = caption.caption_photos(photos, Fake(), path, limit=3)
  assert (summary.had, summary.written, summary.left) == (3, 3, 1)
  assert caption.caption_photos(photos, Fake(), path, limit=0).left == 1
  assert "1 photos left for another run" in str(
    caption.caption_photos(photos, Fake(), path, limit=0)
  )


def test_a_file_that_cannot_be_written(photos, tmp_path):
  with pytest.raises(CaptionError, match="nowhere.*see to it"):
    caption.caption_photos(photos, Fake(), tmp_path / "nowhere" / "x.jsonl")
  if pathlib.Path("/dev/full").exists():  # A disk that is always full.
    with pytest.raises(CaptionError, match="No space left"):
      caption.caption_photos(photos, Fake(), "/dev/full")


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
  with pytest.raises(CaptionError, match=f"{field} is .*it must be"):
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


# ------------------------------------------------------------------- our own


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
  assert len({w.text for w in wanted}) == 3  # It looks at the photo.


@pytest.mark.parametrize("method", METHODS)
def test_a_caption_does_not_depend_on_its_batch(
  method, open_captioner, photos
):
  captioner = open_captioner(options(method))
  ids, pixels = [p.id for p in photos], [seen(p) for p in photos]

  def write(*chosen):
    return captioner.write([ids[i] for i in chosen], [pixels[i] for i in chosen])

  together = write(0, 1, 2)
  assert [write(i)[0] for i in range(3)] == together
  assert write(2, 0, 1) == [together[i] for i in (2, 0, 1)]
  assert write(0, 5)[0] == together[0]
  assert all(written.text for written in together)
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
  for method in ("greedy", "beam"):
    captioner = open_captioner(options(method, max_tokens=len(hi) + 1))
    jax.clear_caches()
    with monkeypatch.context() as patch:
      rows = 3 * (3 if method == "beam" else 1)
      toy_agent.script(
        patch, len(captioner._prompt.tokens), [wishes] * rows, 768
      )
      # Prompts are read in rows of three, beams are three of each.
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


TOOL = pathlib.Path(__file__).parents[1] / "tools" / "caption_photos.py"


def tool(*arguments):
  return subprocess.run(
    [sys.executable, str(TOOL), *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
    cwd=TOOL.parents[1],
    env=None,
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
  assert "never learnt to say what it is shown" in done.stdout
  rows = rows_of(pathlib.Path(data) / caption.FILE)
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
  given = {t.photo.id: t.photo.caption for d in read for t in d.turns if t.photo}
  wanted = {row["photo_id"]: row["caption"] for row in rows}
  assert given == {photo_id: wanted.get(photo_id) for photo_id in given}


def test_the_command_says_what_is_wrong_in_one_sentence(workdir, tmp_path):
  with pytest.raises(CaptionError, match="There is no split of photochat"):
    caption.find_photos("photochat", tmp_path)
  done = tool(f"--path={tmp_path}", f"--workdir={workdir}")
  assert done.returncode == 1
  assert done.stderr.strip().startswith("caption_photos: There is no split")
  with pytest.raises(ValueError, match="config.json is not there"):
    captioners.open_own(tmp_path, Options(), 2)
