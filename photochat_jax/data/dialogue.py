r"""Turns -> tokens, masks and photo slots: the sequence a model reads.

A dialogue is trained from each speaker's side. Consecutive turns of one side
are one turn. As sharer the model writes `[img] caption [/img]` and then sees
its own photo (K visual slots); as partner the photo arrives as visual slots
with no caption. Template `llama2`, one round of a dialogue, K = 2, n = 4:

    position  0   1      2  3  4  5       6   7     8 9   10     11 12 13
    token     <s> [INST] hi .  .  [/INST] see [img] a cat [/img] .  .  </s>
    visual                  0  1                                 2  3
    loss_kind 0   0      0  0  0  0       1   2     2 2   2      0  0  1
    caption                                         ^ ^
                a partner's photo   |      caption_index = 7, 8: the
                has slots only -----+      positions *before* `a`, `cat`

`loss_kind` stands at the token that is the target (predicted one position
before): 1 is the model's text and end of turn, 2 its caption with both marks;
the other side and visual slots (padding ids) bear no loss. With
`text_on='all'`, the released code's way, the other side's text and the
template bear loss 1 too, all but the first token. The next round follows with
its own `<s>`; positions run on. If the model speaks first, an empty turn of
the other side stands before it.

Where the model has no visual tokens (K = 0) it reads a partner's photo as text,
`(photo: ...)` with what a captioner says of it (`Photo.seen`), and its own as
the caption it wrote.

What stands around turns is the template's, see `data/spec.py`. Everything is
built from ids and each turn is encoded by itself, its texts as if joined with
a space, so a prompt is a prefix of the example it was cut from. What a user
types gives neither a control id nor a mark: marks are broken with a space.

Source: Guo et al. 2024 (arXiv 2408.08650), section 3.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from photochat_jax.data import schema
from photochat_jax.data.spec import (
  DataSpec,
  LeftOut,
  encode_after,
  make_template,
)

# Values of `loss_kind`.
NONE, TEXT, CAPTION = 0, 1, 2


class Spoken(NamedTuple):
  """Consecutive turns of one speaker, `turns[start:stop]`.

  `parts` are stripped texts and photos in order; a turn's text stands before
  its photo and empty texts are dropped.
  """

  speaker: int
  start: int
  stop: int
  parts: tuple[str | schema.Photo, ...]


class Caption(NamedTuple):
  """A caption the model writes: strictly what is between the marks."""

  photo: schema.Photo
  ordinal: int  # counts the dialogue's photos, whoever shares them
  start: int  # position of its first token
  tokens: np.ndarray  # int32[at most n]
  cut: bool  # the caption went on


@dataclasses.dataclass(frozen=True)
class Context:
  """What the model has read when its turn begins.

  Attributes:
    tokens: int32[T]; the padding id at visual slots.
    visual_index: int32[T]; p * K + k for visual token k of `photos[p]`, or -1.
    photos: those that have visual slots.
    ordinals: which of the dialogue's photos each of them is.
    cut_turns: merged turns dropped, wholly or in part, to fit.
    missing_photos: photos of the other side that have no file, so no slots,
      or that were not captioned, so no words.
  """

  tokens: np.ndarray
  visual_index: np.ndarray
  photos: tuple[schema.Photo, ...]
  ordinals: tuple[int, ...]
  cut_turns: int
  missing_photos: int


@dataclasses.dataclass(frozen=True)
class Example(Context):
  """A dialogue from one side, to train on.

  Attributes:
    loss_kind: int8[T], `NONE`, `TEXT` or `CAPTION`.
    captions: in order.
  """

  loss_kind: np.ndarray
  captions: tuple[Caption, ...]


class _Piece(NamedTuple):
  """A text or a photo of one side's turn."""

  tokens: Sequence[int]
  slots: int = 0
  text: str = ""
  photo: schema.Photo | None = None
  ordinal: int = -1
  cut: bool = False


class _Turn(NamedTuple):
  own: bool
  pieces: Sequence[_Piece]


def merge_turns(turns: Iterable[schema.Turn]) -> list[Spoken]:
  """Joins consecutive turns of one speaker; drops turns that say nothing."""
  merged: list[Spoken] = []
  for i, turn in enumerate(turns):
    text = turn.text.strip()
    parts = ((text,) if text else ()) + ((turn.photo,) if turn.photo else ())
    if not parts:
      continue
    if merged and merged[-1].speaker == turn.speaker:
      last = merged[-1]
      merged[-1] = last._replace(stop=i + 1, parts=last.parts + parts)
    else:
      merged.append(Spoken(turn.speaker, i, i + 1, parts))
  return merged


