"""What the two vocabularies have to do with each other, on the host.

* `align`: which of the language model's tokens wrote which CLIP piece of a
  caption, in bytes.
* `build_vocabulary_map`: which CLIP pieces every token of the language model
  stands for, as sparse maps.
* `Retokeniser`: `align` for a batch of drawn captions.

A token of the language model may be one byte of an emoji, a piece of CLIP may
be another; CLIP puts text into NFC and lower case before it splits it. So a
byte of a piece is followed back: piece, normalised text, decoded text, token.

Axes: X photos, n caption positions, m CLIP slots, V tokens of the language
model, C of CLIP.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

# What CLIP's regular expressions take for white space among ASCII.
_ASCII_SPACES = ' \t\n\v\f\r'
_CACHED_CAPTIONS = 4096


def align(
  llm_tokenizer,
  clip_tokenizer,
  caption_ids: Sequence[int],
  text: str | None = None,
  n: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """CLIP's tokens of a caption and who wrote them.

  Args:
    llm_tokenizer: the language model's.
    clip_tokenizer: CLIP's; its `max_length` is m.
    caption_ids: the caption's tokens y, at most n; control ids among them
      decode to nothing and own nothing.
    text: what they decode to, where the caller knows it.
    n: caption positions; None takes the caption's length.

  Returns:
    z int32[m]: BOS, pieces, EOS, padding, cut at m - 2 pieces.
    A float32[m, n]: the share of piece j that token i wrote, in UTF-8 bytes
      of the normalised text. Rows of pieces sum to 1, the others are 0.
    final bool[n]: a word ends after token i: the next one that writes
      anything starts a word, or there is none.

  Raises:
    ValueError: the caption is longer than n, `text` is not what it decodes
      to, or the tokenizer does not spell its text byte by byte.
  """
  n = len(caption_ids) if n is None else n
  if len(caption_ids) > n:
    raise ValueError(
      f'A caption of {len(caption_ids)} tokens does not fit into {n}; cut it.'
    )
  decoded = llm_tokenizer.decode(caption_ids)
  if text is not None and text != decoded:
    raise ValueError(
      'The text of a caption is not what its tokens decode to; decode them.'
    )
  z = clip_tokenizer.encode_padded(decoded)
  (ends,) = np.nonzero(z == clip_tokenizer.eos_id)
  pieces = [clip_tokenizer.token_bytes(int(c)) for c in z[1 : ends[0]]]
  spelled, writers = _spell(clip_tokenizer, _read(llm_tokenizer, caption_ids))
  if not spelled.startswith(b''.join(pieces)):
    raise ValueError(
      "The tokenizer of the text encoder does not spell its text byte by byte;"
      " use CLIP's own."
    )
  share = np.zeros((len(z), n))
  at = 0
  for slot, piece in enumerate(pieces, start=1):
    for tokens in writers[at : at + len(piece)]:
      for token in tokens:
        share[slot, token] += 1 / (len(tokens) * len(piece))
    at += len(piece)
  final = np.zeros(n, bool)
  final[: len(caption_ids)] = _word_ends(llm_tokenizer, caption_ids)
  return z, share.astype(np.float32), final


def _word_ends(llm_tokenizer, ids) -> list[bool]:
  ends, starts_next = [], True
  for token in reversed([int(token) for token in ids]):
    ends.append(starts_next)
    if llm_tokenizer.token_bytes(token):
      starts_next = llm_tokenizer.starts_word(token)
  return ends[::-1]


def _read(llm_tokenizer, ids) -> Iterator[tuple[str, list[int]]]:
  """The characters of a caption and, per byte of each, its token's place.

  What is no UTF-8 reads as U+FFFD, as in `bytes.decode(errors='replace')`.
  """
  octets = [llm_tokenizer.token_bytes(int(token)) for token in ids]
  owners = [i for i, written in enumerate(octets) for _ in written]
  rest = b''.join(octets)
  while rest:
    try:
      text, bad = rest.decode(), 0
    except UnicodeDecodeError as error:
      text, bad = rest[: error.start].decode(), error.end - error.start
    for character in text:
      size = len(character.encode())
      yield character, owners[:size]
      owners = owners[size:]
    if bad:
      yield '\N{REPLACEMENT CHARACTER}', owners[:bad]
      owners = owners[bad:]
    rest = rest[len(text.encode()) + bad :]


def _spell(clip_tokenizer, characters) -> tuple[bytes, list[list[int]]]:
  """The bytes that CLIP's pieces spell and, for each, the tokens it is from."""
  spelled, writers = [], []
  for text, owners in _clusters(characters):
    for size, written in _normalise(clip_tokenizer, text):
      sources, owners = owners[:size], owners[size:]
      merged = [owner for source in sources for owner in source]
      # A character that keeps its size keeps its bytes in their order. Where
      # characters grow, shrink or melt into one, all wrote every byte.
      one_to_one = size == 1 and len(merged) == len(written)
      spelled.append(written)
      writers += [[o] for o in merged] if one_to_one else (
        [merged] * len(written)
      )
  return b''.join(spelled), writers


