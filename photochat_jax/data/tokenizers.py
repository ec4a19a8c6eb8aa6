"""The two tokenizers: the language model's and CLIP's.

Both are read from a `tokenizer.json` (that of Llama 2, that of CLIP) and keep
text and control apart: what a user types never becomes a control id, also where
it spells one ("</s>", "[img]", "<|endoftext|>"), and control ids decode to
nothing. Control ids are put in by whoever builds a sequence.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable

import numpy as np
import tokenizers
from etils import epath
from tokenizers import pre_tokenizers

_ASSETS = pathlib.Path(__file__).parent / "assets"
_MARK = "▁"
_WORD_END = "</w>"
_LLM_CONTROL = ("<unk>", "<s>", "</s>")
_CLIP_CONTROL = ("<|startoftext|>", "<|endoftext|>")
_PHOTO = ("[img]", "[/img]")


def _read(path, default):
  """Reads a tokenizer.json, or that of a checkpoint's folder.

  Returns:
    The path, the parsed content and the SHA-256 of the file.
  """
  path = epath.Path(path) if path else _ASSETS / default
  if path.is_dir():
    path = path / "tokenizer.json"
  if not path.exists():
    raise ValueError(
      f"There is no tokenizer at {path}: give the tokenizer.json of a "
      "checkpoint, or its folder."
    )
  data = path.read_bytes()
  try:
    content = json.loads(data)
    vocabulary = content["model"]["vocab"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} is not a tokenizer.json: it needs model.vocab."
    ) from error
  if content["model"].get("type", "BPE") != "BPE" or not vocabulary:
    raise ValueError(f"{path} is not a byte pair encoding.")
  return path, content, hashlib.sha256(data).hexdigest()


def _require(path, kind, vocabulary, pieces):
  missing = [piece for piece in pieces if piece not in vocabulary]
  if missing:
    raise ValueError(
      f"{path} is not in the format of {kind}'s tokenizer.json: it lacks "
      f"{missing[0]!r} and {len(missing) - 1} more."
    )


class _Tokenizer:
  """What both have in common; `_bytes` says what each id writes."""

  def __init__(self, path, content, digest):
    added = {t["content"]: t["id"] for t in content.get("added_tokens", ())}
    self._ids = {**content["model"]["vocab"], **added}
    self._control = {
      self._ids[token["content"]]
      for token in content.get("added_tokens", ())
      if token.get("special")
    }
    # Left out, a control token that is typed is text like any other.
    plain = [t for t in content.get("added_tokens", ()) if not t.get("special")]
    content = {
      **content,
      "added_tokens": plain,
      "post_processor": None,
      "truncation": None,
      "padding": None,
    }
    self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    self.vocab_size = max(self._ids.values()) + 1
    self.digest = digest

  def _set_bytes(self, write):
    self._bytes = [b""] * self.vocab_size
    for piece, number in self._ids.items():
      if number not in self._control:
        self._bytes[number] = write(piece)

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without BOS or EOS and never a control id."""
    # JSON may hold half of a surrogate pair, which is no Unicode text.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def token_bytes(self, token: int) -> bytes:
    """What an id writes, in UTF-8; control ids write nothing.

    Raises:
      ValueError: the id is outside the vocabulary.
    """
    if not 0 <= token < self.vocab_size:
      raise ValueError(
        f"Token {token} is outside the vocabulary of {self.vocab_size}."
      )
    return self._bytes[token]


class LLMTokenizer(_Tokenizer):
  """The language model's: words begin with a mark, unknown text is bytes.

  `[img]` and `[/img]` are added after the file's vocabulary where it has none,
  as two new control ids.

  Attributes:
    vocab_size: number of ids, `[img]` and `[/img]` among them.
    bos_id: '<s>'.
    eos_id: '</s>'.
    pad_id: '<pad>' where the file has one, else '<unk>', which no text gives.
    img_id: '[img]', before a photo's caption.
    end_img_id: '[/img]', after it.
    digest: SHA-256 of the file, in hexadecimal.
  """

  def __init__(self, path: epath.PathLike | None = None):
    path, content, digest = _read(path, "llm_tokenizer.json")
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    _require(
      path,
      "Llama 2",
      content["model"]["vocab"],
      [*_LLM_CONTROL, _MARK, *octets],
    )
    if not content["model"].get("byte_fallback"):
      raise ValueError(
        f"{path} is not in the format of Llama 2's tokenizer.json: it has no "
        "byte_fallback."
      )
    super().__init__(path, content, digest)
    for name in _PHOTO:
      if name not in self._ids:
        self._ids[name] = self.vocab_size
        self.vocab_size += 1
    self._control |= {self._ids[name] for name in (*_LLM_CONTROL, *_PHOTO)}
    self.bos_id = self._ids["<s>"]
    self.eos_id = self._ids["</s>"]
    self.pad_id = self._ids.get("<pad>", self._ids["<unk>"])
    self._control.add(self.pad_id)
    self.img_id, self.end_img_id = (self._ids[name] for name in _PHOTO)
    fallback = {piece: bytes([n]) for n, piece in enumerate(octets)}
    self._set_bytes(
      lambda piece: fallback.get(piece) or piece.replace(_MARK, " ").encode()
    )

  def decode(self, tokens: Iterable[int]) -> str:
    """The text of some ids, less the space before its first word."""
    text = b"".join(self.token_bytes(int(token)) for token in tokens)
    return text.decode("utf-8", "replace").removeprefix(" ")

  def starts_word(self, token: int) -> bool:
    """Whether an id begins with the mark of a new word."""
    return self.token_bytes(token).startswith(b" ")


