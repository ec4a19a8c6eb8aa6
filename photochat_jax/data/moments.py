"""What frozen networks make of photos, computed once and read at random.

`tools/precompute.py` fills a store, `moments_files` says what it looks like.
Kind 'moments' is the autoencoder's mean and log-variance, 'features' what the
ViT sees of a photo. Each is kept for the photo and for its mirror image, since
neither network is equivariant: an autoencoder's strides begin at the left, a
ViT's positions are learnt.

A store belongs to the weights and to the preparation of photos that made it,
and refuses to be opened for others. Reading needs neither TensorFlow nor jax.
"""

import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from photochat_jax.data import moments_files as files
from photochat_jax.data.moments_files import (
  About,
  DamagedRecord,
  FileFacts,
  MomentsError,
)

# Raised when `data/images.py`, `models.photochat.to_signed` or
# `models.vit.normalise` change what a network gets to see of a photo.
_PREPARATION = 1
# Shards held open; systems allow a process 1,024 files or fewer.
_OPEN = 128
# Records are small and anywhere: nothing is read ahead.
_READING = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER = 1 << 15


def photo_transform(size: int, tile_size: int = 0) -> str:
  """Says what is done to a photo before the autoencoder reads it.

  Args:
    size: side in pixels.
    tile_size: of `VAEConfig`.
  """
  tiles = f", in tiles of {tile_size} px" if 0 < tile_size < size else ""
  return f"middle square, {size} px, bicubic, -1..1{tiles} ({_PREPARATION})"


def vision_transform(size: int) -> str:
  """Says what is done to a photo before the ViT reads it, at a side of size."""
  return f"squeezed, {size} px, bicubic, CLIP's colours ({_PREPARATION})"


def weights_hash(
  arrays: Mapping[str, Any], settings: Mapping[str, Any]
) -> str:
  """Names a network.

  Args:
    arrays: the parameters it applies, by path. Their values count and not
      their dtype: weights widened to float32 are the same network.
    settings: what changes its result without changing a path or a shape.

  Returns:
    A SHA-256, 64 hexadecimal digits.
  """
  content = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
  for path in sorted(arrays):
    array = np.asarray(arrays[path], dtype="<f4", order="C")
    digest = hashlib.sha256(array.reshape(-1).view(np.uint8)).hexdigest()
    content.update(f"\n{path} {array.shape} {digest}".encode())
  return content.hexdigest()


def open_store(
  folder: epath.PathLike,
  weights_hash: str | None = None,
  transform: str | None = None,
  kind: str = "moments",
) -> "Store":
  """Opens what `tools/precompute.py --out=FOLDER` made.

  Only the indices are read, and the sizes of the shards.

  Args:
    folder: the tool's `--out`.
    weights_hash: of the network in use, by the function of this name; None
      takes any.
    transform: of the photos in use, by `photo_transform` or
      `vision_transform`; None takes any.
    kind: 'moments' or 'features'.

  Raises:
    MomentsError: there is none, it is damaged, or it was made by other weights
      or of photos prepared in another way.
  """
  if kind not in files.KINDS:
    raise MomentsError(f"kind is {kind!r}; it must be one of {files.KINDS}.")
  place = files.local(folder) / kind
  about = files.read_about(place)
  if about is None:
    command = About(kind, "", "", ()).command(folder)
    raise MomentsError(f"There are no {kind} in {folder}: run {command}.")
  files.check(folder, about, weights_hash, transform)
  return Store(place, about)


class _Place(NamedTuple):
  """Where a photo's records are."""

  shard: str
  first: int  # Of the two, in the shard.
  facts: FileFacts


