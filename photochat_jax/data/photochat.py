"""Reads dialogues in PhotoChat's layout (Zang et al. 2021, arXiv 2108.01453).

A folder holds `{train,dev,test}/*.json` and `photos/{photo_id}.jpg`. Each file
is a list of records

  {dialogue: [{message, share_photo, user_id}, ...], dialogue_id,
   photo_description, photo_url, photo_id}

A turn that shares a photo may carry its own `photo_id`, `photo_description` and
`photo_caption`; where it does not, the record's count. Generated data keep
facts about a dialogue under `synthetic`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from photochat_jax.data.schema import (
  SPLITS,
  Coverage,
  Dialogue,
  Photo,
  Turn,
)

CAPTION_SOURCES = ("given", "labels", "description")
_LABELS = "Objects in the photo:"
# What file systems allow, less the suffix.
_NAME_BYTES = 250


class _Broken(ValueError):
  """One record cannot be used."""


def _text(value: Any, name: str) -> str:
  if not isinstance(value, str):
    raise _Broken(f"{name} is {value!r:.40}, not a text")
  # JSON may hold half of a surrogate pair, which cannot be written anywhere.
  return value.encode("utf-8", "replace").decode("utf-8")


def _photo_id(value: Any) -> str:
  """A photo's id, which becomes part of a path."""
  value = _text(value, "photo_id")
  parts = value.split("/")
  too_long = any(len(part.encode()) > _NAME_BYTES for part in parts)
  if too_long or set(value) & {"\\", "\0"} or set(parts) & {"", ".", ".."}:
    raise _Broken(f"photo_id {value!r:.60} is no path below photos/")
  return value


def _caption(source: str, caption: str | None, description: str) -> str | None:
  """The caption of a photo, by one of `CAPTION_SOURCES`."""
  if source == "labels":
    # "The photo has your dad Mark. Objects in the photo: Face, Man"
    caption = description.rpartition(_LABELS)[2]
  elif source == "description":
    caption = description
  return (caption or "").strip() or None


def _read_photo(record: Mapping, turn: Mapping, source: str) -> Photo:
  """The photo that a turn shares, its file not looked for yet."""
  if turn.get("photo_id") is None and record.get("photo_id") is None:
    raise _Broken(
      "a photo is shared but there is no photo_id, as in early revisions of "
      "PhotoChat: use the current files"
    )
  own = turn.get("photo_id")
  photo_id = _photo_id(record["photo_id"] if own is None else own)
  # The record's words are about its own photo.
  shared = record if photo_id == record.get("photo_id") else {}

  def get(name):
    value = turn.get(name)
    value = shared.get(name) if value is None else value
    return None if value is None else _text(value, name)

  description = get("photo_description") or ""
  caption = _caption(source, get("photo_caption"), description)
  return Photo(photo_id, description, caption)


def _read_turn(record: Mapping, turn: Any, source: str) -> Turn:
  if not isinstance(turn, dict):
    raise _Broken(f"a turn is {turn!r:.40}, not an object")
  speaker, shares = turn.get("user_id"), turn.get("share_photo")
  if isinstance(speaker, bool) or speaker not in (0, 1):
    raise _Broken(f"user_id is {speaker!r:.40}, not 0 or 1")
  if not isinstance(shares, bool):
    raise _Broken(f"share_photo is {shares!r:.40}, not true or false")
  photo = _read_photo(record, turn, source) if shares else None
  return Turn(int(speaker), _text(turn.get("message"), "message"), photo)


def _read_record(record: Any, split: str, source: str) -> Dialogue:
  if not isinstance(record, dict):
    raise _Broken(f"it is {record!r:.40}, not an object")
  turns = record.get("dialogue")
  if not isinstance(turns, list) or not turns:
    raise _Broken(f"dialogue is {turns!r:.40}, not a list of turns")
  number = record.get("dialogue_id")
  if isinstance(number, bool) or not isinstance(number, int | str):
    raise _Broken(f"dialogue_id is {number!r:.40}, not a number or a text")
  facts = record.get("synthetic")
  if facts is not None and not isinstance(facts, dict):
    raise _Broken(f"synthetic is {facts!r:.40}, not an object")
  turns = tuple(_read_turn(record, turn, source) for turn in turns)
  return Dialogue(_text(str(number), "dialogue_id"), split, turns, facts)


def _read_json(file: epath.Path) -> list:
  try:
    records = json.loads(file.read_bytes().decode("utf-8-sig"))
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{file} is not JSON ({e}): fetch it again.") from e
  if not isinstance(records, list):
    raise ValueError(f"{file} is not a list of dialogues.")
  return records


