"""The files of a store of precomputed arrays (`data/moments.py`), written.

    OUT/moments/about.json               what made them: `About`
    OUT/moments/00000-000.array_record   records of a shard's photos: of the
                                         first, of its mirror image, of the
                                         second, ...
    OUT/moments/00000-000.json           the shard's index: id, size and
                                         SHA-256 of each photo, in that order
    OUT/features/...                     the same for the ViT

A shard's name is its number and its host. It counts once its index is there,
which is written last; where several hold a photo, the last one counts. A JSON
file holds its own SHA-256, and a record begins with a CRC-32 of the photo's id
and the numbers: what is damaged or in the wrong place is an error, never a
value.

Numbers are float16: its rounding is at most 2^-11 of a value, bfloat16's 2^-8,
and what networks end in is far from its largest, 65504. Records are not
compressed, because noise does not shrink.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

KINDS = ("moments", "features")
_FORMAT = 1


class MomentsError(ValueError):
  """A store that cannot be used; the message is one sentence."""


class DamagedRecord(MomentsError):
  """A photo's record cannot be read, or is not what was written."""


@dataclasses.dataclass(frozen=True)
class About:
  """What made a store.

  Attributes:
    kind: of `KINDS`.
    weights_hash: of `moments.weights_hash`.
    transform: of `moments.photo_transform` or `vision_transform`.
    shape: of a photo's array.
    dtype: of its numbers on the disk, little-endian.
    source: the data set, for messages.
    path: its folder, for messages.
  """

  kind: str
  weights_hash: str
  transform: str
  shape: tuple[int, ...]
  dtype: str = "float16"
  source: str = "NAME"
  path: str = "DIR"

  @property
  def number(self) -> np.dtype:
    """One number on the disk."""
    return np.dtype(self.dtype).newbyteorder("<")

  def command(self, out: epath.PathLike) -> str:
    """The command that makes such a store."""
    features = " --features" if self.kind == "features" else ""
    return (
      f"`python tools/precompute.py --workdir=RUN --dataset={self.source} "
      f"--path={self.path} --out={out}{features}`"
    )


class FileFacts(NamedTuple):
  """What is known of the file that a photo was read from."""

  bytes: int
  sha256: str  # 64 hexadecimal digits.


def check(
  folder: epath.PathLike,
  found: About,
  weights_hash: str | None,
  transform: str | None,
) -> None:
  """Refuses a store that other weights or another transform made.

  Raises:
    MomentsError: saying what differs, and how to make another.
  """
  for what, there, here in (
    ("weights", found.weights_hash, weights_hash),
    ("photos", found.transform, transform),
  ):
    if here is not None and here != there:
      if what == "weights":
        there, here = there[:12], here[:12]
      raise MomentsError(
        f"The {found.kind} in {folder} were made by other {what}, {there!r} "
        f"there and {here!r} here: make them anew with "
        f"{found.command('NEW_FOLDER')}."
      )


def local(folder: epath.PathLike) -> epath.Path:
  """A store's folder.

  Raises:
    MomentsError: it is an address, which ArrayRecord cannot open.
  """
  if "://" in os.fspath(folder):
    raise MomentsError(
      f"{os.fspath(folder)} must be on a disk, since records are read at "
      "random: copy it there, or mount it."
    )
  return epath.Path(folder)


def array_record() -> Any:
  """The module of ArrayRecord's reader and writer.

  Raises:
    MomentsError: it is not installed.
  """
  try:
    from array_record.python import array_record_module
  except ImportError as error:
    raise MomentsError(
      "Precomputed moments need array_record: `pip install array_record`."
    ) from error
  return array_record_module


def checksum(photo_id: str, flipped: bool, content: np.ndarray) -> bytes:
  """What a record begins with, 4 bytes."""
  start = zlib.crc32(
    f"{int(flipped)} {photo_id}".encode("utf-8", "surrogatepass")
  )
  return zlib.crc32(content.data, start).to_bytes(4, "little")


def read_about(folder: epath.Path) -> About | None:
  """What made the store of a kind; None where there is none.

  Raises:
    MomentsError: it is damaged, or of another version.
  """
  path = folder / "about.json"
  if not path.exists():
    return None
  try:
    content = _read_json(path)
    version = content.pop("format")
    if version == _FORMAT:
      return About(**content | {"shape": tuple(content["shape"])})
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise MomentsError(
      f"{path} is damaged ({error}): make the store anew in another folder, "
      "with tools/precompute.py."
    ) from error
  raise MomentsError(
    f"{path} is of format {version} and this is {_FORMAT}: make the store "
    "anew in another folder, with tools/precompute.py."
  )


def list_shards(folder: epath.Path) -> list[str]:
  """The names of the shards whose index is written, oldest first."""
  names = {path.stem for path in folder.glob("*.json")}
  return sorted(
    (name for name in names if re.fullmatch(r"\d+-\d+", name)),
    key=lambda name: tuple(map(int, name.split("-"))),
  )


def read_index(
  folder: epath.Path, shard: str, about: About
) -> dict[str, FileFacts]:
  """The photos of a shard, in the order of their records.

  Raises:
    MomentsError: the index or its shard is damaged, or of another store.
  """
  path = folder / f"{shard}.json"
  again = f"remove {path} and run {about.command(folder.parent)} again."
  try:
    content = _read_json(path)
    made_by = content["weights_hash"], content["transform"]
    size = content["bytes"]
    photos = {i: FileFacts(*facts) for i, *facts in content["photos"]}
    if len(photos) != len(content["photos"]):
      raise ValueError("a photo stands there twice")
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise MomentsError(f"{path} is damaged ({error}): {again}") from error
  if made_by != (about.weights_hash, about.transform):
    raise MomentsError(f"{path} belongs to another store: {again}")
  records = path.with_suffix(".array_record")
  try:
    found = os.path.getsize(records)
  except OSError as error:
    raise MomentsError(f"{path} has no shard ({error}): {again}") from error
  if found != size:
    raise MomentsError(f"{records} has {found} bytes of {size}: {again}")
  return photos


