"""What readers share: shapes of files, checks, captions, bad records."""

import json

import pytest
from etils import epath
from hostile_json import ODD_VALUES, odd_json
from hypothesis import given
from hypothesis import strategies as st

from photochat_jax.data import json_files, records, schema
from photochat_jax.data.json_files import Broken


def items(folder, content, name="a.json"):
  file = epath.Path(folder) / name
  file.write_bytes(content if isinstance(content, bytes) else content.encode())
  return [
    (position, "broken" if error else record)
    for position, record, error in json_files.read_items(file)
  ]


ONE_TWO = [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
  ("content", "word", "start"),
  [
    (json.dumps(ONE_TWO), "record", 0),
    (json.dumps(ONE_TWO, indent=2), "record", 0),
    ("\ufeff \n" + json.dumps(ONE_TWO) + "\n\n", "record", 0),
    (json.dumps({"data": ONE_TWO}), "record", 0),
    (json.dumps({"version": 1, "data": ONE_TWO}, indent=1), "record", 0),
    ('{"data": [\n{"a": 1},\n{"b": 2}\n]}', "record", 0),
    ('{"a": 1}\n{"b": 2}', "line", 1),
    ('\ufeff{"a": 1}\r\n{"b": 2}\r\n', "line", 1),
  ],
)
def test_shapes_of_files(tmp_path, content, word, start):
  assert items(tmp_path, content) == [
    (f"{word} {start}", {"a": 1}),
    (f"{word} {start + 1}", {"b": 2}),
  ]


def test_a_file_of_one_record(tmp_path):
  assert items(tmp_path, '{"a": 1}\n') == [("record 0", {"a": 1})]
  assert items(tmp_path, '{"data": []}') == items(tmp_path, " [ ]\n") == []
  assert items(tmp_path, '{"data": [\n{"a": 1}\n]}') == [("record 0", {"a": 1})]


def test_a_damaged_line_is_one_broken_record(tmp_path):
  deep = b"[" * 100_000
  content = b'{"a": 1}\n\n{"b": \n\xff\xfe\n[1] 2\n%b\n{"c": 3}' % deep
  assert items(tmp_path, content) == [
    ("line 1", {"a": 1}),
    ("line 3", "broken"),
    ("line 4", "broken"),
    ("line 5", "broken"),
    ("line 6", "broken"),
    ("line 7", {"c": 3}),
  ]
  # The first as well, where the next one shows what the file is.
  assert items(tmp_path, b'{"a"\n{"b": 2}\n') == [
    ("line 1", "broken"),
    ("line 2", {"b": 2}),
  ]


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"\n\n",
    b"not json",
    b"<html>\n<body>\n",
    b'[{"a": 1}, {"b"',
    b'[{"a": 1} {"b": 2}]',
    b'[{"a": 1},]',
    b"[1] [2]",
    b'{"data": [1',
    b'{"data": [1]} {"data": [2]}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\xff\xfe[1]",
  ],
)
def test_a_file_that_is_no_json(tmp_path, content):
  with pytest.raises(ValueError, match=r"a\.json is not JSON \(.*\): fetch it"):
    items(tmp_path, content)


@pytest.mark.parametrize("content", ["3", "null", "{}", '{"data": 3}', '"a"'])
def test_a_file_that_is_no_list(tmp_path, content):
  with pytest.raises(ValueError, match=r"a\.json is not a list of dialogues\."):
    items(tmp_path, content)


def test_a_file_that_cannot_be_opened(tmp_path):
  (tmp_path / "a.json").mkdir()
  with pytest.raises(ValueError, match=r"a\.json cannot be read \(.*\)\."):
    list(json_files.read_items(epath.Path(tmp_path / "a.json")))


def test_numbers_that_python_refuses(tmp_path):
  # int() of more than 4,300 digits is an error; the record is not lost for it.
  long = "9" * 5000
  assert items(tmp_path, f'[{{"a": {long}}}, 1]') == [
    ("record 0", {"a": float("inf")}),
    ("record 1", 1),
  ]
  assert items(tmp_path, f'{{"a": {long}}}\n{{"b": -{long}}}') == [
    ("line 1", {"a": float("inf")}),
    ("line 2", {"b": -float("inf")}),
  ]


