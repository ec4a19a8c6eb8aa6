"""The one form that every data set is read into: dialogues of two speakers.

Readers (`photochat`, ...) make them, everything after is the same for all.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from etils import epath

SPLITS = ("train", "dev", "test")
# How many missing photos and broken records a report spells out.
_NAMED = 20


@dataclasses.dataclass(frozen=True)
class Photo:
  """A photo that someone shares.

  Attributes:
    id: `photo_id`.
    description: PhotoChat's list of labels, as it is.
    caption: what the model is to write for it; None where nothing is given.
    path: its file; None where it is missing.
  """

  id: str
  description: str
  caption: str | None
  path: epath.Path | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
  """One message, a photo, or both.

  Attributes:
    speaker: 0 or 1; in PhotoChat 0 shares the photo.
    text: the message; '' beside most photos.
    photo: the photo that is shared.
  """

  speaker: int
  text: str
  photo: Photo | None = None


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """A conversation of two.

  Attributes:
    id: unique in its split.
    split: 'train', 'dev' or 'test'.
    turns: in order; their indices are those of the record's `dialogue`.
    facts: what a generator knows about it (`data/synthetic.py`).
  """

  id: str
  split: str
  turns: tuple[Turn, ...]
  facts: dict | None = None


@dataclasses.dataclass(frozen=True)
class Coverage:
  """What was found in a split, and what was not.

  Attributes:
    split: its name.
    dialogues: dialogues that were read.
    photos_asked: different photos that they share.
    photos_found: those of them with a file.
    captions_missing: shared photos, each time counted, without a caption.
    missing: the ids of the photos without a file.
    broken: one line for each record left out: file, position, reason.
  """

  split: str
  dialogues: int
  photos_asked: int
  photos_found: int
  captions_missing: int
  missing: tuple[str, ...]
  broken: tuple[str, ...]

  def __str__(self):
    lines = [
      f"{self.split}: {self.dialogues} dialogues, {self.photos_found} of "
      f"{self.photos_asked} photos found, {self.captions_missing} photos "
      f"shared without a caption, {len(self.broken)} records left out"
    ]
    for what, names in (("missing", self.missing), ("left out", self.broken)):
      lines += [f"  {what}: {name}" for name in names[:_NAMED]]
      if len(names) > _NAMED:
        lines.append(f"  {what}: and {len(names) - _NAMED} more")
    return "\n".join(lines)


def shared_photos(
  splits: Mapping[str, Sequence[Dialogue]],
) -> dict[str, tuple[str, ...]]:
  """The photos that more than one split shares.

  Args:
    splits: name of a split -> its dialogues.

  Returns:
    photo id -> the names of its splits.
  """
  where: dict[str, dict[str, None]] = {}
  for name, dialogues in splits.items():
    for dialogue in dialogues:
      for turn in dialogue.turns:
        if turn.photo:
          where.setdefault(turn.photo.id, {})[name] = None
  return {i: tuple(names) for i, names in where.items() if len(names) > 1}
