"""Where photos are, by a manifest that may be damaged or hostile."""

import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photochat_jax.data import photo_store
from photochat_jax.data.photo_store import Row, Writer


def put(folder, name, data=b"data"):
  file = folder / "photos" / name
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_bytes(data)
  return file


def write_rows(folder, *lines):
  """Writes a manifest of rows, or of bytes as they are."""
  lines = [
    line if isinstance(line, bytes) else json.dumps(line).encode()
    for line in lines
  ]
  put(folder, "manifest.jsonl", b"\n".join(lines))


def ok(photo_id, file, **fields):
  return {"id": photo_id, "url": "", "status": "ok", "file": file, **fields}


def test_a_url_has_an_id_that_is_a_path():
  # printf %s https://a.b/c.jpg | sha256sum | cut -c -32
  expected = "url/63136aa0507ba9d8022bcce73bc5e891"
  assert photo_store.url_id("https://a.b/c.jpg") == expected


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "gif"])
def test_photos_put_there_by_hand_are_found(tmp_path, suffix):
  file = put(tmp_path, f"train/ab.{suffix}")
  found = photo_store.find(tmp_path, ["train/no", "train/ab", "other"])
  assert {i: pathlib.Path(p) for i, p in found.items()} == {"train/ab": file}


def test_the_order_is_that_of_the_question(tmp_path):
  for name in ("b", "a", "d/c"):
    put(tmp_path, f"{name}.jpg")
  assert list(photo_store.find(tmp_path, ["d/c", "b", "a"])) == [
    "d/c",
    "b",
    "a",
  ]


def test_no_folder_no_photos(tmp_path):
  assert photo_store.find(tmp_path / "none", ["a"]) == {}
  assert photo_store.find(tmp_path, []) == {}


def test_the_manifest_comes_first_and_its_last_row_counts(tmp_path):
  put(tmp_path, "a.jpg")
  put(tmp_path, "b.jpg")
  first = put(tmp_path, "blobs/00/first.png")
  second = put(tmp_path, "blobs/00/second.png")
  write_rows(
    tmp_path,
    ok("a", "blobs/00/first.png"),
    ok("a", "blobs/00/second.png"),
    {"id": "b", "url": "", "status": "not_found"},
    ok("c", "blobs/00/first.png"),
    {"id": "c", "url": "", "status": "gone"},
    ok("d", "blobs/00/first.png"),
  )
  found = photo_store.find(tmp_path, ["a", "b", "c", "d"])
  assert {i: pathlib.Path(p) for i, p in found.items()} == {
    "a": second,
    "b": tmp_path / "photos" / "b.jpg",  # It was put there since.
    "d": first,
  }


def test_a_file_that_was_deleted_is_not_found(tmp_path):
  write_rows(tmp_path, ok("a", "blobs/00/none.jpg"), ok("b", "blobs/00/no.jpg"))
  put(tmp_path, "b.jpg")
  assert list(photo_store.find(tmp_path, ["a", "b"])) == ["b"]


DAMAGED = [
  b"{",
  b'{"id": "a", "url": "", "status": "ok", "fi',
  b"\xff\xfe\x00",
  b"[1, 2]",
  b"null",
  b'"text"',
  b"7",
  b"[" * 100_000,
  b"{}",
  b'{"id": 3, "url": "", "status": "ok"}',
  b'{"id": "a", "url": null, "status": "ok"}',
  b'{"id": "a", "url": "", "status": ["ok"]}',
  b'{"id": "a", "url": "", "status": "gone", "bytes": true}',
  b'{"id": "a", "url": "", "status": "gone", "bytes": 1.5}',
]
OUTSIDE = [
  "../secret.jpg",
  "/etc/passwd",
  "blobs/../../secret.jpg",
  "./a.jpg",
  "blobs//a.jpg",
  "blobs\\..\\a.jpg",
  "blobs/a\0.jpg",
  "",
  "..",
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_left_out_and_counted(tmp_path, line):
  put(tmp_path, "blobs/00/a.jpg")
  write_rows(tmp_path, ok("a", "blobs/00/a.jpg"), line, ok("b", "blobs/00/b"))
  manifest = photo_store.read_manifest(tmp_path)
  assert manifest.damaged == 1
  assert list(manifest.rows) == ["a", "b"]
  assert list(photo_store.find(tmp_path, ["a"])) == ["a"]


@pytest.mark.parametrize("file", OUTSIDE)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, file):
  put(tmp_path, "secret.jpg")
  (tmp_path / "secret.jpg").write_bytes(b"secret")
  write_rows(tmp_path, ok("a", file))
  assert photo_store.read_manifest(tmp_path).damaged == 1
  assert photo_store.find(tmp_path, ["a"]) == {}