class Writer:
  """Adds shards to a store; with `with`, and one for each host.

  A shard appears whole or not at all. One that is not full is finished on
  leaving, after Ctrl-C too, but not after an error.
  """

  def __init__(
    self,
    folder: epath.PathLike,
    about: About,
    host: int = 0,
    photos_per_shard: int = 512,
  ):
    """Opens a store, or begins one.

    Args:
      folder: the store's, of all kinds.
      about: what makes the arrays.
      host: this machine's index; no two writers of a store have the same.
      photos_per_shard: what is lost at most when the process is killed.

    Raises:
      MomentsError: what is there was made by other weights or photos.
    """
    self.folder = local(folder) / about.kind
    self._about, self._host, self._full = about, host, photos_per_shard
    with self._writing():
      self.folder.mkdir(parents=True, exist_ok=True)
      for left in self.folder.glob(f"*-{host:03d}.*tmp"):
        left.unlink()  # By a run that was killed.
    found = read_about(self.folder)
    if found is None:
      content = {"format": _FORMAT, **dataclasses.asdict(about)}
      with self._writing():
        _write_json(self.folder / "about.json", content, host)
    else:
      check(folder, found, about.weights_hash, about.transform)
    # After all that is there, of any host: the last of a photo counts.
    numbers = [int(shard.split("-")[0]) for shard in list_shards(self.folder)]
    self._numbers = itertools.count(1 + max(numbers, default=-1))
    self._writer: Any = None
    self._records = ""  # Path of the open shard.
    self._photos: list[tuple[str, int, str]] = []

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, kind: type | None, *_) -> None:
    if kind is None or issubclass(kind, KeyboardInterrupt):
      self.finish()

  def add(
    self,
    photo_id: str,
    facts: FileFacts,
    straight: np.ndarray,
    mirrored: np.ndarray,
  ) -> None:
    """Appends a photo.

    Args:
      photo_id: `Photo.id`, not added before by this writer.
      facts: of the file it was read from.
      straight: of `about.shape` and `about.number`.
      mirrored: of its mirror image, likewise.

    Raises:
      MomentsError: a number is not finite, or nothing can be written.
    """
    for array in (straight, mirrored):
      if array.shape != self._about.shape or array.dtype != self._about.number:
        raise TypeError(f"{array.dtype}{list(array.shape)}, {self._about}")
      if not np.isfinite(array).all():
        raise MomentsError(
          f"The {self._about.kind} of photo {photo_id} are not finite in "
          f"{self._about.dtype}: look at the weights of --workdir."
        )
    with self._writing():
      if self._writer is None:
        name = f"{next(self._numbers):05d}-{self._host:03d}.array_record"
        self._records = os.fspath(self.folder / name)
        self._writer = array_record().ArrayRecordWriter(
          f"{self._records}.tmp", "group_size:1,uncompressed"
        )
      for flipped, array in enumerate((straight, mirrored)):
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start = checksum(photo_id, bool(flipped), content)
        self._writer.write(start + content.tobytes())
    self._photos.append((photo_id, *facts))
    if len(self._photos) >= self._full:
      self.finish()

  def finish(self) -> None:
    """Makes the open shard, where there is one, a part of the store."""
    if self._writer is None:
      return
    with self._writing():
      self._writer.close()
      with open(f"{self._records}.tmp", "rb") as file:
        os.fsync(file.fileno())
      os.replace(f"{self._records}.tmp", self._records)
      index = {
        "weights_hash": self._about.weights_hash,
        "transform": self._about.transform,
        "bytes": os.path.getsize(self._records),
        "photos": self._photos,
      }
      path = epath.Path(self._records).with_suffix(".json")
      _write_json(path, index, self._host)
    self._writer, self._photos = None, []

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Turns what a full or broken disk raises into one sentence."""
    try:
      yield
    except (OSError, RuntimeError) as error:
      raise MomentsError(
        f"{self.folder} cannot be written ({error}): give it space, or "
        "another --out; the same command goes on after the last whole shard."
      ) from error


def _digest(content: dict[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _read_json(path: epath.Path) -> dict[str, Any]:
  """What `_write_json` wrote; a ValueError where it is not."""
  try:
    content = json.loads(path.read_bytes())
  except RecursionError as error:
    raise ValueError("it is nested too deeply") from error
  if not isinstance(content, dict):
    raise ValueError("it is no JSON object")
  digest = content.pop("sha256", None)
  if digest != _digest(content):
    raise ValueError("its SHA-256 is another")
  return content


def _write_json(path: epath.Path, content: dict[str, Any], host: int) -> None:
  """Writes a file that is there whole or not at all."""
  content = json.loads(json.dumps(content))  # Tuples as they are read back.
  part = path.parent / f"{path.stem}-{host:03d}.json.tmp"
  with open(part, "w", encoding="utf-8") as file:
    json.dump({**content, "sha256": _digest(content)}, file)
    file.flush()
    os.fsync(file.fileno())
  os.replace(part, path)