def _early_revision(records: Iterable) -> bool:
  """Whether photos are shared and no record or turn names any."""
  shares = False
  for record in records:
    turns = record.get("dialogue") if isinstance(record, dict) else None
    if not isinstance(turns, list):
      continue
    turns = [turn for turn in turns if isinstance(turn, dict)]
    if any("photo_id" in item for item in (record, *turns)):
      return False
    shares = shares or any(turn.get("share_photo") is True for turn in turns)
  return shares


def _find_photos(
  dialogues: Sequence[Dialogue], folder: epath.Path
) -> tuple[list[Dialogue], list[str], list[str]]:
  """Gives each photo its file; also the ids that are there and those not."""
  asked = {t.photo.id: None for d in dialogues for t in d.turns if t.photo}
  # One listing of a folder instead of a question per photo: on a bucket, the
  # difference between a second and many minutes.
  parents = {pathlib.PurePosixPath(photo_id).parent for photo_id in asked}
  there = set()
  for parent in parents:
    place = folder / "photos" / parent
    if place.is_dir():
      there.update((parent / item.name).as_posix() for item in place.iterdir())
  found = [i for i in asked if f"{i}.jpg" in there]
  paths = {i: folder / "photos" / f"{i}.jpg" for i in found}

  def place_photo(turn):
    path = paths.get(turn.photo.id) if turn.photo else None
    if path is None:
      return turn
    photo = dataclasses.replace(turn.photo, path=path)
    return dataclasses.replace(turn, photo=photo)

  placed = [
    dataclasses.replace(d, turns=tuple(map(place_photo, d.turns)))
    for d in dialogues
  ]
  return placed, found, [i for i in asked if i not in paths]


def list_splits(path: epath.PathLike) -> tuple[str, ...]:
  """The splits, of `SPLITS`, that a folder has files of."""
  path = epath.Path(path)
  return tuple(s for s in SPLITS if any((path / s).glob("*.json")))


def read_split(
  path: epath.PathLike, split: str, caption_source: str = "given"
) -> tuple[list[Dialogue], Coverage]:
  """Reads one split of a folder in PhotoChat's layout.

  A record that cannot be used is left out and reported. A photo without a file
  stays in its turn, with `path` None.

  Args:
    path: the folder.
    split: 'train', 'dev' or 'test'.
    caption_source: 'given' (`photo_caption`), 'labels' (the description's
      labels alone) or 'description' (all of it).

  Returns:
    The dialogues, by file name and position, and what was found.

  Raises:
    ValueError: there is nothing to read, a file is no list of dialogues, no
      record can be used, or the files are an early revision without `photo_id`.
  """
  if caption_source not in CAPTION_SOURCES:
    raise ValueError(
      f"caption_source is {caption_source!r}; it must be one of "
      f"{', '.join(CAPTION_SOURCES)}."
    )
  path = epath.Path(path)
  files = sorted((path / split).glob("*.json"))
  if not files:
    raise ValueError(
      f"There is no {split} split: expected {path / split}/*.json; the folder "
      f"has {', '.join(list_splits(path)) or 'no split at all'}."
    )
  dialogues, broken, seen = [], [], set()
  for file in files:
    records = _read_json(file)
    if _early_revision(records):
      raise ValueError(
        f"{file} shares photos but has no photo_id: it is an early revision of "
        "PhotoChat; use the current files."
      )
    for position, record in enumerate(records):
      try:
        dialogue = _read_record(record, split, caption_source)
      except _Broken as e:
        broken.append(f"{file.name} record {position}: {e}")
        continue
      if dialogue.id in seen:
        unique = f"{dialogue.id} ({file.name} record {position})"
        dialogue = dataclasses.replace(dialogue, id=unique)
      seen.add(dialogue.id)
      dialogues.append(dialogue)
  if not dialogues:
    first = broken[0] if broken else "the files are empty"
    raise ValueError(f"No dialogue of {path / split} can be used: {first}.")
  dialogues, found, missing = _find_photos(dialogues, path)
  photos = [t.photo for d in dialogues for t in d.turns if t.photo]
  coverage = Coverage(
    split=split,
    dialogues=len(dialogues),
    photos_asked=len(found) + len(missing),
    photos_found=len(found),
    captions_missing=sum(photo.caption is None for photo in photos),
    missing=tuple(missing),
    broken=tuple(broken),
  )
  return dialogues, coverage
