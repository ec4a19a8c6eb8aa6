"""Photos of batches: what is random about them, and what stands in for them."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from photochat_jax.data import (
  images,
  loading,
  moments,
  moments_files,
  packing,
)
from photochat_jax.data.schema import Photo
from photochat_jax.data.spec import DataSpec, element_spec

SPEC = DataSpec(
  batch_size=4,
  length=20,
  photos_in=2,
  photos_out=2,
  num_visual_tokens=2,
  vision_size=8,
  photo_size=16,
)
CROPPED = dataclasses.replace(SPEC, crop=True)


def ramp(path, width=80, height=40):
  """A photo whose red is x and green is y, in pixels times 3."""
  x, y = np.meshgrid(np.arange(width), np.arange(height))
  pixels = np.stack([3 * x, 3 * y, 0 * x], axis=-1).astype(np.uint8)
  Image.fromarray(pixels).save(path)
  return Photo("p", "", "a ramp", str(path))


def loader(spec=CROPPED, seed=0, **options):
  cache = options.pop("cache", None) or loading.PhotoCache()
  return loading.Loader(spec, (seed, 7), cache, **options)


def square(pixels):
  """Side and left upper corner of the square of a ramp that pixels show."""
  # Straight lines through the middle, where resizing knows both neighbours.
  inside = np.arange(3, 13)
  slope, left = np.polyfit(inside + 0.5, pixels[8, inside, 0] / 3 + 0.5, 1)
  _, top = np.polyfit(inside + 0.5, pixels[inside, 8, 1] / 3 + 0.5, 1)
  return 16 * slope, left, top


def test_crops_are_squares_of_the_stated_size_anywhere_in_the_photo(tmp_path):
  photo = ramp(tmp_path / "ramp.png")
  source = loader()
  found = np.array(
    [square(source.drawn(photo, 0, step)) for step in range(200)]
  )
  side, left, top = found.T
  low, high = images.CROP_SCALE
  assert (side > low * 40 - 1).all() and (side < high * 40 + 1).all()
  assert side.max() - side.min() > 0.8 * (high - low) * 40
  # The whole width is drawn on, not only the middle square of it.
  assert (left > -1.5).all() and (left + side < 80 + 1.5).all()
  assert left.min() < 3 and (left + side).max() > 77
  assert (top > -1.5).all() and (top + side < 40 + 1.5).all()


def test_a_crop_is_keyed_by_seed_step_and_photo(tmp_path):
  photo = ramp(tmp_path / "ramp.png")
  spec = dataclasses.replace(CROPPED, augment=True)
  one = loader(spec).drawn(photo, 3, 11)
  assert one.shape == (16, 16, 3) and one.dtype == np.uint8
  # Another loader, with a photo decoded anew: another host, or a restart.
  cold = loading.PhotoCache(max_bytes=0)
  again = loader(spec, cache=cold)
  again.drawn(photo, 4, 5)
  np.testing.assert_array_equal(again.drawn(photo, 3, 11), one)
  for seed, number, step in ((0, 4, 11), (0, 3, 12), (1, 3, 11)):
    other = loader(spec, seed=seed).drawn(photo, number, step)
    assert (other != one).any()


def test_crops_flip_as_the_eyes_do_and_the_eyes_see_all(tmp_path):
  photo = ramp(tmp_path / "ramp.png")
  both = loader(dataclasses.replace(CROPPED, augment=True))
  plain, cropped = loader(SPEC), loader(CROPPED)
  flips = 0
  for step in range(40):
    seen, whole = both.seen(photo, 2, step), plain.seen(photo, 2, step)
    drawn, crop = both.drawn(photo, 2, step), cropped.drawn(photo, 2, step)
    flipped = (seen == whole[:, ::-1]).all()
    assert flipped or (seen == whole).all()
    # Whether it flips says nothing of where it is cut.
    np.testing.assert_array_equal(drawn, crop[:, ::-1] if flipped else crop)
    flips += flipped
  assert 8 < flips < 32
  np.testing.assert_array_equal(
    plain.drawn(photo, 2, 0), images.load_photo(photo.path, 16)
  )


def test_a_very_long_photo_costs_little(tmp_path):
  photo = ramp(tmp_path / "long.png", width=4000, height=20)
  pixels = images.load_roomy(photo.path, 16)
  assert pixels.shape == (20, 40, 3)  # 16 / 0.8 high, twice as wide
  assert loader().drawn(photo, 0, 0).shape == (16, 16, 3)


def test_a_broken_file_is_named_once_for_all_its_uses(tmp_path):
  path = tmp_path / "page.jpg"
  path.write_text("<html>")
  photo = Photo("p", "", None, str(path))
  source = loader()
  assert source.seen(photo, 0, 0) is None
  assert source.drawn(photo, 0, 0) is None
  assert list(source.broken) == ["p"]
  assert "is not a photo" in source.broken["p"]


def test_a_full_cache_keeps_the_first_photos(tmp_path, monkeypatch):
  loads = []

  def load(path, size):
    loads.append(path)
    return np.zeros((size, size, 3), np.uint8)

  cache = loading.PhotoCache(max_bytes=2 * 4 * 4 * 3)
  photos = [Photo(i, "", None, f"{i}.jpg") for i in "abc"]
  for _ in range(3):
    for photo in photos:
      assert cache.get(photo, load, 4).shape == (4, 4, 3)
  assert [path[0] for path in loads] == ["a", "b", "c", "c", "c"]


def store(tmp_path, photos):
  """A store of moments that are the photo's number, negative if mirrored."""
  about = moments_files.About("moments", "w" * 64, "t", (2, 2, 4))
  with moments_files.Writer(tmp_path, about) as writer:
    for number, (photo_id, size) in enumerate(photos.items(), start=1):
      array = np.full((2, 2, 4), number, np.float16)
      facts = moments_files.FileFacts(size, "0" * 64)
      writer.add(photo_id, facts, array, -array)
  return moments.open_store(tmp_path)


