"""Captions for photos: the file, what is skipped, what is named."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from photochat_jax import caption
from photochat_jax.captioners import CaptionError, Written
from photochat_jax.data.schema import Photo


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
  assert "7 captions written in 0:00:0" in str(summary)
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
      said = super().write(ids, photos)
      return [Written(" \n", False) if "10" in w.text else w for w in said]

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


def test_a_disk_that_is_full(photos, tmp_path):
  resource = pytest.importorskip("resource")
  path = tmp_path / caption.FILE
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
  try:
    with pytest.raises(CaptionError, match="has room, then run this again"):
      caption.caption_photos(photos, Fake(), path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert path.stat().st_size == 500 and path.read_bytes()[-1:] != b"\n"
  summary = caption.caption_photos(photos, Fake(), path)
  assert summary.had and summary.had + summary.written == 7
  assert [row["photo_id"] for row in rows_of(path)] == [p.id for p in photos]
