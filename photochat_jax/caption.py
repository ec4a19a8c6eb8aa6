"""Writes captions for the photos of a data set.

PhotoChat describes a photo by a list of labels. `caption_photos` has a model
look at each photo and appends what it says to `photo_captions.jsonl` in the
data set's folder, one row for a photo:

  {"photo_id": ..., "caption": ..., "model": ..., "sha256": ...}

`sha256` is that of the photo's file and `model` names weights and decoding. The
last row of a photo counts. Rows are written as they come, and what has a row of
the same model and file is not captioned again, so that a run which was killed
goes on where it was.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from photochat_jax.captioners import Captioner, CaptionError
from photochat_jax.data import bars, images, records, schema, sources

FILE = records.CAPTION_FILE

_FIELDS = ("photo_id", "caption", "model", "sha256")
_READERS = 4  # Threads that read photos; decoding JPEG lets go of the lock.
_NAMED = 20  # How many photos of a kind the summary spells out.


class CaptionFile:
  """The rows that were written, and where new ones go.

  Attributes:
    path: the file.
    odd_lines: lines that are no rows; they stay and count for nothing.
  """

  def __init__(self, path: str | os.PathLike):
    """Reads the rows, and opens the file to append to it.

    A last line that was half written when a run was killed is cut off; one
    that only lacks its end gets it.

    Raises:
      CaptionError: it cannot be read or written.
    """
    self.path = pathlib.Path(path)
    self.odd_lines = 0
    self._captions: dict[tuple[str, str, str], str] = {}
    self._last: dict[str, tuple[str, str]] = {}
    try:
      data = self.path.read_bytes() if self.path.exists() else b""
      whole = data.rfind(b"\n") + 1
      for line in data[:whole].split(b"\n")[:-1]:
        self.odd_lines += not self._note(line)
      # Without a buffer, whose content a full disk would meet on closing.
      self._file = self.path.open("ab", buffering=0)
      if self._note(data[whole:]):
        self._file.write(b"\n")
      else:
        self._file.truncate(whole)
    except OSError as error:
      raise self._fault(error) from error

  def __enter__(self) -> "CaptionFile":
    return self

  def __exit__(self, *_) -> None:
    self._file.close()

  def find(self, photo_id: str, model: str, sha256: str) -> str | None:
    """The caption of a photo's file by a model, if there is one."""
    return self._captions.get((photo_id, model, sha256))

  def count(self, model: str) -> int:
    """How many photos, or versions of their files, a model has captioned."""
    return sum(key[1] == model for key in self._captions)

  def is_last(self, photo_id: str, model: str, sha256: str) -> bool:
    """Whether this is what readers take for the photo."""
    return self._last.get(photo_id) == (model, sha256)

  def append(self, rows: Iterable[dict[str, str]]) -> None:
    """Writes rows, which are with the system when it returns.

    Raises:
      CaptionError: the file cannot be written; what was written before stays.
    """
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    rest = memoryview(b"".join(lines))
    try:
      while rest:
        rest = rest[self._file.write(rest) :]
    except OSError as error:
      raise self._fault(error) from error
    for line in lines:
      self._note(line)

  def _note(self, line: bytes) -> bool:
    """Remembers a line, if it is a row."""
    try:
      row = json.loads(line)
      photo_id, caption, model, sha256 = values = [row[f] for f in _FIELDS]
    except (ValueError, KeyError, TypeError, RecursionError):
      return False
    if not all(isinstance(value, str) for value in values):
      return False
    self._captions[photo_id, model, sha256] = caption
    self._last[photo_id] = model, sha256
    return True

  def _fault(self, error: OSError) -> CaptionError:
    return CaptionError(
      f"{self.path} cannot be written: {error}; see to it that the folder is "
      "there, may be written to and has room, then run this again to go on."
    )


@dataclasses.dataclass
class Summary:
  """What a run did.

  Attributes:
    model: whose captions.
    photos: photos with a file.
    had: those that had a caption of this model.
    written: captions written, each on a row of the file.
    cut: of them, those which reached the longest and had not ended.
    empty: ids of photos that the model had nothing to say about; no rows.
    damaged: (id, what is wrong) of photos that cannot be read; no rows.
    left: photos that were not looked at, for the limit.
    odd_lines: of the file, see `CaptionFile`.
    seconds: it took.
  """

  model: str
  photos: int
  had: int = 0
  written: int = 0
  cut: int = 0
  empty: list[str] = dataclasses.field(default_factory=list)
  damaged: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  left: int = 0
  odd_lines: int = 0
  seconds: float = 0.0

  def __str__(self):
    took = datetime.timedelta(seconds=round(self.seconds))
    rate = self.written / self.seconds if self.seconds else 0.0
    lines = [
      f"Captions by {self.model}",
      f"  {self.photos:7d} photos with a file",
      f"  {self.had:7d} had a caption",
      f"  {self.written:7d} captions written in {took}, {rate:.1f} a second",
    ]
    for count, what in (
      (self.cut, "of them reached the longest caption and had not ended"),
      (len(self.empty), "empty captions, not written"),
      (len(self.damaged), "damaged photos"),
      (self.left, "photos left for another run"),
      (self.odd_lines, "lines of the file are no captions: see to it"),
    ):
      if count:
        lines.append(f"  {count:7d} {what}")
    names = [f"empty: {name}" for name in self.empty]
    names += [f"damaged: {name}: {fault}" for name, fault in self.damaged]
    lines += [f"  {name}" for name in names[:_NAMED]]
    if len(names) > _NAMED:
      lines.append(f"  and {len(names) - _NAMED} more")
    return "\n".join(lines)


