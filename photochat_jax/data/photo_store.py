"""Where the photos of a folder are, and what became of those asked for.

    DIR/photos/manifest.jsonl                  what `tools/fetch_photos.py` did
    DIR/photos/blobs/ab/<sha256>.<extension>   what it fetched, by content
    DIR/photos/{photo_id}.jpg                  photos put there by hand; also
                                               .jpeg .png .webp .gif

A line of the manifest is one JSON object, `Row`. Lines are only ever appended,
the last one of an id counts, and one that cannot be read (half of it written
when the machine died) is left out and counted. Two ids with the same content
share a file.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Collection, Iterable, Iterator
from concurrent import futures
from typing import NamedTuple

from absl import logging
from etils import epath

MANIFEST = "manifest.jsonl"
OK = "ok"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
# Folders listed at once: what a bucket answers in parallel.
_LISTINGS = 16


class Row(NamedTuple):
  """One line of the manifest.

  Attributes:
    id: `Photo.id`.
    url: where it was asked for.
    status: 'ok', or why it is not there: a kind of `fetch_rules.KINDS`.
    sha256: of the content, 64 hexadecimal digits; '' unless ok, as below.
    file: below `photos/`, in POSIX form.
    bytes: size of the file.
    width: pixels, upright.
    height: pixels, upright.
    format: Pillow's name, such as 'JPEG'.
    detail: of a failure, what happened.
  """

  id: str
  url: str
  status: str
  sha256: str = ""
  file: str = ""
  bytes: int = 0
  width: int = 0
  height: int = 0
  format: str = ""
  detail: str = ""


class Manifest(NamedTuple):
  """The last row of each id, and the number of lines left out."""

  rows: dict[str, Row]
  damaged: int


def url_id(url: str) -> str:
  """Names a photo of a data set that has only addresses."""
  return f"url/{hashlib.sha256(url.encode()).hexdigest()[:32]}"


def is_inside(name: str) -> bool:
  """Whether a POSIX path stays below the folder it is relative to."""
  parts = name.split("/")
  return not (set(name) & {"\\", "\0"} or set(parts) & {"", ".", ".."})


def parse(line: bytes) -> Row:
  """Reads one line of a manifest.

  Raises:
    ValueError: it is none, or its file lies outside of the folder.
  """
  try:
    record = json.loads(line)
    row = Row(**{k: v for k, v in record.items() if k in Row._fields})
  except (AttributeError, TypeError, RecursionError) as e:
    raise ValueError(f"{line[:40]!r} is no row: {e}") from e
  for field, value in row._asdict().items():
    kind = Row.__annotations__[field]
    if not isinstance(value, kind) or isinstance(value, bool):
      raise ValueError(f"{field} is {value!r:.40}")
  if row.status == OK and not is_inside(row.file):
    raise ValueError(f"{row.file!r:.60} leaves the folder")
  return row


def _lines(file: epath.Path) -> Iterator[bytes]:
  with file.open("rb") as stream:
    yield from stream


def read_manifest(
  folder: epath.PathLike, ids: Collection[str] | None = None
) -> Manifest:
  """Reads what is known about the photos of a folder.

  Args:
    folder: the data set's, which holds `photos/`.
    ids: keep the rows of these; of all where None.

  Returns:
    The rows by id; none where there is no manifest.
  """
  file = epath.Path(folder) / "photos" / MANIFEST
  rows, damaged = {}, 0
  for line in _lines(file) if file.exists() else ():
    if not line.strip():
      continue
    try:
      row = parse(line)
    except ValueError:
      damaged += 1
      continue
    if ids is None or row.id in ids:
      rows[row.id] = row
  return Manifest(rows, damaged)


def _there(photos: epath.Path, parents: Iterable[str]) -> set[str]:
  """The names below `photos/` in some of its folders, one listing each."""

  def names(parent):
    place = photos / parent
    if not place.is_dir():
      return []
    start = "" if parent == "." else f"{parent}/"
    return [start + item.name for item in place.iterdir()]

  parents = sorted(set(parents))
  with futures.ThreadPoolExecutor(_LISTINGS) as pool:
    return {name for found in pool.map(names, parents) for name in found}


def _parent(name: str) -> str:
  return pathlib.PurePosixPath(name).parent.as_posix()


def find(folder: epath.PathLike, ids: Iterable[str]) -> dict[str, epath.Path]:
  """Finds the files of photos, with one listing of each folder of files.

  On a bucket that is the difference between a second and many minutes.

  Args:
    folder: the data set's, which holds `photos/`.
    ids: of the photos; those that are no path below `photos/` are not found.

  Returns:
    The files of those that are there, in the order asked.
  """
  photos = epath.Path(folder) / "photos"
  ids = {i: None for i in ids if is_inside(i)}
  rows, damaged = read_manifest(folder, ids)
  if damaged:
    logging.warning(
      "%s has %d damaged lines, which are left out: fetch again to be sure.",
      photos / MANIFEST,
      damaged,
    )
  stored = {i: row.file for i, row in rows.items() if row.status == OK}
  there = _there(photos, map(_parent, stored.values()))
  files = {i: file for i, file in stored.items() if file in there}
  rest = [i for i in ids if i not in files]
  there = _there(photos, map(_parent, rest))
  for photo_id in rest:
    names = (photo_id + suffix for suffix in SUFFIXES)
    if name := next((n for n in names if n in there), None):
      files[photo_id] = name
  return {i: photos / files[i] for i in ids if i in files}


class StoreError(ValueError):
  """Photos cannot be kept in a folder; the sentence says what to do."""


def check_local(folder: str | os.PathLike) -> None:
  """Checks that a folder is on this machine.

  Raises:
    StoreError: it is in a bucket.
  """
  if "://" in os.fspath(folder):
    raise StoreError(
      f"{os.fspath(folder)} is no local folder: fetch into one, then copy it."
    )


class Writer:
  """Adds photos to a local folder; a context manager.

  A file appears under its name whole or not at all, and its row after it: a
  process killed anywhere leaves a folder to go on with. What the power takes
  with it is seen by the next run, which compares sizes.
  """

  def __init__(self, folder: str | os.PathLike):
    """Opens nothing yet.

    Raises:
      StoreError: the folder is not on this machine.
    """
    check_local(folder)
    self.photos = pathlib.Path(folder) / "photos"
    self._incoming = self.photos / "incoming"

  def __enter__(self) -> "Writer":
    """Opens the manifest for this process alone.

    Raises:
      StoreError: another process has it open.
      OSError: the folder cannot be written.
    """
    self._incoming.mkdir(parents=True, exist_ok=True)
    self._file = (self.photos / MANIFEST).open("a+b")
    try:
      _lock(self._file, self.photos)
      for left in self._incoming.iterdir():  # Of a process that was killed.
        left.unlink()
      if self._file.tell():
        self._file.seek(-1, os.SEEK_END)
        if self._file.read(1) != b"\n":  # Half a line, of the same.
          self._file.write(b"\n")
          self._file.flush()
    except BaseException:
      self._file.close()
      raise
    return self

  def __exit__(self, *_) -> None:
    with contextlib.suppress(OSError):  # Said where the row was written.
      self._file.close()

  def append(self, row: Row) -> None:
    """Writes one row, which other processes then see."""
    defaults = Row._field_defaults
    known = {k: v for k, v in row._asdict().items() if v != defaults.get(k)}
    self._file.write(json.dumps(known).encode() + b"\n")
    self._file.flush()

  def keep(self, data: bytes, extension: str) -> tuple[str, str]:
    """Writes a file under its content's hash; several threads may.

    Args:
      data: the content.
      extension: without a dot.

    Returns:
      The SHA-256, in hexadecimal digits, and the file's name below `photos/`.
    """
    digest = hashlib.sha256(data).hexdigest()
    name = f"blobs/{digest[:2]}/{digest}.{extension}"
    target = self.photos / name
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=self._incoming)
    with open(handle, "wb") as file:
      file.write(data)
    os.chmod(temporary, 0o644)  # `mkstemp` lets nobody else read it.
    os.replace(temporary, target)
    return digest, name


def _lock(file, photos: pathlib.Path) -> None:
  """Holds a file until it is closed, where the system can."""
  try:
    import fcntl
  except ImportError:  # Windows: two runs at once ask twice, and no worse.
    return
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise StoreError(
      f"Another process is fetching into {photos}: wait for it, or end it."
    ) from None
  except OSError:  # Some network file systems have no locks.
    return
