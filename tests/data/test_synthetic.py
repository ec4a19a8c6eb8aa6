"""The synthetic set: its files, its talk, its photos and their reading."""

import hashlib
import io
import itertools
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image, ImageFilter

from photochat_jax.data import photochat, synthetic, synthetic_phrases
from photochat_jax.data.synthetic import ATTRIBUTES, KIND, SCENES

TOLD = [name for name, kind in KIND.items() if kind != "unsaid"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return synthetic.generate(
    7, 300, 40, 40, tmp_path_factory.mktemp("set") / "data"
  )


@pytest.fixture(scope="module")
def records():
  return synthetic.make_records(7, "train", 1500)


def contents(folder):
  folder = pathlib.Path(folder)
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def words(text):
  return re.findall(r"[a-z]+", text.lower())


def own_photo(record):
  """The index of the sharer's photo."""
  return next(
    i
    for i, turn in enumerate(record["dialogue"])
    if turn["share_photo"] and turn["user_id"] == 0
  )


def test_same_arguments_same_files(folder, tmp_path):
  again = synthetic.generate(7, 300, 40, 40, tmp_path / "again")
  assert contents(again) == contents(folder)
  other = synthetic.generate(8, 300, 40, 40, tmp_path / "other")
  assert contents(other) != contents(folder)


def test_a_set_is_reused_and_another_replaced(tmp_path):
  folder = synthetic.generate(0, 5, 1, 1, tmp_path / "set")
  (folder / "photos" / "mine.txt").write_text("still here")
  synthetic.generate(0, 5, 1, 1, folder)
  assert (folder / "photos" / "mine.txt").exists()
  for change in (
    {"seed": 1},
    {"num_test": 2},
    {"image_size": 16},
    {"told_share": 0.5},
  ):
    arguments = dict(seed=0, num_train=5, num_dev=1, num_test=1) | change
    synthetic.generate(**arguments, path=folder)
    assert not (folder / "photos" / "mine.txt").exists()
    (folder / "photos" / "mine.txt").write_text("")
  assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_foreign_files_are_left_alone(tmp_path):
  (tmp_path / "thesis.txt").write_text("precious")
  with pytest.raises(ValueError, match="not a synthetic set"):
    synthetic.generate(0, 1, 1, 1, tmp_path)
  assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_the_reader_reads_it(folder):
  for split, count in (("train", 300), ("dev", 40), ("test", 40)):
    dialogues, coverage = photochat.read_split(folder, split)
    assert coverage.dialogues == count
    assert coverage.photos_found == coverage.photos_asked > 0
    assert coverage.captions_missing == 0
    assert not coverage.broken
    for dialogue in dialogues:
      shown = [t.photo for t in dialogue.turns if t.photo]
      assert [p.id for p in shown] == list(dialogue.facts["photos"])


def test_photos_are_the_scenes(folder):
  wrong = total = 0
  for path in sorted((folder / "train").glob("*.json")):
    for record in json.loads(path.read_text()):
      for photo_id, facts in record["synthetic"]["photos"].items():
        with Image.open(folder / "photos" / f"{photo_id}.jpg") as image:
          assert image.size == (32, 32)
          found = synthetic.measure(np.asarray(image))
        total += len(found)
        wrong += sum(found[a] != v for a, v in facts["attributes"].items())
  assert total > 1000
  assert wrong <= 0.005 * total


def blur(photo):
  radius = ImageFilter.GaussianBlur(1.0)
  return np.asarray(Image.fromarray(photo).filter(radius))


def noise(photo):
  rng = np.random.default_rng(int(photo.sum()))
  noisy = photo + rng.normal(0, 20, photo.shape)
  return np.clip(noisy, 0, 255).astype(np.uint8)


def tint(photo):
  return np.clip(photo + np.array([12.0, -8, 10]), 0, 255).astype(np.uint8)


def jpeg(photo):
  buffer = io.BytesIO()
  Image.fromarray(photo).save(buffer, "JPEG", quality=80)
  return np.asarray(Image.open(buffer))


@pytest.mark.parametrize("harm", [lambda p: p, blur, noise, tint, jpeg])
@pytest.mark.parametrize("size", [32, 64])
def test_measure_reads_every_attribute(harm, size):
  rng = np.random.default_rng(size)
  scenes = list(itertools.chain.from_iterable(SCENES.values()))
  wrong = dict.fromkeys(ATTRIBUTES, 0)
  for number in rng.permutation(len(scenes))[:200]:
    photo = harm(synthetic.draw(scenes[number], size, rng))
    found = synthetic.measure(photo)
    for name, value in scenes[number].items():
      wrong[name] += found[name] != value
  assert max(wrong.values()) <= 1, wrong


def test_draw_by_hand():
  scene = {
    "shape": "box",
    "ground": "water",
    "position": "left",
    "size": "big",
    "colour": "red",
    "wall": "mint",
  }
  photo = synthetic.draw(scene)
  assert photo.shape == (32, 32, 3)
  assert photo.dtype == np.uint8
  np.testing.assert_array_equal(photo[2, 30], (165, 235, 175))
  np.testing.assert_array_equal(photo[30, 30], (60, 150, 215))
  np.testing.assert_array_equal(photo[16, 8], (220, 30, 35))
  # Right of the middle there is no object, so each half-row is one colour.
  assert (photo[:, 20] == photo[:, 31]).all()


def test_scenes_of_the_splits():
  def triple(scene):
    return scene["shape"], scene["colour"], scene["ground"]

  triples = {s: {triple(x) for x in scenes} for s, scenes in SCENES.items()}
  assert {s: len(t) for s, t in triples.items()} == {
    "train": 72,
    "dev": 8,
    "test": 16,
  }
  assert not triples["train"] & triples["test"]
  assert not triples["train"] & triples["dev"]
  assert not triples["dev"] & triples["test"]
  for a, b in itertools.combinations(ATTRIBUTES, 2):
    pairs = {(x[a], x[b]) for x in SCENES["train"]}
    assert len(pairs) == len(ATTRIBUTES[a]) * len(ATTRIBUTES[b])


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_photos_keep_to_their_split(split):
  seen = [
    photo["attributes"]
    for record in synthetic.make_records(0, split, 200)
    for photo in record["synthetic"]["photos"].values()
  ]
  assert len(seen) > 100
  assert all(scene in SCENES[split] for scene in seen)


def test_talk_names_each_told_attribute_once(records):
  for record in records:
    if record["synthetic"]["sharer"] is None:
      continue
    turns = record["dialogue"]
    photo = own_photo(record)
    scene = record["synthetic"]["photos"][turns[photo]["photo_id"]][
      "attributes"
    ]
    said = words(" ".join(turn["message"] for turn in turns[:photo]))
    for name in TOLD:
      assert [w for w in said if w in ATTRIBUTES[name]] == [scene[name]]


def test_captions(records):
  told = []
  for record in records:
    photos = record["synthetic"]["photos"]
    for turn in record["dialogue"]:
      if not turn["share_photo"]:
        continue
      facts = photos[turn["photo_id"]]
      scene, said = facts["attributes"], words(turn["photo_caption"])
      full = words(facts["full_caption"])
      for name, kind in KIND.items():
        assert (scene[name] in full) == (kind != "unsaid")
        assert kind != "captioned" or scene[name] in said
      assert (scene["colour"] in said) == facts["told_in_caption"]
      assert ("nice" in said) != facts["told_in_caption"]
      assert turn["message"] == ""
      told.append(facts["told_in_caption"])
  assert abs(np.mean(told) - 0.25) < 0.04


def test_share_of_told_captions():
  for share in (0.0, 1.0):
    for record in synthetic.make_records(0, "dev", 20, told_share=share):
      for photo in record["synthetic"]["photos"].values():
        assert photo["told_in_caption"] == bool(share)


def test_answers(records):
  asked = dict.fromkeys(ATTRIBUTES, 0)
  by = [0, 0]
  for record in records:
    facts = record["synthetic"]
    for question in facts["questions"]:
      turns, turn = record["dialogue"], question["turn"]
      name, photo_id = question["attribute"], question["photo_id"]
      values = ATTRIBUTES[name]
      said = [w for w in words(turns[turn]["message"]) if w in values]
      assert said == [question["answer"]]
      assert question["answer"] == facts["photos"][photo_id]["attributes"][name]
      assert question["kind"] == KIND[name]
      assert turns[turn - 1]["user_id"] != turns[turn]["user_id"]
      assert any(t.get("photo_id") == photo_id for t in turns[:turn])
      asked[name] += 1
      by[turns[turn]["user_id"]] += 1
  assert asked["wall"] > 0.7 * sum(asked.values())
  assert min(asked.values()) > 10
  # Owners answer about their own photo, and those who were shown it, too.
  assert min(by) > 0.3 * sum(by)


def test_the_wall_is_never_said_before_it_is_asked(records):
  for record in records:
    answers = [q["turn"] for q in record["synthetic"]["questions"]]
    for number, turn in enumerate(record["dialogue"]):
      if number not in answers:
        text = turn["message"] + turn.get("photo_caption", "")
        assert not set(words(text)) & set(ATTRIBUTES["wall"])


def normal(text):
  return text.lower().rstrip("?")


def test_the_moment_of_sharing_can_be_told(records):
  """A rule that reads the talk alone finds the turns with a photo."""

  def said(texts):
    return {normal(text) for text in texts}

  shows = said(synthetic_phrases.REQUESTS + synthetic_phrases.OFFER_ACCEPTED)
  asked = said(synthetic_phrases.PARTNER_ASKED)
  without = said(synthetic_phrases.NO_CAMERA)
  right = total = 0
  for record in records:
    turns = record["dialogue"]
    groups = [
      list(g) for _, g in itertools.groupby(turns, lambda t: t["user_id"])
    ]
    camera = True
    for before, group in itertools.pairwise(groups):
      camera &= not said(t["message"] for t in before + group) & without
      last = normal(before[-1]["message"])
      speaker = group[0]["user_id"]
      guess = last in (asked if speaker else shows) and (speaker or camera)
      right += bool(guess) == any(t["share_photo"] for t in group)
      total += 1
  assert right / total > 0.95


def test_declined_requests_sound_like_granted_ones(records):
  requests = {normal(text) for text in synthetic_phrases.REQUESTS}
  declined = sum(
    any(normal(t["message"]) in requests for t in record["dialogue"])
    for record in records
    if record["synthetic"]["sharer"] is None
  )
  assert declined > 0.05 * len(records)


def test_shape_of_the_dialogues(records):
  lengths = [len(record["dialogue"]) for record in records]
  assert min(lengths) >= 4
  assert max(lengths) <= 15
  shown = [r for r in records if r["synthetic"]["sharer"] == 0]
  assert 0.7 < len(shown) / len(records) < 0.8
  first = np.mean([r["dialogue"][0]["user_id"] for r in records])
  assert 0.3 < first < 0.7
  partner_first = sum(
    next(t for t in r["dialogue"] if t["share_photo"])["user_id"] for r in shown
  )
  assert 0.3 < partner_first / len(shown) < 0.4
  for record in records:
    own = [
      t for t in record["dialogue"] if t["share_photo"] and not t["user_id"]
    ]
    assert len(own) == (record in shown)
    for turn in own:
      assert record["photo_id"] == turn["photo_id"]
      assert record["photo_description"] == turn["photo_description"]


def test_phrases_hold_no_value_of_an_attribute():
  values = {value for values in ATTRIBUTES.values() for value in values}

  def texts(node):
    if isinstance(node, str):
      yield node
    elif isinstance(node, dict):
      for item in node.values():
        yield from texts(item)
    elif isinstance(node, tuple):
      for item in node:
        yield from texts(item)

  found = []
  for name in dir(synthetic_phrases):
    if name.isupper() and name != "PARTITIONS":
      found += texts(getattr(synthetic_phrases, name))
  assert len(found) > 200
  for text in found:
    assert not set(words(re.sub(r"\{.*?\}", "", text))) & values