def encode_example(
  turns: Sequence[schema.Turn], side: int, tokenizer: Any, spec: DataSpec
) -> Example:
  """A dialogue from one speaker's side, as a training example.

  Where only the model's own text is trained, what the other side says after
  the model's last turn teaches nothing and is not in it. An over-long dialogue
  keeps its newest turns.

  Args:
    turns: of the whole dialogue.
    side: the speaker the model plays.
    tokenizer: the language model's, `data.tokenizers.LLMTokenizer`.
    spec: shapes and template.

  Raises:
    LeftOut: the side says nothing ('silent'), was shown a photo without a
      file ('missing_photo'), shares one without a caption ('no_caption'), or
      a single piece of its last turn does not fit ('too_long').
  """
  template = make_template(spec, tokenizer)
  sided = _sided(turns, side, tokenizer, spec, template)
  if not any(turn.own for turn in sided):
    raise LeftOut("silent", f"Speaker {side} says nothing; drop this side.")
  while spec.text_on == "model" and not sided[-1].own:
    sided.pop()

  lay_out = functools.partial(
    _lay_out,
    tokenizer=tokenizer,
    template=template,
    closed=True,
    text_on=spec.text_on,
  )
  example = _newest(sided, spec, spec.length, lay_out)
  if example.missing_photos:
    lacks = "a file; fetch the photo"
    if not spec.num_visual_tokens:
      lacks = "a caption to read; run tools/caption_photos.py"
    raise LeftOut(
      "missing_photo", f"Speaker {side} is shown a photo without {lacks}."
    )
  return example


def encode_context(
  turns: Sequence[schema.Turn],
  side: int,
  tokenizer: Any,
  spec: DataSpec,
  upto: int | None = None,
  length: int | None = None,
) -> Context:
  """The prompt that ends right where the model's turn begins.

  If the model itself spoke last, the prompt ends inside its turn: what it
  generates goes on with that turn. A partner's photo without a file is not in
  it.

  Args:
    turns: of a dialogue; `turns[:upto]` have been said.
    side: the speaker the model plays.
    tokenizer: the language model's.
    spec: as in training.
    upto: `Spoken.start` of the turn to generate; None takes all turns.
    length: most tokens of the prompt, `spec.length` by default; older turns
      are dropped to fit.

  Raises:
    LeftOut: a photo the model shared has no caption ('no_caption'), or a
      single piece of the last turn does not fit ('too_long').
  """
  template = make_template(spec, tokenizer)
  sided = _sided(turns[:upto], side, tokenizer, spec, template)
  lay_out = functools.partial(
    _lay_out, tokenizer=tokenizer, template=template, closed=False
  )
  return _newest(sided, spec, length or spec.length, lay_out)


def left_pad(
  contexts: Sequence[Context],
  length: int,
  tokenizer: Any,
  spec: DataSpec,
  load_photo: Callable[[schema.Photo], np.ndarray],
) -> dict[str, np.ndarray]:
  """Contexts -> arrays for batched generation, ends aligned on the right.

  Args:
    contexts: from `encode_context`, at most `length` tokens each.
    length: L; the same for many calls compiles once.
    tokenizer: the language model's.
    spec: as in training.
    load_photo: a photo -> uint8[vision_size, vision_size, 3].

  Returns:
    `tokens`, `segments` (1, padding 0), `positions` (0 at the first token),
    `visual_index` int32[B, L]; `photos_in` uint8[B, P, H, W, 3] and
    `photos_in_mask` bool[B, P].

  Raises:
    ValueError: a context is longer than `length`.
  """
  rows, size = len(contexts), spec.vision_size
  out = {
    "tokens": np.full((rows, length), tokenizer.pad_id, np.int32),
    "segments": np.zeros((rows, length), np.int32),
    "positions": np.zeros((rows, length), np.int32),
    "visual_index": np.full((rows, length), -1, np.int32),
    "photos_in": np.zeros((rows, spec.photos_in, size, size, 3), np.uint8),
    "photos_in_mask": np.zeros((rows, spec.photos_in), bool),
  }
  for b, context in enumerate(contexts):
    count = len(context.tokens)
    if count > length:
      raise ValueError(
        f"A context has {count} tokens and length is {length}; encode it with "
        "a smaller `length` or pad to a larger one."
      )
    out["tokens"][b, length - count :] = context.tokens
    out["segments"][b, length - count :] = 1
    out["positions"][b, length - count :] = np.arange(count)
    out["visual_index"][b, length - count :] = context.visual_index
    for p, photo in enumerate(context.photos):
      out["photos_in"][b, p] = load_photo(photo)
      out["photos_in_mask"][b, p] = True
  return out


