"""Reads dialogues in PhotoChat's layout (Zang et al. 2021, arXiv 2108.01453).

A folder holds `{train,dev,test}/*.json` and photos (`data/photo_store.py`).
Each file is a list of records

  {dialogue: [{message, share_photo, user_id}, ...], dialogue_id,
   photo_description, photo_url, photo_id}

as google-research/google-research, `multimodalchat/README.md`, describes them
and tests/data/photochat_sample shows. `dialogue_id` restarts in each split;
`photo_url` is Flickr's, mostly dead: the photo's file comes from Open Images by
`photo_id`.

A turn that shares a photo may carry its own `photo_id`, `photo_description`,
`photo_url` and `photo_caption`; where it does not, the record's count.
Generated data keep facts about a dialogue under `synthetic`.
"""

from collections.abc import Mapping
from typing import Any

from etils import epath

from photochat_jax.data import records
from photochat_jax.data.json_files import Broken
from photochat_jax.data.records import CAPTION_SOURCES, MAX_BROKEN, Captions
from photochat_jax.data.schema import (
  SPLITS,
  Coverage,
  Dialogue,
  Photo,
  Turn,
)

__all__ = ["CAPTION_SOURCES", "list_splits", "read_record", "read_split"]

_NO_ID = (
  "a photo is shared but there is no photo_id, as in early revisions of "
  "PhotoChat: use the current files"
)


def _read_photo(record: Mapping, turn: Mapping, captions: Captions) -> Photo:
  """The photo that a turn shares, its file not looked for yet."""
  photo_id = turn.get("photo_id")
  if photo_id is None:
    photo_id = record.get("photo_id")
  if photo_id is None:
    raise Broken(_NO_ID)
  photo_id = records.check_photo_id(photo_id)
  # The record's words are about its own photo.
  shared = record if photo_id == record.get("photo_id") else {}

  def get(name):
    value = turn.get(name)
    value = shared.get(name) if value is None else value
    return None if value is None else records.check_text(value, name)

  description = get("photo_description") or ""
  caption = captions(photo_id, get("photo_caption"), description)
  return Photo(photo_id, description, caption, url=get("photo_url") or "")


def _read_turn(record: Mapping, turn: Any, captions: Captions) -> Turn:
  turn = records.check_object(turn, "a turn")
  speaker, shares = turn.get("user_id"), turn.get("share_photo")
  if isinstance(speaker, bool) or speaker not in (0, 1):
    raise Broken("user_id is not 0 or 1", speaker)
  if not isinstance(shares, bool):
    raise Broken("share_photo is not true or false", shares)
  text = records.check_text(turn.get("message"), "message")
  photo = _read_photo(record, turn, captions) if shares else None
  return Turn(int(speaker), text, photo)


def _read_facts(facts: Any, turns: int) -> dict | None:
  """What `data/synthetic.py` wrote; looked up without asking afterwards."""
  if facts is None:
    return None
  records.check_object(facts, "synthetic")
  photos, questions = facts.get("photos", {}), facts.get("questions", [])
  fits = isinstance(photos, dict) and isinstance(questions, list)
  fits = fits and all(isinstance(photo, dict) for photo in photos.values())
  fits = fits and all(
    isinstance(asked, dict)
    and type(asked.get("turn")) is int
    and 0 < asked["turn"] < turns
    and isinstance(asked.get("photo_id"), str)
    for asked in questions
  )
  if not fits:
    raise Broken("synthetic is not as data/synthetic.py writes it", facts)
  return facts


def read_record(record: Any, split: str, captions: Captions) -> Dialogue:
  """Reads one record of a file.

  Raises:
    Broken: it cannot be used.
  """
  record = records.check_object(record, "the record")
  turns = records.check_list(record.get("dialogue"), "dialogue", "turns")
  number = records.check_id(record.get("dialogue_id"), "dialogue_id")
  facts = _read_facts(record.get("synthetic"), len(turns))
  turns = tuple(_read_turn(record, turn, captions) for turn in turns)
  return Dialogue(number, split, turns, facts)


def list_splits(path: epath.PathLike) -> tuple[str, ...]:
  """The splits, of `SPLITS`, that a folder has files of."""
  path = epath.Path(path)
  return tuple(s for s in SPLITS if any((path / s).glob("*.json")))


def read_split(
  path: epath.PathLike,
  split: str,
  caption_source: str = "given",
  max_broken: float = MAX_BROKEN,
  quarantine: records.Quarantine | None = None,
) -> tuple[list[Dialogue], Coverage]:
  """Reads one split of a folder in PhotoChat's layout.

  A record that cannot be used is left out and reported. A photo without a file
  stays in its turn, with `path` None.

  Args:
    path: the folder.
    split: 'train', 'dev' or 'test'.
    caption_source: one of `CAPTION_SOURCES`; 'given' is `photo_caption`, the
      description is `photo_description`, a list of labels.
    max_broken: the share of broken records, 0 to 1, that is borne.
    quarantine: takes what is left out.

  Returns:
    The dialogues, by file name and position, and what was found.

  Raises:
    ValueError: there is nothing to read, a file is no list of dialogues, too
      many records are broken or none can be used, or the files are an early
      revision without `photo_id`.
  """
  captions = Captions(caption_source, path)
  path = epath.Path(path)
  files = sorted((path / split).glob("*.json"))
  if not files:
    raise ValueError(
      f"There is no {split} split: expected {path / split}/*.json; the folder "
      f"has {', '.join(list_splits(path)) or 'no split at all'}."
    )
  read = records.read_records(
    files, lambda record: read_record(record, split, captions)
  )
  early = any(row.reason == _NO_ID for row in read.rows)
  if early and not records.list_photos(read.dialogues):
    raise ValueError(
      f"{path / split} shares photos but has no photo_id: it is an early "
      "revision of PhotoChat; use the current files."
    )
  return records.finish(read, split, path, captions, max_broken, quarantine)
