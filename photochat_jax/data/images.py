"""Opens photos that cannot be trusted and brings them to a model's size.

Photos fetched from the web are, now and then, web pages, empty, cut short,
turned by an EXIF flag, 16-bit, CMYK or enormous. Each becomes plain RGB or one
`ImageError`.
"""

import contextlib
import io

import numpy as np
from etils import epath
from PIL import Image, ImageOps

MAX_PIXELS = 80_000_000
"""Photos with more pixels are refused before they are decoded."""

CROP_SCALE = (0.8, 1.0)
"""Sides of a random crop, in shorter sides of its photo."""

# A photo that random crops are taken from: the middle of a longer one.
_ROOMY_ASPECT = 2

_LONG = 64  # Photos longer than that, in widths, are not resized as a whole.

# Formats with a decoder that only decodes: EPS, say, starts a program.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")


class ImageError(ValueError):
  """A file is no photo, or none that can be used."""


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
  """Any mode to RGB; what is transparent becomes white."""
  if image.mode == "RGB" and "transparency" not in image.info:
    return image
  if image.mode.startswith("I"):
    # 16-bit grey, which `convert` would clip at 255.
    grey = np.asarray(image).astype(np.int64)
    return Image.fromarray(
      np.clip(grey // 257, 0, 255).astype(np.uint8)
    ).convert("RGB")
  if image.mode == "F":
    raise ImageError(f"{name} has pixels of floating point: save it as PNG.")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
  return image.convert("RGB")


def decode(data: bytes, name: str = "The photo") -> Image.Image:
  """Decodes a photo: upright, RGB, of several frames the first.

  Args:
    data: the content of a file.
    name: what error messages call it.

  Returns:
    An RGB image.

  Raises:
    ImageError: it is no photo, cut short, or larger than `MAX_PIXELS`.
  """
  if not data:
    raise ImageError(f"{name} is empty: fetch it again.")
  try:
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
  except Image.UnidentifiedImageError:
    raise ImageError(
      f"{name} is not a photo, it begins with {data[:12]!r}: fetch it again."
    ) from None
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
    raise ImageError(f"{name} is too large: {e}") from None
  except Exception as e:  # Broken headers raise all kinds of errors.
    raise ImageError(f"{name} has a broken header: {e}") from e
  width, height = image.size
  if width * height > MAX_PIXELS:
    raise ImageError(
      f"{name} has {width} x {height} pixels, more than {MAX_PIXELS}: make it "
      "smaller."
    )
  try:
    image.load()
  except Exception as e:  # Pillow's decoders raise all kinds of errors.
    raise ImageError(f"{name} is cut short or damaged: {e}") from e
  with contextlib.suppress(Exception):  # Damaged EXIF data, a sound photo.
    image = ImageOps.exif_transpose(image)
  return _to_rgb(image, name)


def _read(path: epath.PathLike) -> Image.Image:
  path = epath.Path(path)
  try:
    data = path.read_bytes()
  except OSError as e:
    raise ImageError(f"{path} cannot be read: {e}") from e
  return decode(data, str(path))


def crop_square(image: Image.Image, size: int) -> np.ndarray:
  """Brings the shorter side to `size`, bicubic, and keeps the middle square.

  As CLIP's image processor does. Of very long photos only the square is made,
  which is the same but for rounding, so that a line of 1 x 80,000,000 pixels
  costs nothing.

  Args:
    image: RGB.
    size: side of the result in pixels.

  Returns:
    uint8 [size, size, 3].
  """
  width, height = image.size
  short = min(width, height)
  wide, high = size * width // short, size * height // short
  left, top = (wide - size) // 2, (high - size) // 2
  if max(wide, high) <= _LONG * size:
    whole = image.resize((wide, high), Image.Resampling.BICUBIC)
    return np.asarray(whole.crop((left, top, left + size, top + size)))
  box = (
    left * width / wide,
    top * height / high,
    (left + size) * width / wide,
    (top + size) * height / high,
  )
  square = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
  return np.asarray(square)


def squeeze(image: Image.Image, size: int) -> np.ndarray:
  """Brings both sides to `size`, bicubic, as BLIP's image processor does.

  Args:
    image: RGB.
    size: side of the result in pixels.

  Returns:
    uint8 [size, size, 3].
  """
  return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def load_photo(path: epath.PathLike, size: int) -> np.ndarray:
  """Reads a photo that the generator learns to draw.

  Args:
    path: the file.
    size: side of the result in pixels.

  Returns:
    uint8 [size, size, 3], the middle square.

  Raises:
    ImageError: it cannot be read or used.
  """
  return crop_square(_read(path), size)


def load_roomy(path: epath.PathLike, size: int) -> np.ndarray:
  """Reads a photo that squares of a side of `size` will be cut out of.

  Its shorter side is such that the smallest crop of `CROP_SCALE` has `size`
  pixels, or the photo's own where that is less; of a photo more than twice as
  long as wide, it is the middle.

  Args:
    path: the file.
    size: side of the squares in pixels.

  Returns:
    uint8 [height, width, 3].

  Raises:
    ImageError: it cannot be read or used.
  """
  image = _read(path)
  width, height = image.size
  short = min(width, height)
  wide, high = (min(side, _ROOMY_ASPECT * short) for side in image.size)
  left, top = (width - wide) / 2, (height - high) / 2
  scale = min(size / CROP_SCALE[0] / short, 1)
  shape = (max(round(wide * scale), 1), max(round(high * scale), 1))
  box = (left, top, left + wide, top + high)
  return np.asarray(image.resize(shape, Image.Resampling.BICUBIC, box=box))


def crop_at(
  pixels: np.ndarray, size: int, scale: float, x: float, y: float
) -> np.ndarray:
  """Cuts a square out of a photo and resizes it, bicubic.

  Args:
    pixels: uint8 [height, width, 3].
    size: side of the result in pixels.
    scale: side of the square, in shorter sides of the photo.
    x: where it stands, from 0, at the left, to 1, at the right.
    y: likewise from 0, at the top.

  Returns:
    uint8 [size, size, 3].
  """
  height, width = pixels.shape[:2]
  side = scale * min(height, width)
  left, top = x * (width - side), y * (height - side)
  box = (left, top, min(left + side, width), min(top + side, height))
  square = Image.fromarray(pixels).resize(
    (size, size), Image.Resampling.BICUBIC, box=box
  )
  return np.asarray(square)


def load_vision(
  path: epath.PathLike, size: int, crop: bool = False
) -> np.ndarray:
  """Reads a photo that the model sees.

  Args:
    path: the file.
    size: side of the result in pixels.
    crop: keep the middle square, as CLIP does; BLIP squeezes all of it in.

  Returns:
    uint8 [size, size, 3]; `models.vit.normalise` brings it to the ViT's range.

  Raises:
    ImageError: it cannot be read or used.
  """
  image = _read(path)
  return crop_square(image, size) if crop else squeeze(image, size)
