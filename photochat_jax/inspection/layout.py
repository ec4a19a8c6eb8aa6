"""One dialogue from each of its sides, token by token, to be looked at.

What `data.dialogue` lays out, in lines: a line begins where the model's turn
begins or ends. And for each caption, which of the language model's tokens
wrote which pieces of CLIP, as groups that share no byte with one another.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from photochat_jax.data import dialogue as dialogue_lib
from photochat_jax.data import schema, vocabulary
from photochat_jax.data.spec import DataSpec, LeftOut

KINDS = ("none", "text", "caption", "slot")
"""What a token is to the losses: the first three as in `data.dialogue`."""

_SPACES = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"}


class Token(NamedTuple):
  """A token of a sequence.

  Attributes:
    position: in its segment, from 0.
    id: of the language model's vocabulary.
    text: what it writes, made visible; a control token's name.
    kind: one of `KINDS`.
    control: whether it is a control token, which no text gives.
    note: which visual token it is a place for; '' for others.
  """

  position: int
  id: int
  text: str
  kind: str
  control: bool
  note: str = ""


class Line(NamedTuple):
  """Tokens of the model's turn, or of what stands before and after it."""

  own: bool
  tokens: tuple[Token, ...]


class Piece(NamedTuple):
  """A piece of CLIP; `shares` are its bytes' by token of the group, 0 to 1."""

  id: int
  text: str
  shares: tuple[float, ...]


class Group(NamedTuple):
  """Tokens of a caption, and the pieces of CLIP that they wrote together."""

  tokens: tuple[Token, ...]
  pieces: tuple[Piece, ...]


class Alignment(NamedTuple):
  """A caption in both vocabularies.

  Attributes:
    photo: whose caption it is.
    cut: whether it was cut to `caption_tokens`.
    groups: in order.
    used: slots of the text encoder that it takes, with the two at the ends.
    slots: all slots, m.
  """

  photo: schema.Photo
  cut: bool
  groups: tuple[Group, ...]
  used: int
  slots: int


class Side(NamedTuple):
  """A dialogue as one speaker is trained on it.

  Attributes:
    speaker: whom the model plays.
    left_out: why there is no example; '' if there is one.
    lines: the sequence.
    captions: those that the model writes.
    cut_turns: turns dropped to fit.
  """

  speaker: int
  left_out: str
  lines: tuple[Line, ...] = ()
  captions: tuple[Alignment, ...] = ()
  cut_turns: int = 0

  @property
  def tokens(self) -> list[Token]:
    """The sequence without its lines."""
    return [token for line in self.lines for token in line.tokens]


class Shown(NamedTuple):
  """A dialogue and what becomes of it."""

  dialogue: schema.Dialogue
  sides: tuple[Side, ...]


def printable(text: str) -> str:
  """A text whose characters can all be seen, none of which steers anything.

  What a terminal obeys, or turns text around, becomes its number: '⟨1B⟩'.
  """
  if text.isprintable():
    return text
  return "".join(c if c.isprintable() else f"⟨{ord(c):X}⟩" for c in text)


def spell(tokenizer: Any, token: int) -> str:
  """What an id writes, spaces made visible; a control id's name."""
  written = tokenizer.token_bytes(token)
  if not written:
    names = {"img_id": "[img]", "end_img_id": "[/img]"}
    marks = {getattr(tokenizer, k, None): name for k, name in names.items()}
    return printable(marks.get(token) or tokenizer.piece(token) or f"#{token}")
  text = written.decode("utf-8", "backslashreplace")
  return printable("".join(_SPACES.get(c, c) for c in text))


def show(
  dialogue: schema.Dialogue, llm_tokenizer: Any, clip_tokenizer: Any,
  spec: DataSpec,
) -> Shown:  # fmt: skip
  """Lays a dialogue out from each of its sides."""
  speakers = sorted({turn.speaker for turn in dialogue.turns})
  return Shown(
    dialogue,
    tuple(
      lay_out(dialogue.turns, speaker, llm_tokenizer, clip_tokenizer, spec)
      for speaker in speakers
    ),
  )