def test_moments_take_the_place_of_pixels(tmp_path):
  photo = ramp(tmp_path / "ramp.png")
  size = (tmp_path / "ramp.png").stat().st_size
  opened = store(tmp_path / "store", {"p": size, "q": size + 1})
  paths = dict.fromkeys("pqr", photo.path)
  found = loading.Moments(opened, paths)
  # Of q another file was encoded, of r none.
  assert (found.missing, found.changed) == (("r",), ("q",))
  spec = dataclasses.replace(SPEC, moments=(2, 2, 4), augment=True)
  source = loader(spec, precomputed=found)
  assert source.target == "moments"
  plain = loader(dataclasses.replace(SPEC, augment=True))
  middle = images.load_photo(photo.path, 16)
  for step in range(12):
    flipped = (plain.drawn(photo, 5, step) != middle).any()
    array = source.drawn(photo, 5, step)
    assert (array == (-1 if flipped else 1)).all()
  for name in "qr":
    other = dataclasses.replace(photo, id=name)
    assert source.drawn(other, 0, 0) is None
  assert source.drawn(dataclasses.replace(photo, path=None), 0, 0) is None
  shape, dtype = element_spec(spec, "dialogues", 8)["moments"]
  assert shape == (2, 2, 2, 4) and dtype == np.float32
  assert "photos_out" not in element_spec(spec, "dialogues", 8)


def test_a_damaged_record_is_masked_and_named(tmp_path):
  photo = ramp(tmp_path / "ramp.png")
  size = (tmp_path / "ramp.png").stat().st_size
  opened = store(tmp_path / "store", {"p": size})
  (shard,) = (tmp_path / "store" / "moments").glob("*.array_record")
  content = bytearray(shard.read_bytes())
  at = content.find(np.full(4, 1, np.float16).tobytes())
  content[at : at + 2] = b"xx"
  shard.write_bytes(content)
  spec = dataclasses.replace(SPEC, moments=(2, 2, 4))
  source = loader(
    spec, precomputed=loading.Moments(opened, {"p": photo.path})
  )
  assert source.drawn(photo, 0, 0) is None
  assert "damaged" in source.broken["p"]


def test_moments_need_a_store_and_no_crops():
  spec = dataclasses.replace(CROPPED, moments=(2, 2, 4))
  with pytest.raises(ValueError, match="need a store"):
    loader(spec, precomputed=object())
  with pytest.raises(ValueError, match="need a store"):
    loader(dataclasses.replace(spec, crop=False))


def test_random_bits_are_those_of_the_bit_generator():
  # The first bit of a crop's key is a flip's: they must not move apart.
  four = packing.random_bits(4, 1, 2, 3)
  assert four[0] == packing.random_bits(1, 1, 2, 3)[0]
  assert json.dumps(four.tolist()) == json.dumps(
    np.random.PCG64(np.random.SeedSequence((1, 2, 3))).random_raw(4).tolist()
  )
