"""The one form that every data set is read into: dialogues of two speakers.

Readers (`photochat`, `dialogcc`, `photochat_plus`, `mmdialog`; by name in
`sources`) make them, everything after is the same for all. Units, here and
everywhere in `data/`: a split is one of `SPLITS`, whatever its files call it;
a turn is counted from 0 in `Dialogue.turns`; a photo is its id, and two turns
with one id share one photo; texts are Unicode without lone surrogates, as they
were published.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

SPLITS = ("train", "dev", "test")
# How many missing photos and broken records a report spells out.
_NAMED = 20


@dataclasses.dataclass(frozen=True)
class Photo:
  """A photo that someone shares.

  Attributes:
    id: what it is called in its folder: PhotoChat's `photo_id`, MMDialog's
      media key, `photo_store.url_id` of a URL.
    description: what the data set says of it: PhotoChat's list of labels,
      DialogCC's description; '' where it says nothing.
    caption: what the model is to write for it; None where nothing is given.
    path: its file; None where it is missing.
    url: where it was published; '' where the data set does not say.
    seen: what a captioner says of it, for a model that reads this in place of
      the photo; None where nothing does.
  """

  id: str
  description: str
  caption: str | None
  path: epath.Path | None = None
  url: str = ""
  seen: str | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
  """One message, a photo, or both: then the message comes first.

  Attributes:
    speaker: 0 or 1; in PhotoChat 0 shares the photo, elsewhere 0 speaks first.
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
    turns: in order. In PhotoChat's layout their indices are those of the
      record's `dialogue`; elsewhere an utterance with photos is several turns.
    facts: what else is known about it, as JSON: `synthetic`, or what the
      module of its reader lists.
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
    missing: the ids of the photos without a file. Where each can be fetched
      stands in its `Photo.url`.
    broken: one line for each record left out: file, position, reason.
    reasons: how many records were left out for which reason, commonest first.
  """

  split: str
  dialogues: int
  photos_asked: int
  photos_found: int
  captions_missing: int
  missing: tuple[str, ...]
  broken: tuple[str, ...]
  reasons: tuple[tuple[str, int], ...] = ()

  def __str__(self):
    lines = [
      f"{self.split}: {self.dialogues} dialogues, {self.photos_found} of "
      f"{self.photos_asked} photos found, {self.captions_missing} photos "
      f"shared without a caption, {len(self.broken)} records left out"
    ]
    lines += [f"  left out {n} times: {reason}" for reason, n in self.reasons]
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


def digest(dialogues: Iterable[Dialogue]) -> str:
  """SHA-256 of what is said and shown, photos' files read; hexadecimal."""
  total = hashlib.sha256()
  for dialogue in dialogues:
    total.update(repr((dialogue.id, dialogue.split)).encode())
    for turn in dialogue.turns:
      photo = turn.photo
      seen = photo and (photo.id, photo.description, photo.caption)
      total.update(repr((turn.speaker, turn.text, seen)).encode())
      if photo and photo.path:
        total.update(epath.Path(photo.path).read_bytes())
  return total.hexdigest()


def captions_digest(dialogues: Iterable[Dialogue]) -> str | None:
  """SHA-256 of what captioners said of the photos; None where nobody did."""
  said = [
    (turn.photo.id, turn.photo.seen)
    for dialogue in dialogues
    for turn in dialogue.turns
    if turn.photo and turn.photo.seen is not None
  ]
  return hashlib.sha256(repr(said).encode()).hexdigest() if said else None


def number(name: str) -> int:
  """A number below 2**32 that keys what is random about a thing of a name."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