def _sided(turns, side, tokenizer, spec, template) -> list[_Turn]:
  """Turns by whose they are, the model's or the other side's, encoded."""
  ordinals = itertools.count()
  sided = []
  spoken = merge_turns(turns)
  for own, group in itertools.groupby(spoken, lambda s: s.speaker == side):
    pieces = []
    for part in itertools.chain.from_iterable(s.parts for s in group):
      ordinal = next(ordinals) if isinstance(part, schema.Photo) else -1
      if not (own or isinstance(part, str) or spec.num_visual_tokens):
        # A photo that is read; one that nobody captioned stays a photo.
        part = f"(photo: {part.seen})" if part.seen else part
      if isinstance(part, str):
        part = template.disarm(part)
        if pieces:
          ids = encode_after(pieces[-1].text, part, tokenizer)
        else:
          ids = template.encode(part)
        pieces.append(_Piece(ids, text=part))
        continue
      tokens, cut = [], False
      if own:
        ids = tokenizer.encode((part.caption or "").strip())
        cut = len(ids) > spec.caption_tokens
        ids = ids[: spec.caption_tokens]
        tokens = [tokenizer.img_id, *ids, tokenizer.end_img_id]
      slots = 0 if part.path is None else spec.num_visual_tokens
      pieces.append(_Piece(tokens, slots, "", part, ordinal, cut))
    sided.append(_Turn(own, pieces))
  return sided


def _newest(turns, spec, length, lay_out) -> Example:
  """Lays out the newest turns that fit in a row."""

  def fitting(turns, cut):
    laid = lay_out(turns, cut)
    if (
      len(laid.tokens) > length
      or len(laid.photos) > spec.photos_in
      or len(laid.captions) > spec.photos_out
    ):
      return None
    for caption in laid.captions:
      if not len(caption.tokens):
        raise LeftOut(
          "no_caption",
          f"Photo {caption.photo.id!r} has no caption; caption it first.",
        )
    return laid

  # A bound from below without the template, so that the search over very long
  # dialogues starts where it may succeed.
  sizes = [sum(len(p.tokens) + p.slots for p in t.pieces) for t in turns]
  least = int(np.sum(np.cumsum(sizes[::-1]) > length))
  for first in range(least, max(len(turns), 1)):
    if laid := fitting(turns[first:], first):
      return laid
  # Not even the last turn fits: the newest of its pieces, then of its tokens.
  own, pieces = turns[-1] if turns else _Turn(False, ())
  for first in range(1, len(pieces)):
    if laid := fitting([_Turn(own, pieces[first:])], len(turns)):
      return laid
  if pieces and not pieces[-1].photo:
    room = length - len(lay_out([_Turn(own, ())], 0).tokens)
    newest = [_Piece(pieces[-1].tokens[-room:])] if room > 0 else []
    if newest and (laid := fitting([_Turn(own, newest)], len(turns))):
      return laid
  raise LeftOut(
    "too_long",
    f"A dialogue's last turn does not fit in {length} tokens, "
    f"{spec.photos_in} photos in and {spec.photos_out} out; raise the limit.",
  )


def _lay_out(
  turns, cut_turns, tokenizer, template, closed, text_on="model"
) -> Example:
  """Writes the template around turns; `closed` ends the model's last turn."""
  if not turns or turns[0].own:
    turns = [_Turn(False, ()), *turns]
  if template.preamble:
    # In one string with the text after it, as Llama 2 encodes it.
    first = list(turns[0].pieces)
    text = first.pop(0).text if first and first[0].text else ""
    opening = _Piece(template.encode(template.preamble + text))
    turns = [_Turn(False, [opening, *first]), *turns[1:]]

  tokens, kinds, visual = [], [], []
  photos, ordinals, captions = [], [], []
  missing = 0

  def put(ids, kind=NONE, slots=None):
    tokens.extend(ids)
    kinds.extend([kind] * len(ids))
    visual.extend(slots or [-1] * len(ids))

  for t, (own, pieces) in enumerate(turns):
    if not own:
      put(template.start if t else template.opening)
    for piece in pieces:
      if own and piece.photo:
        ids = np.asarray(piece.tokens[1:-1], np.int32)
        captions.append(
          Caption(piece.photo, piece.ordinal, len(tokens) + 1, ids, piece.cut)
        )
        put(piece.tokens, CAPTION)
      else:
        put(piece.tokens, TEXT if own else NONE)
      if piece.slots:
        start = len(photos) * piece.slots
        slots = range(start, start + piece.slots)
        put([tokenizer.pad_id] * piece.slots, NONE, slots)
        photos.append(piece.photo)
        ordinals.append(piece.ordinal)
      elif piece.photo and not own:
        missing += 1
    if not own:
      put(template.middle)
    elif closed or t < len(turns) - 1:
      put(template.end, TEXT)
  visual = np.asarray(visual, np.int32)
  kinds = np.asarray(kinds, np.int8)
  if text_on == "all":
    kinds[(kinds == NONE) & (visual < 0)] = TEXT
    kinds[:1] = NONE  # Nothing stands before it to predict it.
  return Example(
    tokens=np.asarray(tokens, np.int32),
    visual_index=visual,
    photos=tuple(photos),
    ordinals=tuple(ordinals),
    cut_turns=cut_turns,
    missing_photos=missing,
    loss_kind=kinds,
    captions=tuple(captions),
  )