class Store:
  """The arrays of photos, for any number of threads at once.

  Nothing that was read is kept: the system's own cache of files does that, and
  gives way where memory is short.

  Attributes:
    folder: with `about.json`.
    about: what made it.
  """

  def __init__(self, folder: epath.Path, about: About):
    """Reads the indices; `open_store` is the way to make one."""
    self.folder, self.about = folder, about
    self._places: dict[str, _Place] = {}
    self._readers: dict[str, Any] = {}
    self._lock = threading.Lock()
    for shard in files.list_shards(folder):
      index = files.read_index(folder, shard, about)
      for i, (photo_id, facts) in enumerate(index.items()):
        self._places[photo_id] = _Place(shard, 2 * i, facts)

  def __len__(self) -> int:
    """Photos, each with its mirror image."""
    return len(self._places)

  def __iter__(self) -> Iterator[str]:
    """The photos' ids."""
    return iter(self._places)

  def __contains__(self, photo_id: str) -> bool:
    return photo_id in self._places

  def missing(self, ids: Iterable[str]) -> list[str]:
    """Those of some photos that are not here, in their order."""
    return [photo_id for photo_id in ids if photo_id not in self._places]

  def changed(self, paths: Mapping[str, epath.PathLike]) -> list[str]:
    """Those photos whose file is not the one that was encoded.

    A file named by its SHA-256 (`data/photo_store.py`) is told by that, with
    no look at the disk; any other by its size in bytes.

    Args:
      paths: photo id -> file; ids that are not here are passed over.
    """
    return [
      photo_id
      for photo_id, path in paths.items()
      if photo_id in self._places
      and not _is_same(epath.Path(path), self._places[photo_id].facts)
    ]

  def get(self, photo_id: str, flipped: bool = False) -> np.ndarray | None:
    """A photo's array.

    Args:
      photo_id: `Photo.id`.
      flipped: that of its mirror image, left to right.

    Returns:
      float32[h, w, 2 C], mean before log-variance; of features float32[T, D].
      None for a photo that is not here.

    Raises:
      DamagedRecord: it cannot be read, or is not what was written.
    """
    place = self._places.get(photo_id)
    if place is None:
      return None
    try:
      reader = self._reader(place.shard)
      record = np.frombuffer(
        reader.read([place.first + bool(flipped)])[0], np.uint8
      )
    except (RuntimeError, OSError) as error:
      raise self._damaged(photo_id, place.shard) from error
    start, content = record[:4].tobytes(), record[4:]
    if start != files.checksum(photo_id, flipped, content):
      raise self._damaged(photo_id, place.shard)
    array = content.view(self.about.number).astype(np.float32)
    return array.reshape(self.about.shape)

  def _damaged(self, photo_id: str, shard: str) -> DamagedRecord:
    return DamagedRecord(
      f"The {self.about.kind} of photo {photo_id} in "
      f"{self.folder / shard}.array_record are damaged: remove {shard}.json "
      f"beside it and run {self.about.command(self.folder.parent)} again."
    )

  def _reader(self, shard: str) -> Any:
    """A shard's reader, which threads share; those not used are let go."""
    with self._lock:
      reader = self._readers.pop(shard, None)
      if reader is None:
        reader = files.array_record().ArrayRecordReader(
          os.fspath(self.folder / f"{shard}.array_record"),
          options=_READING,
          file_reader_buffer_size=_BUFFER,
        )
        while len(self._readers) >= _OPEN:
          self._readers.pop(next(iter(self._readers)))
      self._readers[shard] = reader
      return reader


def _is_same(path: epath.Path, facts: FileFacts) -> bool:
  if re.fullmatch("[0-9a-f]{64}", path.stem):
    return path.stem == facts.sha256
  try:
    return path.stat().length == facts.bytes
  except OSError:
    return False


class Speed(NamedTuple):
  """How fast a store is read: photos, and megabytes on the disk, a second."""

  photos: float
  megabytes: float


def reading_speed(
  store: Store, threads: int = 1, reads: int = 4096, seed: int = 0
) -> Speed:
  """Measures random reading, `get` and all.

  Args:
    store: with photos in it. What the system has cached is read from there.
    threads: that read at the same time.
    reads: of all of them together.
    seed: of the order, and of which are mirrored.
  """
  draw = random.Random(seed)
  ids = sorted(store)
  asked = [(draw.choice(ids), draw.random() < 0.5) for _ in range(reads)]

  def read(part):
    for photo_id, flipped in part:
      store.get(photo_id, flipped)

  with futures.ThreadPoolExecutor(threads) as pool:
    started = time.perf_counter()
    list(pool.map(read, [asked[i::threads] for i in range(threads)]))
    seconds = time.perf_counter() - started
  about = store.about
  size = about.number.itemsize * int(np.prod(about.shape))
  return Speed(reads / seconds, reads * size / seconds / 1e6)