class _Loaded(NamedTuple):
  photo: schema.Photo
  sha256: str = ""
  prepared: Any = None
  fault: str = ""


def find_photos(
  source: str, path: str | os.PathLike
) -> tuple[list[schema.Photo], int]:
  """The photos of all splits of a data set, each once.

  Args:
    source: a name of `data.sources.READERS`.
    path: its folder.

  Returns:
    Those that have a file, in the order of first being shared, and how many
    have none.

  Raises:
    ValueError: there is no split, or one that cannot be read.
  """
  splits = sources.list_splits(source, path)
  if not splits:
    raise CaptionError(
      f"There is no split of {source} in {path}: give the folder that holds "
      "the data set's files and photos/."
    )
  photos: dict[str, schema.Photo] = {}
  for split in splits:
    dialogues, _ = sources.read_split(source, path, split)
    for photo in records.list_photos(dialogues):
      photos.setdefault(photo.id, photo)
  found = [photo for photo in photos.values() if photo.path is not None]
  return found, len(photos) - len(found)


def caption_photos(
  photos: Sequence[schema.Photo],
  captioner: Captioner,
  path: str | os.PathLike,
  limit: int | None = None,
) -> Summary:
  """Writes a row for each photo that has none of this captioner.

  Photos are read in other threads, at most a few batches ahead.

  Args:
    photos: with their files, each once.
    captioner: who writes.
    path: the file, `photo_captions.jsonl` of the data set.
    limit: most captions to write; None for all.

  Returns:
    What was done and what was not.

  Raises:
    CaptionError: the file cannot be read or written.
  """
  started = time.monotonic()
  summary = Summary(captioner.model, len(photos), left=len(photos))
  with CaptionFile(path) as file, _bar(photos, captioner, file, limit) as bar:

    def load(photo: schema.Photo) -> _Loaded:
      try:
        data = photo.path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        if file.find(photo.id, captioner.model, sha256) is not None:
          return _Loaded(photo, sha256)
        image = images.decode(data, str(photo.path))
      except (OSError, images.ImageError) as error:
        return _Loaded(photo, fault=str(error))
      return _Loaded(photo, sha256, captioner.prepare(image))

    def row(loaded: _Loaded, caption: str) -> dict[str, str]:
      values = (loaded.photo.id, caption, captioner.model, loaded.sha256)
      return dict(zip(_FIELDS, values, strict=True))

    def write(batch: list[_Loaded]) -> None:
      ids = [loaded.photo.id for loaded in batch]
      written = captioner.write(ids, [loaded.prepared for loaded in batch])
      rows = []
      for loaded, (text, cut) in zip(batch, written, strict=True):
        if caption := clean(text):
          rows.append(row(loaded, caption))
          summary.cut += cut
        else:
          summary.empty.append(loaded.photo.id)
      file.append(rows)
      summary.written += len(rows)
      bar.advance(len(batch))

    batch, taken = [], 0
    ahead = _READERS + 2 * captioner.batch_size
    with contextlib.closing(_ahead(load, photos, ahead)) as arriving:
      for loaded in arriving:
        if loaded.prepared is not None and taken == limit:
          break
        summary.left -= 1
        if loaded.fault:
          summary.damaged.append((loaded.photo.id, loaded.fault))
          bar.advance()
        elif loaded.prepared is None:
          known = loaded.photo.id, captioner.model, loaded.sha256
          # Readers take the last row: this model's once more.
          if not file.is_last(*known):
            file.append([row(loaded, file.find(*known))])
          summary.had += 1
          bar.advance()
        else:
          taken += 1
          batch.append(loaded)
        if len(batch) == captioner.batch_size:
          write(batch)
          batch = []
    if batch:
      write(batch)
    summary.odd_lines = file.odd_lines
  summary.seconds = time.monotonic() - started
  return summary


def clean(text: str) -> str:
  """A caption on one line, without what cannot be printed."""
  shown = "".join(c if c.isprintable() else " " for c in text)
  return " ".join(shown.split())


def _ahead(
  function: Callable[[Any], Any], items: Iterable[Any], most: int
) -> Iterator[Any]:
  """`map`, in threads, at most so many items ahead of what is taken."""
  pool = concurrent.futures.ThreadPoolExecutor(_READERS)
  pending = collections.deque()
  try:
    for item in items:
      pending.append(pool.submit(function, item))
      if len(pending) >= most:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


def _bar(photos, captioner, file, limit) -> bars.Bar:
  """The bar over photos, those included that have their caption."""
  total = len(photos)
  if limit is not None:
    total = min(total, limit + file.count(captioner.model))
  return bars.Bar("Captioning", total)
