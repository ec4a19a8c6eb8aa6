"""What readers share: checks of a record, captions, coverage.

A record that cannot be used is never a crash and never silence: it is left
out, counted by reason, told in the `Coverage`, and written to the quarantine
file (`data/quarantine.py`). Where more than `max_broken` of a split is like
that, reading stops with the commonest reasons. A reader is three steps:

    read = read_records(files, its function: record -> Dialogue)
    ... what it has to say about the whole ...
    return finish(read, ...)
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from photochat_jax.data import photo_store
from photochat_jax.data.json_files import Broken, excerpt, read_items
from photochat_jax.data.quarantine import (
  Quarantine,
  Row,
  check,
  count_reasons,
)
from photochat_jax.data.schema import Coverage, Dialogue, Photo

CAPTION_SOURCES = ("given", "labels", "description", "written")
CAPTION_FILE = "photo_captions.jsonl"
MAX_BROKEN = 0.05  # what a reader bears unless told otherwise
_LABELS = "Objects in the photo:"
# What file systems allow of a name and of a path, less suffix and folder.
_NAME_BYTES, _PATH_BYTES = 250, 1000
_ID_LENGTH = 200


def check_text(value: Any, name: str) -> str:
  """A text that can be written anywhere.

  JSON may hold half of a surrogate pair, which cannot; it becomes '?'.

  Raises:
    Broken: it is no text.
  """
  if not isinstance(value, str):
    raise Broken(f"{name} is not a text", value)
  if value.isascii():
    return value
  return value.encode("utf-8", "replace").decode("utf-8")


def check_photo_id(value: Any, name: str = "photo_id") -> str:
  """A photo's id, which becomes part of a path.

  Raises:
    Broken: it is no path below `photos/`.
  """
  value = check_text(value, name)
  parts = value.split("/")
  too_long = len(value.encode()) > _PATH_BYTES or any(
    len(part.encode()) > _NAME_BYTES for part in parts
  )
  if too_long or not photo_store.is_inside(value):
    raise Broken(f"{name} is no path below photos/", value)
  return value


def check_id(value: Any, name: str) -> str:
  """A dialogue's id, from a number or a text.

  Raises:
    Broken: it is neither, or too long to be one.
  """
  if isinstance(value, bool) or not isinstance(value, int | str):
    raise Broken(f"{name} is not a number or a text", value)
  value = check_text(str(value), name)
  if not 0 < len(value) <= _ID_LENGTH:
    raise Broken(f"{name} has not 1 to {_ID_LENGTH} characters", value)
  return value


def check_object(value: Any, name: str) -> dict:
  """A JSON object.

  Raises:
    Broken: it is none.
  """
  if not isinstance(value, dict):
    raise Broken(f"{name} is not an object", value)
  return value


def check_list(value: Any, name: str, of: str) -> list:
  """A list that is not empty; `of` says of what.

  Raises:
    Broken: it is none.
  """
  if not isinstance(value, list) or not value:
    raise Broken(f"{name} is not a list of {of}", value)
  return value


class Captions:
  """Chooses what the model is to write for a photo.

  Attributes:
    source: one of `CAPTION_SOURCES`.
    rows: the rows of the written captions that could not be used.
  """

  def __init__(self, source: str, folder: epath.PathLike):
    """Reads the written captions, where they are asked for.

    Args:
      source: 'given' by the data set; 'labels', the description without the
        words before them; the whole 'description'; or 'written' to
        `photo_captions.jsonl`, whose last row of a photo counts.
      folder: the data set's.

    Raises:
      ValueError: there is no such source, or no such file.
    """
    if source not in CAPTION_SOURCES:
      raise ValueError(
        f"caption_source is {source!r}; it must be one of "
        f"{', '.join(CAPTION_SOURCES)}."
      )
    self.source = source
    self.rows: list[Row] = []
    self._written: dict[str, str] = {}
    if source == "written":
      self._read(epath.Path(folder) / CAPTION_FILE)

  def _read(self, file):
    if not file.exists():
      raise ValueError(
        f"There is no {file}, the written captions: write it with "
        "tools/caption_photos.py, or choose another caption_source."
      )

    def read_row(row):
      row = check_object(row, "a written caption")
      photo_id = check_photo_id(row.get("photo_id"))
      self._written[photo_id] = check_text(row.get("caption"), "caption")

    # One that the machine died over is a bad row, not the end of the file.
    content = file.read_bytes().strip()
    if content:
      self.rows = read_records([file], read_row).rows

  def __call__(
    self, photo_id: str, given: str | None, description: str
  ) -> str | None:
    """The caption of a photo; None where its source has none."""
    if self.source == "given":
      caption = given
    elif self.source == "labels":
      # "The photo has your dad Mark. Objects in the photo: Face, Man"
      caption = description.rpartition(_LABELS)[2]
    elif self.source == "description":
      caption = description
    else:
      caption = self._written.get(photo_id)
    return (caption or "").strip() or None


class Read(NamedTuple):
  """What stands in some files.

  Attributes:
    dialogues: by file and position, each id once.
    rows: the records that cannot be used.
    total: the number of records, those of other splits not counted.
  """

  dialogues: list[Dialogue]
  rows: list[Row]
  total: int


def read_records(
  files: Sequence[epath.Path], read_record: Callable[[Any], Dialogue | None]
) -> Read:
  """Reads the records of some files.

  Args:
    files: in order.
    read_record: gives the dialogue of a record, or None if it is not asked
      for, and raises `Broken` where it cannot be used.

  Raises:
    ValueError: a file is no list of records.
  """
  dialogues, rows, seen = [], [], set()
  for file in files:
    for position, record, error in read_items(file):
      try:
        if error:
          raise error
        dialogue = read_record(record)
      except Broken as e:
        where = str(file), position
        rows.append(Row(*where, e.reason, e.value, excerpt(record)))
        continue
      if dialogue is None:
        continue
      if dialogue.id in seen:
        unique = f"{dialogue.id} ({file.name} {position})"
        while unique in seen:
          unique += "+"
        dialogue = dataclasses.replace(dialogue, id=unique)
      seen.add(dialogue.id)
      dialogues.append(dialogue)
  return Read(dialogues, rows, len(dialogues) + len(rows))


def _place_photos(
  dialogues: Iterable[Dialogue], paths: Mapping[str, epath.Path]
) -> list[Dialogue]:
  """Gives each photo its file, where there is one."""

  def place(turn):
    path = paths.get(turn.photo.id) if turn.photo else None
    if path is None:
      return turn
    photo = dataclasses.replace(turn.photo, path=path)
    return dataclasses.replace(turn, photo=photo)

  return [
    dataclasses.replace(d, turns=tuple(map(place, d.turns)))
    if any(t.photo and t.photo.id in paths for t in d.turns)
    else d
    for d in dialogues
  ]


def list_photos(dialogues: Iterable[Dialogue]) -> list[Photo]:
  """Every photo shared, each time it is, in order."""
  return [t.photo for d in dialogues for t in d.turns if t.photo]


def finish(
  read: Read,
  split: str,
  folder: epath.PathLike,
  captions: Captions,
  max_broken: float = MAX_BROKEN,
  quarantine: Quarantine | None = None,
  find: Callable = photo_store.find,
) -> tuple[list[Dialogue], Coverage]:
  """Accounts for what was read and finds the photos' files.

  Args:
    read: the records of a split.
    split: its name.
    folder: the data set's.
    captions: those that the reader used.
    max_broken: the share of broken records, 0 to 1, that is borne.
    quarantine: takes the broken records, before anything stops.
    find: (folder, ids) -> {id: path}.

  Returns:
    The dialogues, with the files of their photos, and what was found.

  Raises:
    ValueError: too many records are broken, or none can be used.
  """
  rows = [*captions.rows, *read.rows]
  if quarantine is not None:
    quarantine.add(rows)
  what = f"of the {split} split of {folder} "
  if not read.dialogues:
    first = read.rows[0] if read.rows else "the files are empty"
    raise ValueError(f"No dialogue {what}can be used: {first}.")
  check(count_reasons(read.rows), read.total, max_broken, what)
  photos = list_photos(read.dialogues)
  asked = list(dict.fromkeys(photo.id for photo in photos))
  paths = find(folder, asked)
  missing = tuple(i for i in asked if i not in paths)
  coverage = Coverage(
    split=split,
    dialogues=len(read.dialogues),
    photos_asked=len(asked),
    photos_found=len(asked) - len(missing),
    captions_missing=sum(photo.caption is None for photo in photos),
    missing=missing,
    broken=tuple(map(str, rows)),
    reasons=tuple(count_reasons(rows).items()),
  )
  return _place_photos(read.dialogues, paths), coverage