json_lists = st.lists(odd_json(["a", "b", "data"]), max_size=4)


@given(values=json_lists, indent=st.sampled_from([None, 0, 2]))
def test_lists_are_read_as_json_reads_them(tmp_path_factory, values, indent):
  folder = tmp_path_factory.getbasetemp()
  text = json.dumps(values, indent=indent)
  found = [record for _, record in items(folder, text)]
  assert json.dumps(found) == json.dumps(json.loads(text))


def test_files_of_a_split(tmp_path):
  folder = epath.Path(tmp_path)

  def names(split):
    found = json_files.find_files(folder, split)
    return [f.relative_to(folder).as_posix() for f in found]

  assert names("train") == names("dev") == names("other") == []
  (tmp_path / "train").mkdir()
  for name in ("train/b.json", "train/a.jsonl", "train/c.txt", "val.jsonl"):
    (tmp_path / name).touch()
  assert names("train") == ["train/a.jsonl", "train/b.json"]
  assert names("dev") == ["val.jsonl"]
  (tmp_path / "valid.json").touch()
  (tmp_path / "train.json").touch()
  assert names("dev") == ["valid.json"]
  assert names("train") == ["train.json"]


@pytest.mark.parametrize(
  ("check", "bad", "reason"),
  [
    (records.check_text, None, "x is not a text"),
    (records.check_photo_id, 3, "x is not a text"),
    (records.check_photo_id, "", "x is no path below photos/"),
    (records.check_photo_id, "a/../b", "x is no path below photos/"),
    (records.check_photo_id, "a" * 251, "x is no path below photos/"),
    (records.check_photo_id, "é" * 126, "x is no path below photos/"),
    (records.check_photo_id, "a/" * 500 + "b", "x is no path below photos/"),
    (records.check_id, True, "x is not a number or a text"),
    (records.check_id, 1.0, "x is not a number or a text"),
    (records.check_id, "", "x has not 1 to 200 characters"),
    (records.check_id, 10**200, "x has not 1 to 200 characters"),
    (records.check_object, [], "x is not an object"),
  ],
)
def test_checks(check, bad, reason):
  with pytest.raises(Broken) as caught:
    check(bad, "x")
  assert caught.value.reason == reason
  assert str(caught.value).startswith(f"{reason}: ")


def test_what_passes_the_checks():
  assert records.check_text("é\ud83d!", "x") == "é?!"
  assert records.check_photo_id("a/b.c/" + "d" * 250) == "a/b.c/" + "d" * 250
  assert records.check_id(0, "x") == records.check_id("0", "x") == "0"


def nested(depth):
  value = []
  for _ in range(depth):
    value = [value]
  return value


@given(value=st.one_of(ODD_VALUES, odd_json(["a"]), st.just(nested(50_000))))
def test_any_value_can_be_told(value):
  told = str(Broken("x", value))
  assert len(told) < 500
  told.encode()
  assert len(json_files.excerpt(value)) <= 200


def test_excerpts():
  assert json_files.excerpt({"a": ["é", 1]}) == r'{"a": ["\u00e9", 1]}'
  assert json_files.excerpt({"a": "b" * 999}) == '{"a": "' + "b" * 193
  assert json_files.excerpt("é\n".encode() * 300) == "é\n" * 100
  assert json_files.excerpt(b"\xff{") == "\ufffd{"


def row(number=0, reason="user_id is not 0 or 1"):
  return records.Row("/d/train/a.json", f"record {number}", reason, "7", '{"a')


def test_quarantine(tmp_path):
  path = tmp_path / "run" / "quarantine.jsonl"
  quarantine = records.Quarantine(path)
  quarantine.add([])
  assert not path.exists()
  quarantine.add([row(0), row(1)])
  quarantine.add([row(2, "x is not a text"), row(1)])  # One split read twice.
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert lines == [
    {
      "file": "/d/train/a.json",
      "position": f"record {number}",
      "reason": reason,
      "value": "7",
      "excerpt": '{"a',
    }
    for number, reason in (
      (0, "user_id is not 0 or 1"),
      (1, "user_id is not 0 or 1"),
      (2, "x is not a text"),
    )
  ]
  assert list(quarantine.counts().items()) == [
    ("user_id is not 0 or 1", 2),
    ("x is not a text", 1),
  ]
  # The next run leaves out nothing: what the last one left is no longer true.
  records.Quarantine(path).add([])
  assert not path.exists()