def _clusters(characters) -> Iterator[tuple[str, list[list[int]]]]:
  """Stretches that CLIP normalises each on its own.

  Nothing ASCII ever melts into what stands before it, so every ASCII
  character begins one.
  """
  text, owners = '', []
  for character, owner in characters:
    if character.isascii() and text:
      yield text, owners
      text, owners = '', []
    text += character
    owners.append(owner)
  if text:
    yield text, owners


def _normalise(clip_tokenizer, text: str) -> Iterator[tuple[int, bytes]]:
  """Cuts a cluster as finely as can be: (characters, what they turn into)."""
  if len(text) == 1 and text.isascii():
    yield 1, b'' if text in _ASCII_SPACES else text.lower().encode()
    return

  def spell(part):
    return b''.join(clip_tokenizer.words(part))

  whole = spell(text)
  while text:
    for size in range(1, len(text) + 1):
      head = spell(text[:size])
      if head + (tail := spell(text[size:])) == whole:
        break
    yield size, head
    text, whole = text[size:], tail


@dataclasses.dataclass(frozen=True)
class MapCoverage:
  """How much of the language model's vocabulary the maps reach.

  Attributes:
    rows: tokens of the language model.
    zero: map -> reason -> how many rows are zero for it.
  """

  rows: int
  zero: dict[str, dict[str, int]]

  def __str__(self):
    lines = []
    for name, reasons in self.zero.items():
      zero = sum(reasons.values())
      why = ', '.join(f'{count} {why}' for why, count in reasons.items())
      lines.append(
        f'{name}: {self.rows - zero} of {self.rows} tokens reach CLIP'
        + (f'; zero: {why}' if why else '')
      )
    return '\n'.join(lines)