def lay_out(
  turns: Sequence[schema.Turn], speaker: int, llm_tokenizer: Any,
  clip_tokenizer: Any, spec: DataSpec,
) -> Side:  # fmt: skip
  """One side of a dialogue, or why it is left out."""
  try:
    example = dialogue_lib.encode_example(turns, speaker, llm_tokenizer, spec)
  except LeftOut as reason:
    return Side(speaker, f"{reason.reason}: {reason}")
  tokens = _tokens(example, llm_tokenizer, spec.num_visual_tokens)
  return Side(
    speaker,
    "",
    _lines(tokens, llm_tokenizer),
    tuple(
      align(caption, tokens, llm_tokenizer, clip_tokenizer)
      for caption in example.captions
    ),
    example.cut_turns,
  )


def kinds(example: dialogue_lib.Example) -> np.ndarray:
  """The place in `KINDS` of each token of an example, int[T]."""
  slot = example.visual_index >= 0
  return np.where(slot, KINDS.index("slot"), example.loss_kind)


def runs(values: np.ndarray) -> list[tuple[int, int]]:
  """Equal neighbours as (value, how many)."""
  cuts = np.flatnonzero(np.diff(values)) + 1
  return [(int(r[0]), len(r)) for r in np.split(values, cuts) if len(r)]


def _tokens(example, tokenizer, k) -> list[Token]:
  """Every token of an example."""
  found = []
  for position, (number, kind, visual) in enumerate(
    zip(
      example.tokens.tolist(),
      kinds(example).tolist(),
      example.visual_index.tolist(),
      strict=True,
    )
  ):
    note = ""
    if visual >= 0:
      photo = example.photos[visual // k]
      note = f"visual token {visual % k} of photo {printable(photo.id)}"
    found.append(
      Token(
        position,
        number,
        spell(tokenizer, number),
        KINDS[kind],
        not tokenizer.token_bytes(number),
        note,
      )
    )
  return found


def _lines(tokens, tokenizer) -> tuple[Line, ...]:
  """Cuts a sequence where the model's turns begin and end."""
  lines, last, own = [], None, False
  for token in tokens:
    if token.kind != "slot":
      own = token.kind != "none"
    elif last is not None and last.kind != "slot":
      # The model sees its own photo right after the caption it wrote.
      own = last.id == tokenizer.end_img_id
    ended = last is not None and own and last.id == tokenizer.eos_id
    if not lines or own != lines[-1][0] or ended:
      lines.append((own, []))
    lines[-1][1].append(token)
    last = token
  return tuple(Line(own, tuple(part)) for own, part in lines)


def align(
  caption: dialogue_lib.Caption,
  tokens: Sequence[Token],
  llm_tokenizer: Any,
  clip_tokenizer: Any,
) -> Alignment:
  """A caption's tokens and CLIP's pieces, in groups.

  Args:
    caption: of an example.
    tokens: of the whole example.
    llm_tokenizer: the language model's.
    clip_tokenizer: CLIP's.
  """
  ids = caption.tokens.tolist()
  slots, share, _ = vocabulary.align(llm_tokenizer, clip_tokenizer, ids)
  own = tokens[caption.start : caption.start + len(ids)]
  # Each group: the places of its tokens, and of its pieces.
  groups: list[tuple[set[int], set[int]]] = []
  for slot in np.flatnonzero(share.any(axis=1)).tolist():
    wrote, pieces = set(np.flatnonzero(share[slot]).tolist()), {slot}
    for other in [g for g in groups if g[0] & wrote]:
      wrote, pieces = wrote | other[0], pieces | other[1]
      groups.remove(other)
    groups.append((wrote, pieces))
  grouped = {i for wrote, _ in groups for i in wrote}
  groups += [({i}, set()) for i in range(len(ids)) if i not in grouped]
  groups.sort(key=lambda group: min(group[0]))
  return Alignment(
    photo=caption.photo,
    cut=caption.cut,
    groups=tuple(
      Group(
        tuple(own[i] for i in sorted(wrote)),
        tuple(
          Piece(
            int(slots[j]),
            _spell_piece(clip_tokenizer, int(slots[j])),
            tuple(share[j, sorted(wrote)].tolist()),
          )
          for j in sorted(pieces)
        ),
      )
      for wrote, pieces in groups
    ),
    used=int(share.any(axis=1).sum()) + 2,
    slots=len(slots),
  )


def _spell_piece(clip_tokenizer, piece: int) -> str:
  end = "</w>" if clip_tokenizer.ends_word(piece) else ""
  return spell(clip_tokenizer, piece) + end