class CLIPTokenizer(_Tokenizer):
  """CLIP's: lower case, pieces of bytes, the last of a word marked '</w>'.

  Attributes:
    vocab_size: number of ids.
    bos_id: '<|startoftext|>'.
    eos_id: '<|endoftext|>'.
    pad_id: what fills a caption up.
    max_length: slots of a caption, BOS and EOS among them.
    digest: SHA-256 of the file, in hexadecimal.
  """

  def __init__(
    self,
    path: epath.PathLike | None = None,
    max_length: int = 77,
    pad_id: int | None = None,
  ):
    path, content, digest = _read(path, "clip_tokenizer.json")
    letters = pre_tokenizers.ByteLevel.alphabet()
    _require(
      path,
      "CLIP",
      content["model"]["vocab"],
      [*letters, *(letter + _WORD_END for letter in letters)],
    )
    super().__init__(path, content, digest)
    _require(path, "CLIP", self._ids, _CLIP_CONTROL)
    self.bos_id, self.eos_id = (self._ids[name] for name in _CLIP_CONTROL)
    self._control |= {self.bos_id, self.eos_id}
    if max_length < 3:
      raise ValueError(f"max_length is {max_length}; it must be 3 or more.")
    self.max_length = max_length
    self.pad_id = self.eos_id if pad_id is None else pad_id
    if not 0 <= self.pad_id < self.vocab_size:
      raise ValueError(
        f"pad_id is {pad_id}; it must be an id below {self.vocab_size}."
      )
    octet = self._octet = _octets()
    self._letters = {number: letter for letter, number in octet.items()}
    self._open = _without_word_end(self._tokenizer)
    self._set_bytes(
      lambda piece: bytes(octet[c] for c in piece.removesuffix(_WORD_END))
    )
    self._ends = [False] * self.vocab_size
    for piece, number in self._ids.items():
      self._ends[number] = piece.endswith(_WORD_END)

  def decode(self, tokens: Iterable[int]) -> str:
    """The text of some ids: lower case, with a space after each word."""
    text = b""
    for token in tokens:
      text += self.token_bytes(int(token))
      if self.ends_word(int(token)):
        text += b" "
    return text.decode("utf-8", "replace").removesuffix(" ")

  def ends_word(self, token: int) -> bool:
    """Whether an id is the last piece of its word."""
    return token not in self._control and self._ends[token]

  def encode_padded(self, text: str) -> np.ndarray:
    """BOS, at most `max_length` - 2 pieces, EOS, padding: int32 [m]."""
    pieces = self.encode(text)[: self.max_length - 2]
    padded = np.full(self.max_length, self.pad_id, np.int32)
    padded[: len(pieces) + 2] = [self.bos_id, *pieces, self.eos_id]
    return padded

  def words(self, text: str) -> list[bytes]:
    """The words of a text as their pieces spell it: UTF-8, normalised.

    Joined, they are the normalised text without its white space.
    """
    text = self._tokenizer.normalizer.normalize_str(text)
    words = self._tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [bytes(self._octet[c] for c in word) for word, _ in words]

  def word_pieces(self, word: bytes, ends: bool = True) -> list[int]:
    """The ids of one word; with `ends` false, of the beginning of a word."""
    tokenizer = self._tokenizer if ends else self._open
    letters = "".join(self._letters[number] for number in word)
    return [piece.id for piece in tokenizer.model.tokenize(letters)]


def _without_word_end(tokenizer):
  """A copy that marks no piece as the last of its word."""
  content = json.loads(tokenizer.to_str())
  content["model"]["end_of_word_suffix"] = None
  return tokenizers.Tokenizer.from_str(json.dumps(content))


def _octets() -> dict[str, int]:
  """The byte that each letter of a byte-level vocabulary stands for.

  Printable bytes of Latin-1 stand for themselves, the others, in order, for the
  letters from U+0100 on (GPT-2's table).
  """
  own = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [octet for octet in range(256) if octet not in own]
  return {chr(octet): octet for octet in own} | {
    chr(256 + i): octet for i, octet in enumerate(others)
  }


def load_llm_tokenizer(path: epath.PathLike | None = None) -> LLMTokenizer:
  """Reads a tokenizer.json of Llama 2's kind; the small one by default.

  Args:
    path: the file, or the folder of a checkpoint that holds it.

  Returns:
    The tokenizer, with `[img]` and `[/img]`.

  Raises:
    ValueError: there is no such file, or it is of another kind.
  """
  return LLMTokenizer(path)


def load_clip_tokenizer(
  path: epath.PathLike | None = None,
  max_length: int = 77,
  pad_id: int | None = None,
) -> CLIPTokenizer:
  """Reads a tokenizer.json of CLIP's kind; the small one by default.

  Args:
    path: the file, or the folder of a checkpoint that holds it.
    max_length: slots of a caption, m; the text encoder's
      `max_position_embeddings`.
    pad_id: what fills a caption up, as its text encoder was trained: EOS (the
      default, Stable Diffusion 1.5) or 0 (Stable Diffusion 2.x).

  Returns:
    The tokenizer.

  Raises:
    ValueError: there is no such file, or it is of another kind.
  """
  return CLIPTokenizer(path, max_length, pad_id)
