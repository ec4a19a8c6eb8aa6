"""DialogCC: the published shape by hand, and everything that is not.

The sample is made up, in the shape of huggingface.co/datasets/passing2961/
dialogcc.
"""

import copy
import json
import pathlib

import hostile_json
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photochat_jax.data import dialogcc, photo_store, schema
from photochat_jax.data.dialogcc import read_split

SAMPLE = pathlib.Path(__file__).parent / "dialogcc_sample"
HOUSE, TOWER = (
  "https://photos.example/lighthouse.jpg",
  "https://photos.example/b.png?size=big&x=1",
)
JAR = "https://photos.example/jar.jpg"


def said(speaker="A", utterance="hi", images=(), **fields):
  return {
    "utterance_idx": 0,
    "utterance": utterance,
    "speaker": speaker,
    "rationale": "",
    "shared_image": list(images),
    "description": "",
    **fields,
  }


def image(url="https://x/1.jpg", caption="theirs"):
  return {"image_url": url, "caption": caption}


def record(*entries, **fields):
  return {
    "dialogue_id": "bst:1",
    "split": "train",
    "dialogue": list(entries) or [said(), said("B")],
    **fields,
  }


GOOD = record(
  said(),
  said("B", "look", rationale="To show"),
  said("B", "", [image(), image("https://x/2.jpg")], description="a dog"),
)


def write(folder, content, name="train.json"):
  file = folder / name
  file.parent.mkdir(exist_ok=True)
  if not isinstance(content, bytes):
    content = json.dumps(content).encode()
  file.write_bytes(content)


def read_one(folder, item, **options):
  write(folder, [record(), item])
  dialogues, coverage = read_split(folder, "train", max_broken=0.5, **options)
  return dialogues[1:], coverage


def test_the_sample_by_hand():
  dialogues, coverage = read_split(SAMPLE, "train")
  told = "An image of a white lighthouse above the sea in fog"
  starter = "a jar of sourdough starter on a shelf"
  first, second, third = map(photo_store.url_id, (HOUSE, TOWER, JAR))
  turn = schema.Turn
  assert dialogues[0] == schema.Dialogue(
    "bst:17",
    "train",
    (
      turn(0, "I took the slow train along the coast on Sunday."),
      turn(1, "Lucky you! Was it as foggy as the radio said?"),
      turn(0, "Only until noon. The lighthouse came out of it all at once."),
      turn(0, "", schema.Photo(first, told, told, url=HOUSE)),
      turn(0, "", schema.Photo(second, told, told, url=TOWER)),
      turn(1, "That could hang on my wall."),
    ),
    {
      "source": "bst",
      "rationales": [
        {"turn": 3, "text": "To show what the lighthouse looked like"}
      ],
      "captions": {
        first: "lighthouse on a cliff in the fog",
        second: "the old lighthouse at noon",
      },
    },
  )
  # No description: CC3M's caption stands in. A text stands before its photo.
  assert dialogues[1].turns[1:3] == (
    turn(1, "The wild yeast in the starter does it. Mine is four years old."),
    turn(1, "", schema.Photo(third, starter, starter, url=JAR)),
  )
  assert dialogues[1].facts["source"] == "wow"
  assert coverage == schema.Coverage(
    "train", 2, 3, 0, 0, (first, second, third), ()
  )


def test_the_other_splits():
  assert dialogcc.list_splits(SAMPLE) == ("train", "dev", "test")
  [dialogue], _ = read_split(SAMPLE, "dev")
  assert (dialogue.id, dialogue.split) == ("empathy:8", "dev")
  [dialogue], coverage = read_split(SAMPLE, "test")
  assert [t.speaker for t in dialogue.turns] == [0, 1, 0]
  assert coverage.photos_asked == 0


@pytest.mark.parametrize("source", ["given", "labels", "description"])
def test_caption_sources(source):
  dialogues, _ = read_split(SAMPLE, "dev", source)
  photo = dialogues[0].turns[3].photo
  assert photo.caption == "An image of a muddy dog asleep on a rug"


def test_captions_written_by_a_model(tmp_path):
  write(tmp_path, [GOOD])
  row = {"photo_id": photo_store.url_id("https://x/1.jpg"), "caption": "ours"}
  write(tmp_path, row, "photo_captions.jsonl")
  [dialogue], coverage = read_split(tmp_path, "train", "written")
  captions = [t.photo.caption for t in dialogue.turns if t.photo]
  assert captions == ["ours", None]
  assert coverage.captions_missing == 1


def test_photos_that_were_fetched(tmp_path):
  write(tmp_path, [GOOD])
  name = photo_store.url_id("https://x/2.jpg")
  (tmp_path / "photos" / "url").mkdir(parents=True)
  (tmp_path / "photos" / f"{name}.png").touch()
  [dialogue], coverage = read_split(tmp_path, "train")
  paths = [t.photo.path for t in dialogue.turns if t.photo]
  assert paths[0] is None
  assert paths[1].name == name.removeprefix("url/") + ".png"
  assert coverage.missing == (photo_store.url_id("https://x/1.jpg"),)


VALID = record(dialogue_id="wow:2", split="valid")


@pytest.mark.parametrize(
  "files",
  [
    {"train.json": [record()], "valid.json": [VALID]},
    {"train.json": {"data": [record()]}, "dev.json": {"data": [VALID]}},
    {"train/0.json": [record()], "validation/0.json": [VALID]},
    {
      "train.jsonl": b"%b\n" % json.dumps(record()).encode(),
      "val.jsonl": b"%b\n\n" % json.dumps(VALID).encode(),
    },
    {"dialogcc.json": [VALID, record()]},
    {
      "all.jsonl": b"%b\n%b\n"
      % (json.dumps(VALID).encode(), json.dumps(record()).encode())
    },
  ],
)
def test_shapes_of_folders(tmp_path, files):
  for name, content in files.items():
    write(tmp_path, content, name)
  assert dialogcc.list_splits(tmp_path) == ("train", "dev")
  [dialogue], coverage = read_split(tmp_path, "train")
  assert dialogue.id == "bst:1" and coverage.broken == ()
  [dialogue], coverage = read_split(tmp_path, "dev")
  assert dialogue.id == "wow:2" and coverage.broken == ()