def build_vocabulary_map(
  llm_tokenizer, clip_tokenizer
) -> tuple[dict, MapCoverage]:
  """The bridge's three maps from the language model's tokens to CLIP's.

  * `static`: exact matches of the spelling, the word mark stripped; half each
    where CLIP has it both within and at the end of a word.
  * `final`: the mean over the pieces of the token's own string, the word
    ending after it.
  * `internal`: the same, its last word going on.

  Bytes that are no character alone become CLIP's pieces of the same bytes,
  white space and ASCII capitals as everywhere.

  Args:
    llm_tokenizer: the language model's.
    clip_tokenizer: CLIP's.

  Returns:
    The map: {'static' | 'final' | 'internal': {'rows': int32[N] ascending,
      'cols': int32[N], 'weights': float32[N]}, 'specials': int32[3]}, the
      last CLIP's BOS, EOS and padding.
    What it reaches.
  """
  spellings = collections.defaultdict(list)
  for piece in range(clip_tokenizer.vocab_size):
    if written := clip_tokenizer.token_bytes(piece):
      spellings[written].append(piece)
  entries = {'static': [], 'final': [], 'internal': []}
  zero = {name: collections.Counter() for name in entries}
  for token in range(llm_tokenizer.vocab_size):
    written = llm_tokenizer.token_bytes(token)
    words = _words(clip_tokenizer, written)
    pieces = {
      'static': spellings.get(written.lstrip(b' '), []),
      'final': _pieces(clip_tokenizer, words, True),
      'internal': _pieces(clip_tokenizer, words, _closes(written)),
    }
    for name, found in pieces.items():
      for piece, count in sorted(collections.Counter(found).items()):
        entries[name].append((token, piece, count / len(found)))
      if not found:
        zero[name][_reason(written, words)] += 1
  maps = {name: _sparse(found) for name, found in entries.items()}
  clip = clip_tokenizer
  maps['specials'] = np.array([clip.bos_id, clip.eos_id, clip.pad_id], np.int32)
  coverage = {name: dict(reasons) for name, reasons in zero.items()}
  return maps, MapCoverage(llm_tokenizer.vocab_size, coverage)


def _words(clip_tokenizer, written: bytes) -> list[bytes]:
  try:
    return clip_tokenizer.words(written.decode())
  except UnicodeDecodeError:
    # Part of a character; what stands before it is as CLIP would have it.
    return written.lower().split()


def _closes(written: bytes) -> bool:
  """Whether white space after it ends a token's last word in any case."""
  return written.decode(errors='replace')[-1:].isspace()


def _pieces(clip_tokenizer, words: list[bytes], ends: bool) -> list[int]:
  return [
    piece
    for i, word in enumerate(words, start=1)
    for piece in clip_tokenizer.word_pieces(word, ends or i < len(words))
  ]


def _reason(written: bytes, words: list[bytes]) -> str:
  if not written:
    return 'control'
  return 'not in CLIP as a piece' if words else 'white space'


def _sparse(entries) -> dict[str, np.ndarray]:
  table = np.array(entries, np.float64).reshape(-1, 3)
  return {
    'rows': table[:, 0].astype(np.int32),
    'cols': table[:, 1].astype(np.int32),
    'weights': table[:, 2].astype(np.float32),
  }


class Retokeniser:
  """CLIP's tokens and the alignment of drawn captions, for a host callback.

  Attributes:
    n: caption positions.
    num_slots: m.
  """

  def __init__(self, llm_tokenizer, clip_tokenizer, n: int):
    """Keeps the alignments of the captions it met last.

    Args:
      llm_tokenizer: the language model's.
      clip_tokenizer: CLIP's; its `max_length` is m.
      n: caption positions, `bridge.max_tokens`.
    """
    self.n = n
    self.num_slots = clip_tokenizer.max_length
    self._align = functools.lru_cache(_CACHED_CAPTIONS)(
      functools.partial(align, llm_tokenizer, clip_tokenizer)
    )

  def __call__(
    self, tokens, mask
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Aligns a batch.

    Args:
      tokens: y, int32[X, n].
      mask: bool[X, n]: the positions that hold a caption token.

    Returns:
      z int32[X, m], A float32[X, m, n] and final bool[X, n], as of `align`;
      zero and false where the mask is false.

    Raises:
      ValueError: the captions have another number of positions than n.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    if tokens.shape[-1] != self.n:
      raise ValueError(
        f'Captions have {tokens.shape[-1]} positions, not {self.n}; give the '
        'retokeniser the same bridge.max_tokens.'
      )
    x = len(tokens)
    z = np.zeros((x, self.num_slots), np.int32)
    share = np.zeros((x, self.num_slots, self.n), np.float32)
    final = np.zeros((x, self.n), bool)
    for i in range(x):
      (places,) = np.nonzero(mask[i])
      ids = tuple(tokens[i, places].tolist())
      z[i], share[i][:, places], final[i, places] = self._align(ids)
    return z, share, final
