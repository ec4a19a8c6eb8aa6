"""Dialogues -> indexed examples: everything tokenised and aligned once.

12,286 dialogues of PhotoChat's size take 4 to 5 seconds on one core, so an
index is kept in memory only: one on the disk would save a restart less than
compiling takes, and could be stale.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from photochat_jax.data import dialogue as dialogue_lib
from photochat_jax.data import schema, vocabulary
from photochat_jax.data.spec import DataSpec, LeftOut

_INDICES_KEPT = 4
_indices: collections.OrderedDict[str, "Index"] = collections.OrderedDict()


class AlignedCaption(NamedTuple):
  """What the bridge needs of a caption; the alignment without its zeros."""

  clip_tokens: np.ndarray  # int32[m]
  alignment: np.ndarray  # float32[slots that are used, caption tokens]
  final: np.ndarray  # bool[caption tokens]


class Indexed(NamedTuple):
  """An example with all that a batch takes from it.

  `photo_ids` name the photos the model sees, `caption_ids` those it shares;
  both are unique for (dialogue, photo, side) and do not depend on the spec.
  `name` is for people: the dialogue's id and whose side is the model's.
  """

  example: dialogue_lib.Example
  aligned: tuple[AlignedCaption, ...]
  photo_ids: tuple[int, ...]
  caption_ids: tuple[int, ...]
  name: str


class Index(NamedTuple):
  """Every example of some dialogues, and what became of the rest.

  `next_id` is the first number that no photo of these dialogues has.
  """

  examples: list[Indexed]
  counts: collections.Counter
  next_id: int


def build_index(
  dialogues: Sequence[schema.Dialogue],
  spec: DataSpec,
  llm_tokenizer: Any,
  clip_tokenizer: Any,
  first_id: int = 0,
) -> Index:
  """Encodes each dialogue from each of its sides.

  The last few indices are kept in memory, by the dialogues' content, the
  tokenizers' digests and what the spec says of layout, so that stages which
  share data share the work.

  Args:
    dialogues: of one set.
    spec: the layout.
    llm_tokenizer: the language model's.
    clip_tokenizer: the text encoder's.
    first_id: the first number given to a photo, so that sets which are mixed
      have different ones.
  """
  layout = (
    spec.length, spec.photos_in, spec.photos_out, spec.num_visual_tokens,
    spec.caption_tokens, spec.template, spec.system_prompt, spec.text_on,
  )  # fmt: skip
  digest = hashlib.sha256(
    repr(
      (
        layout,
        llm_tokenizer.digest,
        clip_tokenizer.digest,
        clip_tokenizer.max_length,
        clip_tokenizer.pad_id,
        first_id,
      )
    ).encode()
  )
  for dialogue in dialogues:
    digest.update(repr((dialogue.id, dialogue.turns)).encode())
  key = digest.hexdigest()
  if key not in _indices:
    while len(_indices) >= _INDICES_KEPT:
      _indices.popitem(last=False)
    _indices[key] = _build_index(
      dialogues, spec, _Remembering(llm_tokenizer), clip_tokenizer, first_id
    )
  _indices.move_to_end(key)
  return _indices[key]


def forget() -> None:
  """Lets go of the indices in memory."""
  _indices.clear()


class _Remembering:
  """A tokenizer that encodes a text once: both sides of a dialogue read it."""

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    self.encode = functools.cache(tokenizer.encode)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._tokenizer, name)


def _build_index(
  dialogues, spec, llm_tokenizer, clip_tokenizer, next_id
) -> Index:
  examples, counts = [], collections.Counter(dialogues=len(dialogues))
  align = functools.cache(
    lambda ids: _align(llm_tokenizer, clip_tokenizer, ids)
  )
  for dialogue in dialogues:
    sides = sorted({turn.speaker for turn in dialogue.turns})
    for rank, side in enumerate(sides):
      try:
        example = dialogue_lib.encode_example(
          dialogue.turns, side, llm_tokenizer, spec
        )
      except LeftOut as e:
        counts[f"left_out/{e.reason}"] += 1
        continue

      captions = example.captions
      first = next_id + rank
      examples.append(
        Indexed(
          example,
          tuple(align(tuple(c.tokens.tolist())) for c in captions),
          tuple(first + len(sides) * i for i in example.ordinals),
          tuple(first + len(sides) * c.ordinal for c in captions),
          f"dialogue {dialogue.id} side {side}",
        )
      )
      counts["examples"] += 1
      counts["tokens"] += len(example.tokens)
      counts["loss_tokens"] += int(np.count_nonzero(example.loss_kind))
      counts["photos_in"] += len(example.photos)
      counts["photos_out"] += len(captions)
      counts["photos_out_missing"] += sum(
        c.photo.path is None for c in captions
      )
      counts["captions_cut"] += sum(c.cut for c in captions)
      counts["turns_cut"] += example.cut_turns
      counts["examples_cut"] += example.cut_turns > 0
    photos = sum(turn.photo is not None for turn in dialogue.turns)
    next_id += photos * len(sides)
  return Index(examples, counts, next_id)


def _align(llm_tokenizer, clip_tokenizer, ids) -> AlignedCaption:
  z, a, final = vocabulary.align(
    llm_tokenizer, clip_tokenizer, list(ids), llm_tokenizer.decode(list(ids))
  )
  used = np.flatnonzero(a.any(axis=1))
  last = used[-1] + 1 if used.size else 0
  # A copy, so that the zeros are let go.
  return AlignedCaption(z, a[:last].copy(), final)


class Picture(NamedTuple):
  """A photo with a file, of the kinds 'captions' and 'photos'."""

  photo: schema.Photo
  number: int  # the order of first being shared: its example id
  caption: str | None  # the one that names everything, where there is one


def as_questions(
  dialogues: Sequence[schema.Dialogue],
) -> list[schema.Dialogue]:
  """Every captioned photo as a dialogue of its own, to learn to see with.

  The photo is shown, the model describes it (BLIP-2's image-grounded text
  generation, arXiv 2301.12597, section 3.2), and then answers what the
  photo's dialogue asks of it, where `facts` say which messages do.
  """
  asked: dict[str, tuple[schema.Turn, ...]] = {}
  for dialogue in dialogues:
    for question in (dialogue.facts or {}).get("questions", ()):
      answer = question["turn"]
      before, after = (dialogue.turns[i].text for i in (answer - 1, answer))
      asked[question["photo_id"]] = (
        *asked.get(question["photo_id"], ()),
        schema.Turn(1, before),
        schema.Turn(0, after),
      )
  return [
    schema.Dialogue(
      id=photo.id,
      split="",
      turns=(
        schema.Turn(1, "", dataclasses.replace(photo, caption=None)),
        schema.Turn(0, caption),
        *asked.get(photo.id, ()),
      ),
    )
    for photo, _, caption in list_pictures(dialogues, captioned=True)
  ]


def list_pictures(
  dialogues: Sequence[schema.Dialogue], captioned: bool, first_id: int = 0
) -> list[Picture]:
  """Every photo with a file once; `captioned` drops those without a caption.

  They are numbered from `first_id` on. Under `facts`, a synthetic dialogue
  says a caption that names everything.
  """
  found: dict[str, Picture] = {}
  for dialogue in dialogues:
    facts = (dialogue.facts or {}).get("photos", {})
    for turn in dialogue.turns:
      photo = turn.photo
      if photo is None or photo.path is None or photo.id in found:
        continue
      full = facts.get(photo.id, {}).get("full_caption")
      number = first_id + len(found)
      found[photo.id] = Picture(photo, number, full or photo.caption)
  return [p for p in found.values() if p.caption or not captioned]
