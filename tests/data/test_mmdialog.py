"""MMDialog: the shape that its authors picture, and everything that is not.

The sample is made up, in the shape of github.com/victorsungo/MMDialog.
"""

import json
import pathlib

import hostile_json
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photochat_jax.data import mmdialog, schema
from photochat_jax.data.mmdialog import read_split

SAMPLE = pathlib.Path(__file__).parent / "mmdialog_sample"
TEXT, MEDIA = "__TEXT__", "__MEDIA__"


def record(*turns, **fields):
  turns = turns or ([{TEXT: "hi"}], [{TEXT: "see"}, {MEDIA: "-12"}])
  return {
    "conversation_id": 0,
    "conversation": [{"turn": list(parts)} for parts in turns],
    **fields,
  }


GOOD = record(
  [{TEXT: "hi"}, {MEDIA: "-12"}, {MEDIA: "7"}],
  [{TEXT: "oh"}],
  negative_candidate_media_keys=["5"],
)


def write(folder, values, split="train", name="conversations.json"):
  (folder / split).mkdir(exist_ok=True)
  content = values
  if not isinstance(values, bytes):
    content = "".join(json.dumps(value) + "\n" for value in values).encode()
  (folder / split / name).write_bytes(content)


def photo(key, **fields):
  return schema.Photo(key, "", None, **fields)


def test_the_sample_by_hand():
  dialogues, coverage = read_split(SAMPLE, "train")
  assert dialogues[0] == schema.Dialogue(
    "0",
    "train",
    (
      schema.Turn(0, "Morning from the harbour :sunrise:"),
      schema.Turn(0, "", photo("-1000000000000000001")),
      schema.Turn(0, "", photo("1000000000000000002")),
      schema.Turn(1, "Which one is yours?"),
      schema.Turn(0, "The blue one at the back."),
    ),
  )
  assert [d.id for d in dialogues] == ["0", "1"]
  assert coverage.photos_asked == coverage.captions_missing == 3
  [dialogue], _ = read_split(SAMPLE, "dev")
  assert (dialogue.id, dialogue.split) == ("0", "dev")
  assert dialogue.turns[1] == schema.Turn(1, "", photo("1000000000000000002"))
  assert mmdialog.list_splits(SAMPLE) == ("train", "dev")


@pytest.mark.parametrize("source", ["given", "labels", "description"])
def test_nothing_is_said_about_a_photo(source):
  dialogues, _ = read_split(SAMPLE, "train", source)
  assert dialogues[0].turns[1].photo.caption is None


def test_captions_written_by_a_model(tmp_path):
  write(tmp_path, [GOOD])
  (tmp_path / "photo_captions.jsonl").write_text(
    json.dumps({"photo_id": "-12", "caption": "a harbour"})
  )
  [dialogue], coverage = read_split(tmp_path, "train", "written")
  assert dialogue.turns[1].photo.caption == "a harbour"
  assert coverage.captions_missing == 1


def test_photos_beside_the_records_or_in_their_folder(tmp_path):
  write(tmp_path, [GOOD, record([{MEDIA: "9"}])])
  (tmp_path / "train" / "-12.jpg").touch()
  (tmp_path / "train" / "7.png").touch()  # All are published as .jpg.
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "9.jpg").touch()
  dialogues, coverage = read_split(tmp_path, "train")
  places = [
    t.photo.path and t.photo.path.relative_to(tmp_path).as_posix()
    for d in dialogues
    for t in d.turns
    if t.photo
  ]
  assert places == ["train/-12.jpg", None, "photos/9.jpg"]
  assert (coverage.photos_asked, coverage.missing) == (3, ("7",))


LISTS = GOOD | {"conversation": [t["turn"] for t in GOOD["conversation"]]}


@pytest.mark.parametrize(
  ("split", "name", "content"),
  [
    ("valid", "conversations.json", json.dumps(GOOD)),
    ("valid", "conversations.json", json.dumps([GOOD])),
    ("valid", "conversations.json", json.dumps([LISTS])),
    ("dev", "some.jsonl", json.dumps(GOOD) + "\n"),
    (".", "val.jsonl", json.dumps(LISTS) + "\n"),
  ],
)
def test_shapes(tmp_path, split, name, content):
  write(tmp_path, content.encode(), split, name)
  [dialogue], coverage = read_split(tmp_path, "dev")
  assert coverage.broken == ()
  assert dialogue.turns == (
    schema.Turn(0, "hi"),
    schema.Turn(0, "", photo("-12")),
    schema.Turn(0, "", photo("7")),
    schema.Turn(1, "oh"),
  )


def test_a_part_may_hold_both_and_a_key_be_a_number(tmp_path):
  write(tmp_path, [record([{MEDIA: -12, TEXT: "see"}])])
  [dialogue], _ = read_split(tmp_path, "train")
  assert dialogue.turns == (
    schema.Turn(0, "see"),
    schema.Turn(0, "", photo("-12")),
  )


@pytest.mark.parametrize(
  ("item", "reason"),
  [
    (3, "the record is not an object: 3"),
    (record(conversation=[]), "conversation is not a list of turns: []"),
    (record(conversation_id=None), "conversation_id is not a number"),
    (record([]), "a turn is not a list of texts and media: []"),
    (record(conversation=["hi"]), "a turn is not a list of texts and media"),
    (record(conversation=[{}]), "a turn is not a list of texts and media"),
    (record(["hi"]), "a part of a turn is not an object: 'hi'"),
    (record([{}]), "a part of a turn has no __TEXT__ or __MEDIA__: {}"),
    (record([{TEXT: 3}]), "__TEXT__ is not a text: 3"),
    (record([{MEDIA: True}]), "__MEDIA__ is not a text: True"),
    (record([{MEDIA: "../1"}]), "__MEDIA__ is no path below photos/"),
  ],
)
def test_a_broken_record_is_reported(tmp_path, item, reason):
  write(tmp_path, [record(), item])
  dialogues, coverage = read_split(tmp_path, "train", max_broken=0.5)
  assert len(dialogues) == 1
  [line] = coverage.broken
  assert line.startswith(f"conversations.json line 2: {reason}")


def test_a_line_cut_off_is_one_broken_record(tmp_path):
  lines = json.dumps(record()) + '\n{"conversation_id": 1, "conv\n'
  write(tmp_path, (lines + json.dumps(record())).encode())
  dialogues, coverage = read_split(tmp_path, "train", max_broken=0.5)
  assert len(dialogues) == 2
  assert coverage.broken == ("conversations.json line 2: the line is no JSON",)


def test_nothing_to_read(tmp_path):
  with pytest.raises(ValueError, match="no split at all"):
    read_split(tmp_path, "train")
  write(tmp_path, [record()])
  with pytest.raises(
    ValueError, match=r"no dev split.*valid/conversations\.json.*has train"
  ):
    read_split(tmp_path, "dev")


@settings(max_examples=100)
@given(items=st.lists(hostile_json.records(GOOD), min_size=1, max_size=4))
def test_hostile_records(tmp_path_factory, items):
  folder = tmp_path_factory.mktemp("hostile")
  write(folder, [GOOD, *items])
  dialogues, coverage = hostile_json.read(read_split, folder, "train")
  assert len(dialogues) + len(coverage.broken) == 1 + len(items)


@settings(max_examples=80)
@given(content=hostile_json.files(GOOD))
def test_hostile_files(tmp_path_factory, content):
  folder = tmp_path_factory.mktemp("hostile")
  write(folder, content)
  hostile_json.read(read_split, folder, "train")
