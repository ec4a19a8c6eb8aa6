"""The reader, on real PhotoChat dialogues and on everything that is not."""

import json
import pathlib

import hostile_json
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photochat_jax.data import photochat, records, schema
from photochat_jax.data.photochat import read_split
from photochat_jax.data.schema import shared_photos

SAMPLE = pathlib.Path(__file__).parent / "photochat_sample"


def turn(message="hi", share_photo=False, user_id=0, **own):
  return {
    "message": message,
    "share_photo": share_photo,
    "user_id": user_id,
    **own,
  }


def record(*turns, **fields):
  return {
    "dialogue": list(turns) or [turn(), turn("", True)],
    "dialogue_id": 3,
    "photo_description": "Objects in the photo: Dog, Tree",
    "photo_url": "",
    "photo_id": "train/01ab",
    **fields,
  }


def write(folder, records, split="train", name="train_00.json"):
  (folder / split).mkdir(exist_ok=True)
  text = records if isinstance(records, str) else json.dumps(records)
  (folder / split / name).write_text(text, encoding="utf-8")
  return folder


def read_one(folder, item, **options):
  """The one dialogue of a file that holds one good record beside it."""
  write(folder, [record(dialogue_id="good"), item])
  dialogues, coverage = read_split(folder, "train", max_broken=0.5, **options)
  return dialogues[1:], coverage


@pytest.mark.parametrize(
  ("split", "count"), [("train", 40), ("dev", 16), ("test", 16)]
)
def test_real_dialogues(split, count):
  dialogues, coverage = read_split(SAMPLE, split, "labels")
  assert len(dialogues) == coverage.dialogues == count
  assert coverage.broken == ()
  assert coverage.photos_asked == len(coverage.missing) == count
  assert coverage.photos_found == coverage.captions_missing == 0
  assert [d.id for d in dialogues] == [str(i) for i in range(count)]
  for dialogue in dialogues:
    shown = [t for t in dialogue.turns if t.photo]
    assert [(t.speaker, t.text, t.photo.path) for t in shown] == [(0, "", None)]
    assert "Objects in the photo" not in shown[0].photo.caption
    assert dialogue.facts is None
    assert dialogue.split == split


def test_a_real_dialogue_by_hand():
  dialogue = read_split(SAMPLE, "train")[0][2]
  assert dialogue.turns[0] == schema.Turn(1, "What you been up too?")
  photo = dialogue.turns[6].photo
  assert photo == schema.Photo(
    "train/90ceedce9f09733f",
    "The photo has your uncle Kairo. Objects in the photo: Suit, Man, Face",
    None,
    None,
    "https://c8.staticflickr.com/4/3788/10868708584_7b931877a0_o.jpg",
  )


@pytest.mark.parametrize(
  ("source", "caption"),
  [
    ("given", None),
    ("labels", "Suit, Man, Face"),
    (
      "description",
      "The photo has your uncle Kairo. Objects in the photo: Suit, Man, Face",
    ),
  ],
)
def test_caption_sources(source, caption):
  dialogue = read_split(SAMPLE, "train", source)[0][2]
  assert dialogue.turns[6].photo.caption == caption


def test_unknown_caption_source():
  with pytest.raises(ValueError, match="given, labels, description"):
    read_split(SAMPLE, "train", "guess")


def test_labels_without_the_usual_words(tmp_path):
  [dialogue], _ = read_one(
    tmp_path,
    record(photo_description=" A dog "),
    caption_source="labels",
  )
  assert dialogue.turns[1].photo.caption == "A dog"


def test_a_turn_s_own_fields_count(tmp_path):
  own = turn(
    "see", True, 1, photo_id="a/b", photo_description="d", photo_caption="c"
  )
  [dialogue], _ = read_one(
    tmp_path, record(own, turn("", True), photo_caption="record's")
  )
  first, second = dialogue.turns
  assert first == schema.Turn(1, "see", schema.Photo("a/b", "d", "c"))
  assert second.photo.id == "train/01ab"
  assert second.photo.caption == "record's"


def test_another_photo_does_not_get_the_record_s_words(tmp_path):
  item = record(turn("", True, photo_id="a/b"), photo_caption="a dog")
  [dialogue], coverage = read_one(tmp_path, item)
  assert dialogue.turns[0].photo == schema.Photo("a/b", "", None)
  assert coverage.captions_missing == 2


