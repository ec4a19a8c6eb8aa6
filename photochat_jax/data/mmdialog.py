"""Reads MMDialog (Feng et al. 2023, arXiv 2211.05719).

It is given by e-mail and may not be handed on, so nothing of it is here. By
the pictures in github.com/victorsungo/MMDialog, a folder holds, for `train`,
`valid` and `test`,

    DIR/valid/conversations.json
    DIR/valid/-5632896413199993329.jpg     the photos, by media key

of records {conversation_id, conversation: [{turn: [{__TEXT__: ...},
{__MEDIA__: key}, ...]}, ...], negative_candidate_media_keys, ...}. Programs
that read it take the file for JSON lines, or for a list where somebody made
it smaller; both are read, and `conversation` as a list of lists too. Photos in
`DIR/photos` are found as those of any data set.

Turns alternate between two speakers. Their texts and photos become turns of
ours in the order they stand in, so that any number of photos may. Nothing is
said about a photo: its description is '' and its caption None, unless captions
were written (`caption_source='written'`). The candidates for retrieval are not
kept. Emoji stand as `:star:`. `Dialogue.facts` is None.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from photochat_jax.data import json_files, photo_store, records
from photochat_jax.data.json_files import Broken
from photochat_jax.data.records import MAX_BROKEN, Captions
from photochat_jax.data.schema import (
  SPLITS,
  Coverage,
  Dialogue,
  Photo,
  Turn,
)

_FILE = "conversations.json"


def _read_part(part: Any, speaker: int, captions: Captions) -> list[Turn]:
  """A text, a photo, or both."""
  part = records.check_object(part, "a part of a turn")
  text, key = part.get("__TEXT__"), part.get("__MEDIA__")
  if text is None and key is None:
    raise Broken("a part of a turn has no __TEXT__ or __MEDIA__", part)
  turns = []
  if text is not None:
    turns.append(Turn(speaker, records.check_text(text, "__TEXT__")))
  if key is not None:
    if isinstance(key, int) and not isinstance(key, bool):
      key = str(key)
    key = records.check_photo_id(key, "__MEDIA__")
    photo = Photo(key, "", captions(key, None, ""))
    turns.append(Turn(speaker, "", photo))
  return turns


def read_record(record: Any, split: str, captions: Captions) -> Dialogue:
  """Reads one record.

  Raises:
    Broken: it cannot be used.
  """
  record = records.check_object(record, "the record")
  said = records.check_list(record.get("conversation"), "conversation", "turns")
  number = records.check_id(record.get("conversation_id"), "conversation_id")
  turns = []
  for place, parts in enumerate(said):
    if isinstance(parts, dict):
      parts = parts.get("turn")
    for part in records.check_list(parts, "a turn", "texts and media"):
      turns += _read_part(part, place % 2, captions)
  return Dialogue(number, split, tuple(turns))


def _files(path: epath.Path, split: str) -> list[epath.Path]:
  """A split's files, if possible without listing a million photos."""
  for name in json_files.NAMES.get(split, ()):
    if (path / name / _FILE).exists():
      return [path / name / _FILE]
  return json_files.find_files(path, split)


def _finder(files: Sequence[epath.Path]):
  """Finds photos, also those beside the files of records."""

  def find(folder: epath.Path, ids: Iterable[str]) -> dict[str, epath.Path]:
    ids = list(ids)
    paths = photo_store.find(folder, ids)
    for parent in dict.fromkeys(file.parent for file in files):
      left = {f"{i}.jpg": i for i in ids if i not in paths}
      if left:
        there = (item.name for item in parent.iterdir())
        paths |= {left[name]: parent / name for name in there if name in left}
    return paths

  return find


def list_splits(path: epath.PathLike) -> tuple[str, ...]:
  """The splits, of `SPLITS`, that a folder has files of."""
  path = epath.Path(path)
  return tuple(s for s in SPLITS if _files(path, s))


def read_split(
  path: epath.PathLike,
  split: str,
  caption_source: str = "given",
  max_broken: float = MAX_BROKEN,
  quarantine: records.Quarantine | None = None,
) -> tuple[list[Dialogue], Coverage]:
  """Reads one split of MMDialog.

  Args:
    path: the folder.
    split: 'train', 'dev' (their `valid`) or 'test'.
    caption_source: one of `records.CAPTION_SOURCES`; none but 'written' gives
      a photo a caption.
    max_broken: the share of broken records, 0 to 1, that is borne.
    quarantine: takes what is left out.

  Returns:
    The dialogues, by file and position, and what was found.

  Raises:
    ValueError: there is nothing to read, a file is no list of dialogues, or too
      many records are broken or none can be used.
  """
  captions = Captions(caption_source, path)
  path = epath.Path(path)
  files = _files(path, split)
  if not files:
    raise ValueError(
      f"There is no {split} split of MMDialog: expected "
      f"{path / json_files.NAMES.get(split, (split,))[0] / _FILE}; the folder "
      f"has {', '.join(list_splits(path)) or 'no split at all'}."
    )
  read = records.read_records(
    files, lambda record: read_record(record, split, captions)
  )
  return records.finish(
    read, split, path, captions, max_broken, quarantine, _finder(files)
  )
