"""Opening photos: real ones, odd ones, hostile ones."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from photochat_jax.data import images
from photochat_jax.data.images import ImageError, decode


def gradient(width=40, height=30):
  """A photo without symmetry, uint8 [height, width, 3]."""
  y, x = np.mgrid[:height, :width]
  return np.stack(
    [255 * x // width, 255 * y // height, (3 * x + 5 * y) // 2 % 256], -1
  ).astype(np.uint8)


def encode(image, form="PNG", **options):
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  buffer = io.BytesIO()
  image.save(buffer, form, **options)
  return buffer.getvalue()


def png_header(width, height):
  """A PNG that claims a size and holds no pixels."""

  def chunk(name, data):
    return (
      struct.pack(">I", len(data))
      + name
      + data
      + struct.pack(">I", zlib.crc32(name + data))
    )

  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(b""))
    + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "camera"])
def test_real_photographs(tmp_path, name):
  data = pytest.importorskip("skimage.data")
  photo = getattr(data, name)()
  path = tmp_path / f"{name}.jpg"
  path.write_bytes(encode(photo, "JPEG", quality=95))
  for load in (images.load_photo, images.load_vision):
    small = load(path, 64)
    assert small.shape == (64, 64, 3)
    assert small.dtype == np.uint8
  # The middle square's mean colour survives JPEG and resizing.
  height, width = photo.shape[:2]
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  middle = photo[top : top + side, left : left + side].reshape(side * side, -1)
  mean = images.load_photo(path, 64).reshape(-1, 3).mean(0)
  np.testing.assert_allclose(mean - middle.mean(0), 0, atol=1.5)


def test_squeeze_equals_blip():
  transformers = pytest.importorskip("transformers")
  theirs = transformers.BlipImageProcessorPil(
    size={"height": 24, "width": 24}, do_rescale=False, do_normalize=False
  )
  photo = gradient(61, 40)
  expected = theirs(photo, return_tensors="np")["pixel_values"][0]
  np.testing.assert_array_equal(
    images.squeeze(Image.fromarray(photo), 24), expected.transpose(1, 2, 0)
  )


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (33, 33), (20, 15)])
def test_crop_equals_clip(size):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.CLIPImageProcessorPil(
    size={"shortest_edge": 24},
    crop_size={"height": 24, "width": 24},
    do_rescale=False,
    do_normalize=False,
  )
  photo = gradient(*size)
  expected = theirs(photo, return_tensors="np")["pixel_values"][0]
  ours = images.crop_square(Image.fromarray(photo), 24).astype(int)
  # Pillow may take the two directions in another order, and rounds between.
  assert np.abs(ours - expected.transpose(1, 2, 0)).max() <= 1


def test_load_vision_crops_when_told(tmp_path):
  path = tmp_path / "photo.png"
  path.write_bytes(encode(gradient()))
  photo = Image.fromarray(gradient())
  np.testing.assert_array_equal(
    images.load_vision(path, 16), images.squeeze(photo, 16)
  )
  np.testing.assert_array_equal(
    images.load_vision(path, 16, crop=True), images.load_photo(path, 16)
  )


def test_a_long_line_costs_nothing():
  line = Image.new("RGB", (200_000, 2), "red")
  assert (images.crop_square(line, 64) == (255, 0, 0)).all()


TURNS = {
  1: lambda a: a,
  2: lambda a: a[:, ::-1],
  3: lambda a: a[::-1, ::-1],
  4: lambda a: a[::-1],
  5: lambda a: a.transpose(1, 0, 2),
  6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
  7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
  8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  upright = np.asarray(decode(encode(gradient(), exif=exif)))
  np.testing.assert_array_equal(upright, TURNS[orientation](gradient()))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_ignored():
  data = encode(
    gradient(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage"
  )
  assert decode(data).size == (40, 30)


def odd_modes():
  photo = Image.fromarray(gradient())
  clear = photo.convert("RGBA")
  clear.putalpha(0)
  see_through = photo.convert("P")
  see_through.info["transparency"] = 0
  deep = np.full((30, 40), 0x8080, np.uint16)
  return {
    "1": (photo.convert("1"), "PNG", None),
    "L": (photo.convert("L"), "PNG", None),
    "P": (photo.convert("P"), "PNG", None),
    "transparent P": (see_through, "PNG", None),
    "LA": (photo.convert("LA"), "PNG", None),
    "transparent RGBA": (clear, "PNG", (255, 255, 255)),
    "CMYK": (Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "JPEG", None),
    "16-bit grey": (Image.fromarray(deep), "PNG", (128, 128, 128)),
    "32-bit grey": (Image.fromarray(deep.astype(np.int32)), "TIFF",
                    (128, 128, 128)),
    "GIF": (Image.new("RGB", (40, 30), "blue"), "GIF", (0, 0, 255)),
    "WebP": (Image.new("RGB", (40, 30), "white"), "WEBP", (255, 255, 255)),
    "LAB": (Image.new("LAB", (40, 30), (255, 128, 128)), "TIFF", None),
  }  # fmt: skip


@pytest.mark.parametrize("mode", odd_modes())
def test_odd_modes(mode):
  image, form, colour = odd_modes()[mode]
  photo = decode(encode(image, form))
  assert (photo.mode, photo.size) == ("RGB", (40, 30))
  if colour is not None:
    assert (np.asarray(photo) == colour).all()


def test_colours_of_cmyk():
  image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
  red = np.asarray(decode(encode(image, "JPEG", quality=100))).astype(int)
  assert (np.abs(red - (254, 0, 0)) <= 3).all()


def test_first_frame_of_several():
  frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
  for form in ("GIF", "WEBP"):
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(
      frames[0], form, save_all=True, append_images=frames[1:], **options
    )
    assert (np.asarray(decode(data)) == (255, 0, 0)).all()


def test_floating_point_is_refused():
  data = encode(Image.new("F", (4, 4)), "TIFF")
  with pytest.raises(ImageError, match="floating point"):
    decode(data)


@pytest.mark.parametrize(
  ("data", "reason"),
  [
    (b"", "is empty"),
    (b"<!DOCTYPE html><html></html>", "is not a photo, it begins with"),
    (b"\xff\xd8\xff", "is not a photo"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a photo"),
    (encode(gradient(), "JPEG")[:-100], "is cut short or damaged"),
    (encode(gradient())[:-40], "is cut short or damaged"),
    (png_header(50_000, 50_000), "too large"),
    (png_header(12_000, 12_000), "too large|more than"),
    (png_header(9_001, 9_001), "9001 x 9001 pixels, more than"),
    (png_header(40, 30), "is cut short or damaged"),
  ],
)
@pytest.mark.filterwarnings("error")
def test_no_photo(tmp_path, data, reason):
  path = tmp_path / "bad.jpg"
  path.write_bytes(data)
  for load in (images.load_photo, images.load_vision):
    with pytest.raises(ImageError, match=f"bad.jpg.*({reason})"):
      load(path, 16)


def test_no_file(tmp_path):
  with pytest.raises(ImageError, match="cannot be read"):
    images.load_photo(tmp_path / "none.jpg", 16)
  with pytest.raises(ImageError, match="cannot be read"):
    images.load_photo(tmp_path, 16)


BYTES = [encode(gradient(), form) for form in ("JPEG", "PNG", "GIF", "WEBP")]
BYTES.append(encode(gradient(), "TIFF", compression="tiff_lzw"))


@settings(max_examples=300, deadline=None)
@pytest.mark.filterwarnings("ignore")
@given(
  data=st.sampled_from(BYTES),
  cut=st.integers(0, 5000),
  damage=st.dictionaries(st.integers(0, 5000), st.integers(0, 255), max_size=8),
)
def test_hostile_bytes(data, cut, damage):
  data = bytearray(data[:cut])
  for place, value in damage.items():
    if place < len(data):
      data[place] = value
  try:
    photo = decode(bytes(data))
  except ImageError:
    return
  assert photo.mode == "RGB"
  assert images.crop_square(photo, 8).shape == (8, 8, 3)