def test_files_of_photos(tmp_path):
  (tmp_path / "photos" / "train").mkdir(parents=True)
  (tmp_path / "photos" / "train" / "01ab.jpg").write_bytes(b"")
  write(
    tmp_path,
    [
      record(),
      record(photo_id="train/gone"),
      record(photo_id="nowhere/at/all"),
      record(),
    ],
  )
  dialogues, coverage = read_split(tmp_path, "train")
  paths = [d.turns[1].photo.path for d in dialogues]
  assert [p is not None for p in paths] == [True, False, False, True]
  assert paths[0].read_bytes() == b""
  assert (coverage.photos_asked, coverage.photos_found) == (3, 1)
  assert coverage.missing == ("train/gone", "nowhere/at/all")
  report = str(coverage)
  assert "1 of 3 photos found" in report
  assert "missing: train/gone" in report


def test_a_long_report_is_cut(tmp_path):
  write(tmp_path, [record(photo_id=f"t/{i}") for i in range(50)])
  report = str(read_split(tmp_path, "train")[1])
  assert "missing: and 30 more" in report
  assert len(report.splitlines()) == 22


def test_photo_id_is_needed_only_for_a_photo(tmp_path):
  quiet = record(turn())
  del quiet["photo_id"]
  [dialogue], coverage = read_one(tmp_path, quiet)
  assert dialogue.turns == (schema.Turn(0, "hi"),)
  assert coverage.broken == ()


def test_early_revision(tmp_path):
  early = [record(), record(turn())]
  for item in early:
    del item["photo_id"]
  write(tmp_path, early)
  with pytest.raises(ValueError, match="early revision of PhotoChat"):
    read_split(tmp_path, "train")


def broken_records():
  no_id = record()
  del no_id["photo_id"]
  return {
    "a photo is shared but there is no photo_id, as in early revisions": no_id,
    "the record is not an object: 7": 7,
    "dialogue is not a list of turns: {}": record() | {"dialogue": {}},
    "dialogue is not a list of turns: []": record() | {"dialogue": []},
    "a turn is not an object: None": record() | {"dialogue": [None]},
    "user_id is not 0 or 1: 2": record(turn(user_id=2)),
    "user_id is not 0 or 1: True": record(turn(user_id=True)),
    "share_photo is not true or false: 'yes'": record(turn(share_photo="yes")),
    "message is not a text: None": record(turn(None)),
    "dialogue_id is not a number or a text: None": record(dialogue_id=None),
    "synthetic is not an object: 3": record(synthetic=3),
    "synthetic is not as data/synthetic.py writes it: {'photos': 3}": record(
      synthetic={"photos": 3}
    ),
    "synthetic is not as data/synthetic.py writes it: {'questions'": record(
      synthetic={"questions": [{"turn": 2, "photo_id": "a"}]}
    ),
    "photo_id is not a text: 5": record(photo_id=5),
    "photo_id is no path below photos/: ''": record(photo_id=""),
    "below photos/: '../../etc/passwd'": record(photo_id="../../etc/passwd"),
    "below photos/: '/etc/passwd'": record(photo_id="/etc/passwd"),
    r"below photos/: 'a\\b'": record(photo_id="a\\b"),
    "photo_id is no path below photos/: 'aaa": record(photo_id="a" * 300),
    "photo_description is not a text: 3": record(photo_description=3),
    "photo_url is not a text: 3": record(photo_url=3),
  }


@pytest.mark.parametrize("reason", broken_records())
def test_a_broken_record_is_reported(tmp_path, reason):
  dialogues, coverage = read_one(tmp_path, broken_records()[reason])
  assert dialogues == []
  assert coverage.dialogues == 1
  [line] = coverage.broken
  assert line.startswith("train_00.json record 1: ")
  assert reason in line
  assert line in str(coverage)
  [(counted, times)] = coverage.reasons
  assert counted in line and times == 1


def test_repeated_ids_stay_unique(tmp_path):
  write(tmp_path, [record(), record()])
  write(tmp_path, [record()], name="train_01.json")
  dialogues, _ = read_split(tmp_path, "train")
  assert [d.id for d in dialogues] == [
    "3",
    "3 (train_00.json record 1)",
    "3 (train_01.json record 0)",
  ]


def test_lone_surrogates_are_replaced(tmp_path):
  [dialogue], _ = read_one(tmp_path, record(turn("a\ud83d")))
  assert dialogue.turns[0].text == "a?"


@pytest.mark.parametrize("text", ["", "[{", "{}", "null", "[" * 100_000])
def test_a_file_that_is_no_list(tmp_path, text):
  write(tmp_path, text)
  with pytest.raises(ValueError, match=r"train_00\.json is not"):
    read_split(tmp_path, "train")


def test_a_byte_order_mark_is_no_harm(tmp_path):
  write(tmp_path, "\ufeff" + json.dumps([record()]))
  assert len(read_split(tmp_path, "train")[0]) == 1


def test_nothing_to_read(tmp_path):
  with pytest.raises(ValueError, match="no split at all"):
    read_split(tmp_path, "train")
  write(tmp_path, [record()])
  with pytest.raises(ValueError, match="no dev split.*has train"):
    read_split(tmp_path, "dev")
  assert photochat.list_splits(tmp_path) == ("train",)


