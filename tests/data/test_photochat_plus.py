"""PhotoChat++: the published shape by hand, and everything that is not.

The sample is made up, in the shape of huggingface.co/datasets/passing2961/
photochat_plus.
"""

import json
import pathlib

import hostile_json
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photochat_jax.data import photochat_plus, schema
from photochat_jax.data.photochat_plus import read_split

SAMPLE = pathlib.Path(__file__).parent / "photochat_plus_sample"
GOOD = json.loads((SAMPLE / "photochat_plus.json").read_text())[0]


def write(folder, content, name="photochat_plus.json"):
  if not isinstance(content, bytes):
    content = json.dumps(content).encode()
  (folder / name).write_bytes(content)


def test_the_sample_by_hand():
  (first, second), coverage = read_split(SAMPLE)
  assert (first.id, first.split) == ("41", "test")
  assert [t.speaker for t in first.turns] == [1, 0, 1, 0, 1]
  assert first.turns[3] == schema.Turn(
    0,
    "",
    schema.Photo(
      "train/00c0ffee00c0ffee",
      "The photo has your friend Aino. Objects in the photo: Bicycle, Woman",
      "A woman stands beside a red bicycle.",
      url="https://photos.example/41_o.jpg",
    ),
  )
  assert first.facts == {
    "intents": [
      "visual clarification",
      "social bonding",
      "visual clarification",
      "humor and entertainment",
    ],
    "other_intents": ["showing off"],
    "triggers": [
      {"text": "can I  see the new bike?", "turn": 2},
      {"text": "It is the reddest thing in town", "turn": None},
    ],
    "descriptions": [
      "A woman stands beside a red bicycle.",
      "a friend with her new bike",
    ],
    "salient": ["new bike", "Aino"],
  }
  # Said before and after the photo: the one before called for it.
  assert second.facts["triggers"] == [{"text": "guess what i baked", "turn": 0}]
  assert second.facts["intents"] == ["expression of emotion or opinion"]
  assert coverage.photos_asked == len(coverage.missing) == 2
  assert coverage.captions_missing == 0


def test_a_sentence_said_twice_is_the_last_one(tmp_path):
  twice = [GOOD["dialogue"][2], *GOOD["dialogue"]]
  write(tmp_path, [GOOD | {"dialogue": twice}])
  [dialogue], _ = read_split(tmp_path)
  assert dialogue.facts["triggers"][0]["turn"] == 3


def test_the_labels_are_the_six():
  assert len(set(photochat_plus.INTENTS)) == 6
  assert "humor and entertainment" in photochat_plus.INTENTS


@pytest.mark.parametrize(
  ("source", "caption"),
  [
    ("given", "a chocolate cake on a plate"),
    ("labels", "Cake"),
    ("description", "Objects in the photo: Cake"),
  ],
)
def test_caption_sources(source, caption):
  dialogues, _ = read_split(SAMPLE, "test", source)
  assert dialogues[1].turns[2].photo.caption == caption


@pytest.mark.parametrize("name", ["test.json", "test/0.json"])
def test_other_names_of_the_file(tmp_path, name):
  assert photochat_plus.list_splits(tmp_path) == ()
  (tmp_path / "test").mkdir()
  write(tmp_path, [GOOD], name)
  assert photochat_plus.list_splits(tmp_path) == ("test",)
  assert len(read_split(tmp_path, "test")[0]) == 1


def test_only_a_test_set(tmp_path):
  with pytest.raises(ValueError, match=r"no train split: it is a test set"):
    read_split(SAMPLE, "train")
  with pytest.raises(ValueError, match=r"expected .*photochat_plus\.json"):
    read_split(tmp_path, "test")


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"intents": None}, "intents is not a list of texts: None"),
    ({"intents": []}, "intents is empty"),
    ({"intents": [3]}, "a text of intents is not a text: 3"),
    ({"trigger_sentences": "x"}, "trigger_sentences is not a list of texts"),
    ({"image_descriptions": {}}, "image_descriptions is not a list of texts"),
    ({"salient_information": [None]}, "a text of salient_information is not"),
    ({"photo_id": "../x"}, "photo_id is no path below photos/"),
  ],
)
def test_a_broken_record_is_reported(tmp_path, change, reason):
  write(tmp_path, [GOOD, GOOD | change])
  dialogues, coverage = read_split(tmp_path, "test", max_broken=0.5)
  assert len(dialogues) == 1
  [line] = coverage.broken
  assert line.startswith(f"photochat_plus.json record 1: {reason}")


def test_a_record_without_descriptions_has_no_caption(tmp_path):
  write(tmp_path, [GOOD | {"image_descriptions": []}])
  [dialogue], coverage = read_split(tmp_path)
  assert dialogue.turns[3].photo.caption is None
  assert coverage.captions_missing == 1


@settings(max_examples=100)
@given(items=st.lists(hostile_json.records(GOOD), min_size=1, max_size=4))
def test_hostile_records(tmp_path_factory, items):
  folder = tmp_path_factory.mktemp("hostile")
  write(folder, [GOOD, *items])
  dialogues, coverage = hostile_json.read(read_split, folder, "test")
  assert len(dialogues) + len(coverage.broken) == 1 + len(items)


@settings(max_examples=80)
@given(content=hostile_json.files(GOOD))
def test_hostile_files(tmp_path_factory, content):
  folder = tmp_path_factory.mktemp("hostile")
  write(folder, content)
  hostile_json.read(read_split, folder, "test")
