"""Reads DialogCC (Lee et al. 2024, arXiv 2212.04119): CC3M's photos in talk.

A folder holds `train.json`, `valid.json` and `test.json`, as published, or
`{split}/*.json`, or one file whose records say their `split`; each is a list, a
list under `data`, or JSON lines. A record is

  {dialogue_id: 'bst:4093', split,
   dialogue: [{utterance_idx, utterance, speaker, rationale, description,
               shared_image: [{image_url, caption}, ...]}, ...]}

Seen at huggingface.co/datasets/passing2961/dialogcc: the three files, the
fields of a record and of an utterance, speakers by first name, and that fields
are empty, not missing, where there is nothing to say. Taken from programs that
read it: images stand in an entry of their own, with an empty `utterance`, after
the utterance they go with; each has an `image_url` and a `caption`, CC3M's as
it seems. Nobody here has seen a whole file, so text and images may also share
an entry: the text comes first.

The images of an entry all fit its `description`, being those that CLIP found
nearest; they become consecutive turns of its speaker. What is to be written for
a photo is the entry's `description`, and CC3M's caption where that is empty.
Whoever speaks first is 0. `Dialogue.facts`:

  source      bst, daily, empathy, persona or wow
  rationales  [{turn, text}]: why a photo is shared, at its first turn
  captions    photo id -> CC3M's
"""

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

_OURS = {name: s for s, names in json_files.NAMES.items() for name in names}


def _text(record: dict, name: str) -> str:
  """A text that may be missing."""
  value = record.get(name)
  return "" if value is None else records.check_text(value, name)


def _read_images(
  entry: dict, captions: Captions, facts: dict[str, str]
) -> list[Photo]:
  """The photos of an entry; CC3M's captions go into `facts`."""
  images = entry.get("shared_image")
  if images is None:
    return []
  if not isinstance(images, list):
    raise Broken("shared_image is not a list of images", images)
  description = _text(entry, "description").strip()
  photos = []
  for image in images:
    image = records.check_object(image, "an image")
    url = records.check_text(image.get("image_url"), "image_url").strip()
    if not url:
      raise Broken("image_url is empty")
    photo_id = photo_store.url_id(url)
    theirs = _text(image, "caption").strip()
    if theirs:
      facts[photo_id] = theirs
    told = description or theirs
    caption = captions(photo_id, told, told)
    photos.append(Photo(photo_id, told, caption, url=url))
  return photos


def _read_speaker(entry: dict, speakers: dict[Any, int]) -> int:
  name = entry.get("speaker")
  if isinstance(name, bool) or not isinstance(name, str | int):
    raise Broken("speaker is not a name or a number", name)
  name = name.strip() if isinstance(name, str) else name
  if speakers.setdefault(name, len(speakers)) > 1:
    raise Broken("more than two speakers", list(speakers))
  return speakers[name]


def read_record(
  record: Any, split: str, captions: Captions, told: str | None = None
) -> Dialogue | None:
  """Reads one record.

  Args:
    record: any JSON value.
    split: the one asked for.
    captions: chooses the caption of a photo.
    told: the split that the record's file is of; None where it holds several.

  Returns:
    The dialogue; None if it is of another split than the one asked for.

  Raises:
    Broken: it cannot be used.
  """
  record = records.check_object(record, "the record")
  named = record.get("split", told)
  if not isinstance(named, str) or named not in _OURS:
    raise Broken("split is not train, valid or test", named)
  if told is not None and _OURS[named] != told:
    raise Broken("split is not that of the file", named)
  if _OURS[named] != split:
    return None
  entries = records.check_list(record.get("dialogue"), "dialogue", "turns")
  dialogue_id = records.check_id(record.get("dialogue_id"), "dialogue_id")
  turns, speakers, rationales, theirs = [], {}, [], {}
  for entry in entries:
    entry = records.check_object(entry, "a turn")
    speaker = _read_speaker(entry, speakers)
    photos = _read_images(entry, captions, theirs)
    if photos:
      text = _text(entry, "utterance")
    else:
      text = records.check_text(entry.get("utterance"), "utterance")
    if text or not photos:
      turns.append(Turn(speaker, text))
    if rationale := _text(entry, "rationale").strip():
      # Beside its photo, or beside the utterance that the photo follows.
      turn = len(turns) if photos else len(turns) - 1
      rationales.append({"turn": turn, "text": rationale})
    turns += [Turn(speaker, "", photo) for photo in photos]
  facts = {
    "source": dialogue_id.partition(":")[0],
    "rationales": rationales,
    "captions": theirs,
  }
  return Dialogue(dialogue_id, split, tuple(turns), facts)


def _common_files(path: epath.Path) -> list[epath.Path]:
  """Files that may hold records of every split."""
  files = json_files.list_files(path)
  return [
    f for f in files if f.stem not in _OURS and f.name != records.CAPTION_FILE
  ]


def list_splits(path: epath.PathLike) -> tuple[str, ...]:
  """The splits, of `SPLITS`, that a folder has.

  Raises:
    ValueError: it is one file for all, and no list of records.
  """
  path = epath.Path(path)
  found = {s for s in SPLITS if json_files.find_files(path, s)}
  if not found:
    items = (i for f in _common_files(path) for i in json_files.read_items(f))
    dicts = (i.record for i in items if isinstance(i.record, dict))
    names = (d.get("split") for d in dicts)
    found = {_OURS.get(n) for n in names if isinstance(n, str)}
  return tuple(s for s in SPLITS if s in found)


def read_split(
  path: epath.PathLike,
  split: str,
  caption_source: str = "given",
  max_broken: float = MAX_BROKEN,
  quarantine: records.Quarantine | None = None,
) -> tuple[list[Dialogue], Coverage]:
  """Reads one split of DialogCC.

  Args:
    path: the folder.
    split: 'train', 'dev' (their `valid`) or 'test'.
    caption_source: one of `records.CAPTION_SOURCES`; all but 'written' are the
      description, for there are no labels.
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
  files, told = json_files.find_files(path, split), split
  if not files and split in SPLITS:
    files, told = _common_files(path), None
  if not files:
    raise ValueError(
      f"There is no {split} split of DialogCC: expected "
      f"{path / json_files.NAMES.get(split, (split,))[0]}.json; the folder has "
      f"{', '.join(list_splits(path)) or 'no split at all'}."
    )
  read = records.read_records(
    files, lambda record: read_record(record, split, captions, told)
  )
  return records.finish(read, split, path, captions, max_broken, quarantine)