@pytest.mark.parametrize(
  ("records", "reason"), [([], "the files are empty"), ([3], "not an object")]
)
def test_no_dialogue_at_all(tmp_path, records, reason):
  write(tmp_path, records)
  with pytest.raises(ValueError, match=f"No dialogue of .*{reason}"):
    read_split(tmp_path, "train")


def test_photos_of_several_splits(tmp_path):
  write(tmp_path, [record(), record(photo_id="t/1")])
  write(tmp_path, [record()], "dev")
  write(tmp_path, [record(photo_id="t/2")], "test")
  splits = {s: read_split(tmp_path, s)[0] for s in ("train", "dev", "test")}
  assert shared_photos(splits) == {"train/01ab": ("train", "dev")}


GOOD = record(
  turn("hello", user_id=1),
  turn("see", True, photo_id="a/b", photo_caption="c", photo_url="u"),
  turn("", True),
  photo_caption="of the record's",
  synthetic={
    "photos": {"a/b": {"attributes": {}}},
    "questions": [{"turn": 1, "photo_id": "a/b"}],
  },
)


@settings(max_examples=150)
@given(items=st.lists(hostile_json.records(GOOD), min_size=1, max_size=4))
def test_hostile_records(tmp_path_factory, items):
  folder = tmp_path_factory.mktemp("hostile")
  write(folder, [GOOD, *items])
  dialogues, coverage = hostile_json.read(read_split, folder, "train")
  assert len(dialogues) + len(coverage.broken) == 1 + len(items)


@settings(max_examples=150)
@given(content=hostile_json.files(GOOD))
def test_hostile_files(tmp_path_factory, content):
  folder = tmp_path_factory.mktemp("hostile")
  write(folder, "[]")
  (folder / "train" / "train_00.json").write_bytes(content)
  hostile_json.read(read_split, folder, "train")


def test_the_threshold_and_the_quarantine(tmp_path):
  bad = [record(turn(user_id=3)), record(turn(None)), record(turn(user_id=4))]
  write(tmp_path, [record() for _ in range(57)] + bad)
  quarantine = records.Quarantine(tmp_path / "quarantine.jsonl")
  dialogues, coverage = read_split(
    tmp_path, "train", quarantine=quarantine, max_broken=0.05
  )
  assert len(dialogues) == 57
  assert coverage.reasons == (
    ("user_id is not 0 or 1", 2),
    ("message is not a text", 1),
  )
  write(tmp_path, [record(turn(user_id=3))], name="train_01.json")
  with pytest.raises(ValueError) as caught:
    read_split(tmp_path, "train", quarantine=quarantine)
  assert str(caught.value) == (
    f"4 of 61 records of the train split of {tmp_path} cannot be used, more "
    "than max_broken=0.05 allows: 3 times user_id is not 0 or 1; 1 times "
    "message is not a text."
  )
  # What stopped the run is written down before it stops.
  rows = [json.loads(r) for r in quarantine.path.read_text().splitlines()]
  assert [(r["file"], r["position"], r["reason"]) for r in rows] == [
    (f"{tmp_path}/train/train_00.json", "record 57", "user_id is not 0 or 1"),
    (f"{tmp_path}/train/train_00.json", "record 58", "message is not a text"),
    (f"{tmp_path}/train/train_00.json", "record 59", "user_id is not 0 or 1"),
    (f"{tmp_path}/train/train_01.json", "record 0", "user_id is not 0 or 1"),
  ]
  assert rows[0]["excerpt"] == json.dumps(record(turn(user_id=3)))[:200]
  assert rows[0]["value"] == "3"


def test_captions_written_by_a_model(tmp_path):
  write(tmp_path, [record(), record(photo_id="t/2")])
  (tmp_path / "photo_captions.jsonl").write_text(
    json.dumps({"photo_id": "train/01ab", "caption": "a dog by a tree"})
    + "\nhalf a li"
  )
  dialogues, coverage = read_split(tmp_path, "train", "written")
  captions = [d.turns[1].photo.caption for d in dialogues]
  assert captions == ["a dog by a tree", None]
  assert coverage.captions_missing == 1
  assert coverage.broken == (
    "photo_captions.jsonl line 2: the line is no JSON",
  )


def test_where_photos_can_be_fetched(tmp_path):
  own = turn("", True, photo_id="a/b", photo_url="https://x/own")
  other = turn("", True, photo_id="a/c")
  write(tmp_path, [record(own, other, turn("", True), photo_url="https://x/r")])
  [dialogue], _ = read_split(tmp_path, "train")
  assert [t.photo.url for t in dialogue.turns] == [
    "https://x/own",
    "",
    "https://x/r",
  ]
