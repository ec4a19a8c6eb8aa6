"""Photos for batches: decoded or precomputed, and changed at random.

What is random about a photo is keyed by (seed, stage, step, example, photo),
so that it depends neither on the host nor on the place in a batch:

  flip  half of the photos are mirrored, for the eyes and for the generator
  crop  the generator's photo is a square of 0.8 to 1 of the shorter side,
        anywhere in the photo; the eyes get all of it, squeezed, as BLIP does
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from photochat_jax.data import images, moments, packing, schema
from photochat_jax.data.spec import DataSpec

# Decoded photos that are kept in memory, in bytes of pixels.
PHOTO_CACHE_BYTES = 2 << 30

_NAMED = 20  # Broken photos that are named in the log.


class PhotoCache:
  """Decoded photos, kept while there is room; the first ones stay.

  Attributes:
    broken: path of each file that is no photo -> why.
  """

  def __init__(self, max_bytes: int = PHOTO_CACHE_BYTES):
    self.broken: dict[str, str] = {}
    self._room = max_bytes
    self._photos: dict[tuple, np.ndarray] = {}
    self._lock = threading.Lock()

  def get(
    self, photo: schema.Photo, load: Callable, size: int
  ) -> np.ndarray | None:
    """What `load(path, size)` gives, or None for a file that is no photo."""
    path = str(photo.path)
    key = (path, load.__name__, size)
    if path in self.broken:
      return None
    if key in self._photos:
      return self._photos[key]
    try:
      pixels = load(photo.path, size)
    except images.ImageError as e:
      if len(self.broken) < _NAMED:
        logging.warning("Photo %s is left out: %s", photo.id, e)
      self.broken[path] = str(e)
      return None
    with self._lock:
      if key not in self._photos and pixels.nbytes <= self._room:
        self._room -= pixels.nbytes
        self._photos[key] = pixels
    return pixels


class Moments:
  """Precomputed moments of some photos, those that are there and current.

  Attributes:
    store: where they are.
    missing: ids of the photos that it does not have.
    changed: ids of those whose file is another one now.
  """

  def __init__(
    self, store: moments.Store, photos: Mapping[str, epath.PathLike]
  ):
    """Looks which of some photos, id -> file, can be had."""
    self.store = store
    self.missing = tuple(store.missing(photos))
    self.changed = tuple(store.changed(photos))
    self._absent = frozenset((*self.missing, *self.changed))

  def __contains__(self, photo_id: str) -> bool:
    return photo_id in self.store and photo_id not in self._absent

  def get(self, photo_id: str, flipped: bool) -> np.ndarray | None:
    """float32[h, w, 2 C], or None for a photo that cannot be had."""
    return self.store.get(photo_id, flipped) if photo_id in self else None


class Loader:
  """Gives the arrays of photos at a step.

  Attributes:
    target: the array of a batch that photos to draw go into.
    broken: id of each photo that could not be used -> why.
  """

  def __init__(
    self,
    spec: DataSpec,
    key: tuple[int, int],
    cache: PhotoCache,
    precomputed: Moments | None = None,
  ):
    """Takes the sizes of `spec`, and (seed, stage) as `key`.

    Raises:
      ValueError: the spec asks for moments and there are none, or for crops
        of them.
    """
    if spec.moments and (precomputed is None or spec.crop):
      raise ValueError(
        "Batches of moments need a store of them, and photos cannot be cropped "
        "afterwards: set spec.crop or spec.moments back."
      )
    self.target = "moments" if spec.moments else "photos_out"
    self.broken: dict[str, str] = {}
    self._spec, self._key = spec, key
    self._cache, self._moments = cache, precomputed

  def seen(
    self, photo: schema.Photo, number: int, step: int
  ) -> np.ndarray | None:
    """A photo the model sees, uint8[Hv, Wv, 3]; None if it is broken."""
    pixels = self._get(photo, images.load_vision, self._spec.vision_size)
    if pixels is not None and self._spec.augment and self._flips(number, step):
      return pixels[:, ::-1]
    return pixels

  def drawn(
    self, photo: schema.Photo, number: int, step: int
  ) -> np.ndarray | None:
    """A photo to draw, as `target` wants it; None if there is none.

    Args:
      photo: the photo.
      number: of the photo in its example.
      step: of the stage.
    """
    spec, size = self._spec, self._spec.photo_size
    if photo.path is None:
      return None
    flips = spec.augment and self._flips(number, step)
    if spec.moments:
      try:
        return self._moments.get(photo.id, flips)
      except moments.DamagedRecord as e:
        if photo.id not in self.broken:
          logging.warning("%s", e)
        self.broken[photo.id] = str(e)
        return None
    load = images.load_roomy if spec.crop else images.load_photo
    pixels = self._get(photo, load, size)
    if pixels is None:
      return None
    if spec.crop:
      bits = packing.random_bits(4, *self._key, step, number)
      # 53 bits are a double in [0, 1); the first ones say whether it flips.
      side, x, y = (int(b >> np.uint64(11)) * 2.0**-53 for b in bits[1:])
      low, high = images.CROP_SCALE
      pixels = images.crop_at(pixels, size, low + side * (high - low), x, y)
    return pixels[:, ::-1] if flips else pixels

  def _flips(self, number: int, step: int) -> bool:
    bits = packing.random_bits(1, *self._key, step, number)
    return bool(bits[0] & np.uint64(1))

  def _get(self, photo: schema.Photo, load: Any, size: int):
    pixels = self._cache.get(photo, load, size)
    if pixels is None:
      self.broken[photo.id] = self._cache.broken[str(photo.path)]
    return pixels