@pytest.mark.parametrize("photo_id", ["../secret", "/secret", "a/../../secret"])
def test_an_id_that_leaves_the_folder_is_not_found(tmp_path, photo_id):
  (tmp_path / "secret.jpg").write_bytes(b"secret")
  put(tmp_path, "a/b.jpg")
  assert photo_store.find(tmp_path, [photo_id]) == {}


def test_damaged_lines_are_told(tmp_path, caplog):
  write_rows(tmp_path, b"{", b"{")
  photo_store.find(tmp_path, ["a"])
  assert "2 damaged lines" in caplog.text


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(Row._fields) | st.text(), inner)
  ),
)


@given(JSON.map(lambda value: json.dumps(value).encode()) | st.binary())
def test_any_line_is_a_row_or_a_value_error(line):
  try:
    row = photo_store.parse(line)
  except ValueError:
    return
  assert isinstance(row.id, str)


def test_eleven_thousand_photos_take_a_listing_per_folder(
  tmp_path, monkeypatch
):
  rows = []
  for number in range(11_000):
    digest = f"{number % 256:02x}{number:062x}"
    rows.append(ok(f"train/{number:016x}", f"blobs/{digest[:2]}/{digest}.jpg"))
  write_rows(tmp_path, *rows)
  for row in rows[:512]:
    put(tmp_path, row["file"])
  questions = []
  path = type(photo_store.epath.Path(tmp_path))
  for name in ("exists", "is_dir", "iterdir", "stat", "is_file"):
    asked = getattr(path, name)

    def count(self, *args, asked=asked, **kwargs):
      questions.append(self)
      return asked(self, *args, **kwargs)

    monkeypatch.setattr(path, name, count)
  found = photo_store.find(tmp_path, [row["id"] for row in rows])
  assert len(found) == 512
  # The manifest, two for each of 256 folders, and one where it was put by hand.
  assert len(questions) <= 1 + 2 * 256 + 2


def test_what_is_written_is_read(tmp_path):
  with Writer(tmp_path) as writer:
    digest, name = writer.keep(b"abc", "jpg")
    row = Row(
      "a", "https://é.org/\ud800", "ok", digest, name, 3, 40, 30, "JPEG"
    )
    writer.append(row)
    writer.append(Row("b", "", "gone", detail="status 410"))
  # FIPS 180-2, appendix B.1.
  assert digest == (
    "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
  )
  assert name == f"blobs/ba/{digest}.jpg"
  (file,) = photo_store.find(tmp_path, ["a", "b"]).values()
  assert file.read_bytes() == b"abc"
  rows, damaged = photo_store.read_manifest(tmp_path)
  assert damaged == 0
  assert rows["a"] == row
  assert rows["b"].status == "gone"


def test_the_same_content_is_one_file(tmp_path):
  with Writer(tmp_path) as writer:
    first, second = writer.keep(b"abc", "jpg"), writer.keep(b"abc", "jpg")
  assert first == second
  assert len(list((tmp_path / "photos").rglob("*.jpg"))) == 1


def test_half_a_line_does_not_spoil_the_next(tmp_path):
  with Writer(tmp_path) as writer:
    writer.append(Row("a", "", "gone"))
    writer.append(Row("b", "", "gone"))
  manifest = tmp_path / "photos" / "manifest.jsonl"
  manifest.write_bytes(manifest.read_bytes()[:-5])
  put(tmp_path, "incoming/half", b"ha")
  with Writer(tmp_path) as writer:
    writer.append(Row("c", "", "gone"))
  rows, damaged = photo_store.read_manifest(tmp_path)
  assert list(rows) == ["a", "c"]
  assert damaged == 1
  assert list((tmp_path / "photos" / "incoming").iterdir()) == []


def test_one_process_writes_at_a_time(tmp_path):
  with Writer(tmp_path):
    with pytest.raises(photo_store.StoreError, match="Another process"):
      with Writer(tmp_path):
        pass
  with Writer(tmp_path) as writer:
    writer.append(Row("a", "", "gone"))


def test_a_bucket_is_refused():
  with pytest.raises(photo_store.StoreError, match="no local folder"):
    Writer("gs://bucket/data")