def test_the_threshold():
  reasons = {"a": 1, "b": 3, "c": 2, "d": 1, "e": 1}
  records.check(reasons, 8, 1.0)
  records.check(reasons, 16, 0.5)
  records.check({}, 0, 0.0)
  with pytest.raises(ValueError) as caught:
    records.check(reasons, 15, 0.5, "of x ")
  assert str(caught.value) == (
    "8 of 15 records of x cannot be used, more than max_broken=0.5 allows: "
    "3 times b; 2 times c; 1 times a; and 2 more reasons."
  )


@pytest.mark.parametrize(
  ("source", "caption"),
  [
    ("given", "a dog"),
    ("labels", "Dog, Tree"),
    ("description", "The photo has Rex. Objects in the photo: Dog, Tree"),
    ("written", "a dog runs"),
  ],
)
def test_caption_sources(tmp_path, source, caption):
  (tmp_path / "photo_captions.jsonl").write_text(
    '{"photo_id": "a/1", "caption": "old"}\n'
    '{"photo_id": "a/2", "caption": "of another"}\n'
    '{"photo_id": "a/1", "caption": " a dog runs\\n", "model": "m"}\n'
  )
  captions = records.Captions(source, tmp_path)
  description = "The photo has Rex. Objects in the photo: Dog, Tree "
  assert captions("a/1", " a dog ", description) == caption
  assert captions("a/3", None, " ") is None
  assert captions.rows == []


def test_bad_rows_of_written_captions(tmp_path):
  file = tmp_path / "photo_captions.jsonl"
  file.write_text(
    '{"photo_id": "a", "caption": "one"}\n'
    '{"photo_id": "../b", "caption": "two"}\n'
    '{"photo_id": "c", "caption": null}\n'
    '{"photo_id": "a", "cap'  # The machine died here.
  )
  captions = records.Captions("written", tmp_path)
  assert captions("a", None, "") == "one"
  assert captions("c", None, "") is None
  assert [(r.position, r.reason) for r in captions.rows] == [
    ("line 2", "photo_id is no path below photos/"),
    ("line 3", "caption is not a text"),
    ("line 4", "the line is no JSON"),
  ]
  file.write_text("")
  assert records.Captions("written", tmp_path)("a", None, "") is None


def test_captions_that_are_not_there(tmp_path):
  with pytest.raises(ValueError, match="given, labels, description, written"):
    records.Captions("guess", tmp_path)
  with pytest.raises(ValueError, match=r"no .*photo_captions.*caption_photos"):
    records.Captions("written", tmp_path)


def test_ids_stay_unique(tmp_path):
  file = epath.Path(tmp_path) / "a.json"
  names = ["x", "x (a.json record 2)", "x", "x"]
  file.write_text(json.dumps(names))

  def read_record(name):
    return schema.Dialogue(name, "train", (schema.Turn(0, "hi"),))

  read = records.read_records([file], read_record)
  assert [d.id for d in read.dialogues] == [
    "x",
    "x (a.json record 2)",
    "x (a.json record 2)+",
    "x (a.json record 3)",
  ]


def test_reports_tell_reasons_by_number():
  coverage = schema.Coverage(
    "dev", 3, 2, 1, 0, ("a",), ("l1", "l2", "l3"), (("b", 2), ("c", 1))
  )
  assert str(coverage).splitlines() == [
    "dev: 3 dialogues, 1 of 2 photos found, 0 photos shared without a "
    "caption, 3 records left out",
    "  left out 2 times: b",
    "  left out 1 times: c",
    "  missing: a",
    "  left out: l1",
    "  left out: l2",
    "  left out: l3",
  ]