def test_fields_that_are_not_there(tmp_path):
  item = {
    "dialogue_id": 7,
    "dialogue": [
      {"speaker": 0, "utterance": "hi"},
      {"speaker": 1, "shared_image": [{"image_url": " https://x/1 "}]},
    ],
  }
  [dialogue], coverage = read_one(tmp_path, item)
  photo = schema.Photo(
    photo_store.url_id("https://x/1"), "", None, url="https://x/1"
  )
  assert dialogue.turns == (schema.Turn(0, "hi"), schema.Turn(1, "", photo))
  assert dialogue.facts == {"source": "7", "rationales": [], "captions": {}}
  assert coverage.captions_missing == 1


def test_a_rationale_beside_the_utterance(tmp_path):
  [dialogue], _ = read_one(tmp_path, GOOD)
  assert dialogue.turns[1].text == "look"
  assert dialogue.facts["rationales"] == [{"turn": 1, "text": "To show"}]


def test_written_captions_are_no_dialogues(tmp_path):
  write(tmp_path, [record()], "all.json")
  write(tmp_path, {"photo_id": "a", "caption": "b"}, "photo_captions.jsonl")
  _, coverage = read_split(tmp_path, "train")
  assert coverage.broken == ()


def test_one_photo_shared_by_two_dialogues(tmp_path):
  write(tmp_path, [GOOD, GOOD])
  dialogues, coverage = read_split(tmp_path, "train")
  assert [d.id for d in dialogues] == ["bst:1", "bst:1 (train.json record 1)"]
  assert coverage.photos_asked == 2


def broken_records():
  no_split = {k: v for k, v in record().items() if k != "split"}
  return {
    "the record is not an object: [1]": [1],
    "dialogue is not a list of turns: []": record() | {"dialogue": []},
    "a turn is not an object: 'x'": record() | {"dialogue": ["x"]},
    "dialogue_id is not a number": record(dialogue_id={}),
    "split is not that of the file: 'test'": record(split="test"),
    "split is not train, valid or test: 3": record(split=3),
    "split is not train, valid or test: ['x']": record(split=["x"]),
    "speaker is not a name or a number: None": record(said(None)),
    "speaker is not a name or a number: True": record(said(True)),
    "more than two speakers: ['A', 'B', 'C']": record(
      said(), said("B"), said("A "), said("C")
    ),
    "utterance is not a text: None": record(said(utterance=None)),
    "utterance is not a text: 4": record(said("A", 4, [image()])),
    "shared_image is not a list of images: 'u'": record(
      said() | {"shared_image": "u"}
    ),
    "an image is not an object: 'u'": record(said(images=["u"])),
    "image_url is not a text: None": record(said(images=[{}])),
    "image_url is empty": record(said(images=[image(" ")])),
    "caption is not a text: 1": record(said(images=[image(caption=1)])),
    "description is not a text: 1": record(
      said(images=[image()], description=1)
    ),
    "rationale is not a text: []": record(said(rationale=[])),
    "": no_split,
  }


@pytest.mark.parametrize("reason", broken_records())
def test_a_broken_record_is_reported(tmp_path, reason):
  dialogues, coverage = read_one(tmp_path, broken_records()[reason])
  if not reason:
    assert len(dialogues) == 1  # The file says which split it is.
    return
  assert dialogues == []
  [line] = coverage.broken
  assert line.startswith("train.json record 1: ")
  assert reason in line


def test_a_file_for_all_must_say_the_split(tmp_path):
  item = record()
  del item["split"]
  write(tmp_path, [record(), item, VALID], "all.json")
  dialogues, coverage = read_split(tmp_path, "train", max_broken=0.5)
  assert len(dialogues) == 1
  assert coverage.broken == (
    "all.json record 1: split is not train, valid or test: None",
  )


def test_nothing_to_read(tmp_path):
  with pytest.raises(ValueError, match="no split at all"):
    read_split(tmp_path, "train")
  write(tmp_path, [record()])
  with pytest.raises(ValueError, match=r"no dev split.*valid\.json.*has train"):
    read_split(tmp_path, "dev")
  with pytest.raises(ValueError, match="no other split"):
    read_split(tmp_path, "other")


@settings(max_examples=100)
@given(items=st.lists(hostile_json.records(GOOD), min_size=1, max_size=4))
def test_hostile_records(tmp_path_factory, items):
  folder = tmp_path_factory.mktemp("hostile")
  write(folder, [GOOD, *items])
  dialogues, coverage = hostile_json.read(read_split, folder, "train")
  assert len(dialogues) + len(coverage.broken) == 1 + len(items)


@settings(max_examples=100)
@given(
  content=hostile_json.files(GOOD),
  name=st.sampled_from(["train.json", "all.json", "train.jsonl"]),
)
def test_hostile_files(tmp_path_factory, content, name):
  folder = tmp_path_factory.mktemp("hostile")
  write(folder, content, name)
  hostile_json.read(read_split, folder, "train")


def test_reading_changes_no_record():
  before = copy.deepcopy(GOOD)
  captions = dialogcc.Captions("given", SAMPLE)
  dialogcc.read_record(GOOD, "train", captions)
  assert before == GOOD
