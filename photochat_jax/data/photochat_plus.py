"""Reads PhotoChat++, a test set of 968 dialogues with what people saw in them.

Lee et al. 2023, "Large Language Models can Share Images, Too!", arXiv
2310.14804. One file, `photochat_plus.json`, is a list of PhotoChat's records
(see `data/photochat.py`) with four lists of texts more:

  {dialogue, dialogue_id, photo_id, photo_url, photo_description,
   intents, trigger_sentences, image_descriptions, salient_information}

The names and lengths (1-6 intents, 1-5 trigger sentences, 2-3 descriptions, 1-9
pieces of information) are those of the data set's page at
huggingface.co/datasets/passing2961/photochat_plus, which calls the one split
`train`; here it is 'test', for that is what it is for. The six labels are those
of `eval.py` in passing2961/DribeR, read without regard for capitals; 'human
and entertainment' is a slip that it knows of.

`Dialogue.facts`:

  intents       those of `INTENTS` that people chose, as often as they did
  other_intents labels that are none of the six
  triggers      [{text, turn}]: sentences that called for the photo; `turn` is
                the last one before it that says so, or None
  descriptions  what people expected to see
  salient       words and phrases that matter for the photo
"""

from typing import Any

from etils import epath

from photochat_jax.data import photochat, records
from photochat_jax.data.json_files import Broken
from photochat_jax.data.records import MAX_BROKEN, Captions
from photochat_jax.data.schema import Coverage, Dialogue, Turn

INTENTS = (
  "information dissemination",
  "social bonding",
  "humor and entertainment",
  "visual clarification",
  "topic transition",
  "expression of emotion or opinion",
)
_SLIPS = {"human and entertainment": "humor and entertainment"}


def _texts(record: dict, name: str) -> list[str]:
  value = record.get(name)
  if not isinstance(value, list):
    raise Broken(f"{name} is not a list of texts", value)
  return [records.check_text(item, f"a text of {name}") for item in value]


def _plain(text: str) -> str:
  return " ".join(text.casefold().split())


def _find_turn(sentence: str, turns: tuple[Turn, ...]) -> int | None:
  """The last turn before the first photo that says a sentence."""
  photo = (i for i, turn in enumerate(turns) if turn.photo)
  before = turns[: next(photo, len(turns))]
  same = (i for i, t in enumerate(before) if _plain(t.text) == _plain(sentence))
  return max(same, default=None)


def read_record(record: Any, captions: Captions) -> Dialogue:
  """Reads one record of the file.

  Raises:
    Broken: it cannot be used.
  """
  record = records.check_object(record, "the record")
  labels = [_plain(text) for text in _texts(record, "intents")]
  labels = [_SLIPS.get(label, label) for label in labels]
  if not labels:
    raise Broken("intents is empty")
  descriptions = _texts(record, "image_descriptions")
  if descriptions and record.get("photo_caption") is None:
    record = record | {"photo_caption": descriptions[0]}
  dialogue = photochat.read_record(record, "test", captions)
  facts = {
    "intents": [label for label in labels if label in INTENTS],
    "other_intents": [label for label in labels if label not in INTENTS],
    "triggers": [
      {"text": text, "turn": _find_turn(text, dialogue.turns)}
      for text in _texts(record, "trigger_sentences")
    ],
    "descriptions": descriptions,
    "salient": _texts(record, "salient_information"),
  }
  return Dialogue(dialogue.id, "test", dialogue.turns, facts)


def _files(path: epath.Path) -> list[epath.Path]:
  for name in ("photochat_plus.json", "test.json"):
    if (path / name).exists():
      return [path / name]
  return sorted((path / "test").glob("*.json"))


def list_splits(path: epath.PathLike) -> tuple[str, ...]:
  """'test', if a folder has the file."""
  return ("test",) if _files(epath.Path(path)) else ()


def read_split(
  path: epath.PathLike,
  split: str = "test",
  caption_source: str = "given",
  max_broken: float = MAX_BROKEN,
  quarantine: records.Quarantine | None = None,
) -> tuple[list[Dialogue], Coverage]:
  """Reads PhotoChat++.

  Args:
    path: the folder of `photochat_plus.json`; a `test.json` or `test/*.json`
      will do.
    split: 'test'.
    caption_source: one of `records.CAPTION_SOURCES`; 'given' is the first of
      `image_descriptions`, the description is PhotoChat's list of labels.
    max_broken: the share of broken records, 0 to 1, that is borne.
    quarantine: takes what is left out.

  Returns:
    The dialogues and what was found.

  Raises:
    ValueError: another split is asked for, there is nothing to read, a file is
      no list of dialogues, or too many records are broken or none can be used.
  """
  if split != "test":
    raise ValueError(
      f"PhotoChat++ has no {split} split: it is a test set; read 'test', and "
      "train on another data set."
    )
  captions = Captions(caption_source, path)
  path = epath.Path(path)
  files = _files(path)
  if not files:
    raise ValueError(
      f"There is no PhotoChat++: expected {path / 'photochat_plus.json'}."
    )
  read = records.read_records(
    files, lambda record: read_record(record, captions)
  )
  return records.finish(read, split, path, captions, max_broken, quarantine)
