"""The two tokenizers: the language model's and CLIP's.

Both are read from Hugging Face's files (of Llama 2, Llama 3, SmolLM2; of CLIP)
and keep text and control apart: what a user types never becomes a control id,
also where it spells one ("</s>", "[img]", "<|endoftext|>"), and control ids
decode to nothing. Control ids are put in by whoever builds a sequence. The ids
are those of transformers with `split_special_tokens=True`.
"""

import json
from collections.abc import Callable, Iterable

import numpy as np
import tokenizers
from etils import epath

from photochat_jax.data import tokenizer_files
from photochat_jax.data.tokenizer_files import CLIP_CONTROL, WORD_END, Files

_MARK = "▁"
_OCTETS = {f"<0x{octet:02X}>": bytes([octet]) for octet in range(256)}
_PHOTO = ("[img]", "[/img]")
# Control tokens by what they do, the first that a file has, where no config
# beside it says so. Those that end a turn stand before those of a document.
_NAMES = {
  "bos_token": ("<s>", "<|begin_of_text|>", "<|im_start|>", "<|endoftext|>"),
  "eos_token": (
    *("</s>", "<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>"),
  ),
  "pad_token": (
    *("<pad>", "<unk>", "<|finetune_right_pad_id|>"),
    *("<|reserved_special_token_0|>", "<|endoftext|>"),
  ),
}


def _letters() -> dict[str, bytes]:
  """The byte that each letter of a byte-level vocabulary stands for.

  Printable bytes of Latin-1 stand for themselves, the others, in order, for the
  letters from U+0100 on (GPT-2's table).
  """
  own = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [octet for octet in range(256) if octet not in own]
  return {chr(octet): bytes([octet]) for octet in own} | {
    chr(256 + i): bytes([octet]) for i, octet in enumerate(others)
  }


_LETTERS = _letters()
_LETTER_OF = {octet[0]: letter for letter, octet in _LETTERS.items()}


class _Tokenizer:
  """What both have in common; `_bytes` says what each id writes."""

  def __init__(
    self, files: Files, control: Iterable[str], write: Callable[[str], bytes]
  ):
    """Tells control tokens and text apart.

    Args:
      files: what was read.
      control: control tokens; those that the file lacks are passed over.
      write: a piece of the vocabulary -> what it writes, in UTF-8.
    """
    control, vocabulary = set(control), files.content["model"]["vocab"]
    added = [
      {**token, "special": token.get("special") or token["content"] in control}
      for token in files.content.get("added_tokens", ())
    ]
    content = {
      **files.content,
      "added_tokens": added,
      "post_processor": None,
      "truncation": None,
      "padding": None,
    }
    try:
      self._tokenizer = _build(content)
    except Exception as error:  # All that the library raises.
      raise ValueError(
        f"{files.path} is not a tokenizer.json that tokenizers "
        f"{tokenizers.__version__} understands: {error}."
      ) from error
    # The library's own, which numbers added tokens without gaps.
    self._ids = self._tokenizer.get_vocab(with_added_tokens=True)
    self._control = {i for name, i in self._ids.items() if name in control}
    self.vocab_size = max(self._ids.values()) + 1
    self.path = files.path
    self.digest = files.digest
    self._bytes = [b""] * self.vocab_size
    for piece, number in vocabulary.items():
      self._bytes[number] = b"" if number in self._control else write(piece)
    for token in added:
      if not token["special"]:
        self._bytes[self._ids[token["content"]]] = token["content"].encode()

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without BOS or EOS and never a control id."""
    return _encode(self._tokenizer, text)

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

  def piece(self, token: int) -> str | None:
    """How the file spells an id; None for those it has not."""
    return self._tokenizer.id_to_token(token)


def _build(content) -> tokenizers.Tokenizer:
  """The library's tokenizer; a control token that is typed is text to it."""
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
  tokenizer.encode_special_tokens = True
  return tokenizer


def _encode(tokenizer, text: str) -> list[int]:
  # JSON may hold half of a surrogate pair, which is no Unicode text.
  text = text.encode("utf-8", "replace").decode("utf-8")
  return tokenizer.encode(text, add_special_tokens=False).ids


def _changed(tokenizer, change):
  """A copy whose tokenizer.json went through `change`."""
  return _build(change(json.loads(tokenizer.to_str())))


class LLMTokenizer(_Tokenizer):
  """The language model's, of one of two kinds.

  * Llama 2's (TinyLlama): a mark begins each word, that of a text's first one
    too; unknown text is bytes.
  * Byte-level (Llama 3, SmolLM2): all text is bytes, a space among them begins
    a word; a text's first word has none.

  `[img]` and `[/img]` are added after the file's vocabulary where it has none,
  as two new control ids. Which ids open, end and pad a sequence is what the
  folder's `tokenizer_config.json` says, else the first of `_NAMES` there is.

  Attributes:
    vocab_size: number of ids, `[img]` and `[/img]` among them.
    bos_id: opens a sequence: '<s>', '<|begin_of_text|>', ...
    eos_id: ends a turn: '</s>', '<|eot_id|>', '<|im_end|>', ...
    pad_id: what no text gives; not `eos_id` where there is another one.
    img_id: '[img]', before a photo's caption.
    end_img_id: '[/img]', after it.
    path: the file that was read.
    digest: SHA-256 of what was read, in hexadecimal.
  """

  def __init__(self, path: epath.PathLike | None = None):
    files = tokenizer_files.read(path, "llm_tokenizer.json")
    added = files.content.get("added_tokens", ())
    control = {token["content"] for token in added if token.get("special")}
    control |= {name for names in _NAMES.values() for name in names}
    control |= {*files.names.values(), *_PHOTO}
    super().__init__(files, control, _writer(files))
    for name in _PHOTO:
      if name not in self._ids:
        self._ids[name] = self.vocab_size
        self._control.add(self.vocab_size)
        self._bytes.append(b"")
        self.vocab_size += 1
    self.bos_id, self.eos_id = (
      self._ids[_find(files, self._ids, role)]
      for role in ("bos_token", "eos_token")
    )
    self.img_id, self.end_img_id = (self._ids[name] for name in _PHOTO)
    pads = (files.names.get("pad_token"), *_NAMES["pad_token"])
    pads = [self._ids[name] for name in pads if name in self._ids]
    pads += sorted(self._control - {self.img_id, self.end_img_id})
    self.pad_id = next((i for i in pads if i != self.eos_id), self.eos_id)
    for name in control:
      if self._control.intersection(self.encode(name)):
        raise ValueError(
          f"{files.path} turns {name!r}, typed as text, into a control id: use "
          "the file that the model was published with."
        )
    self._inner = self._tokenizer
    if tokenizer_files.glued(files.content) != files.content:
      self._inner = _changed(self._tokenizer, tokenizer_files.glued)
    self._first_only = any(
      part.get("prepend_scheme") == "first"
      for part in tokenizer_files.parts(files.content)
    )
    self._leads = self.starts_word(self.encode("a")[0])

  def encode(self, text: str, after: str | None = None) -> list[int]:
    """The ids of a text, without BOS or EOS and never a control id.

    Args:
      text: what a user typed, or a part of a template.
      after: what it follows: None, nothing; 'control', a control id, after
        which some files mark a first word and some do not; 'text', a text that
        goes on with it: its first word has a mark only if a space is there.
    """
    inner = after == "text" or (after == "control" and self._first_only)
    return _encode(self._inner if inner else self._tokenizer, text)

  def decode(self, tokens: Iterable[int]) -> str:
    """The text of some ids, less the space `encode` puts before it, if any."""
    written = b"".join(self.token_bytes(int(token)) for token in tokens)
    text = written.decode("utf-8", "replace")
    return text.removeprefix(" ") if self._leads else text

  def starts_word(self, token: int) -> bool:
    """Whether an id begins with the mark of a new word, or white space."""
    return self.token_bytes(token)[:1].isspace()

  def control_id(self, name: str) -> int | None:
    """The id of a control token, such as '<|eot_id|>'; None without one."""
    number = self._ids.get(name)
    return number if number in self._control else None


def _writer(files: Files) -> Callable[[str], bytes]:
  """What pieces of a language model's vocabulary write; refuses other kinds."""
  model, kinds = files.content["model"], "Llama 2's, Llama 3's or SmolLM2"
  if model.get("byte_fallback"):
    tokenizer_files.require(files, kinds, model["vocab"], [_MARK, *_OCTETS])
    return lambda piece: (
      _OCTETS.get(piece) or piece.replace(_MARK, " ").encode()
    )
  parts = tokenizer_files.parts(files.content)
  if model.get("end_of_word_suffix") or not any(
    part["type"] == "ByteLevel" for part in parts
  ):
    raise ValueError(
      f"{files.path} is not in the format of {kinds}'s tokenizer.json: it has "
      "neither byte_fallback nor a ByteLevel without marks at words' ends."
    )
  tokenizer_files.require(files, kinds, model["vocab"], _LETTERS)
  return lambda piece: b"".join(
    _LETTERS.get(letter, letter.encode()) for letter in piece
  )


def _find(files: Files, ids, role: str) -> str:
  """The control token of a role."""
  told = files.names.get(role)
  names = [told] if told else _NAMES[role]
  for name in names:
    if name in ids:
      return name
  raise ValueError(
    f"{files.path} has no {role}, which is {' or '.join(map(repr, names))}: "
    "use the files of one checkpoint together."
  )


class CLIPTokenizer(_Tokenizer):
  """CLIP's: lower case, pieces of bytes, the last of a word marked '</w>'.

  Attributes:
    vocab_size: number of ids.
    bos_id: '<|startoftext|>'.
    eos_id: '<|endoftext|>'.
    pad_id: what fills a caption up.
    max_length: slots of a caption, BOS and EOS among them.
    path: the file that was read.
    digest: SHA-256 of what was read, in hexadecimal.
  """

  def __init__(
    self,
    path: epath.PathLike | None = None,
    max_length: int = 77,
    pad_id: int | None = None,
  ):
    files = tokenizer_files.read(path, "clip_tokenizer.json")
    tokenizer_files.require(
      files,
      "CLIP",
      files.content["model"]["vocab"],
      [*_LETTERS, *(letter + WORD_END for letter in _LETTERS)],
    )
    # Padding is no control token: Stable Diffusion 2.x pads with '!'.
    super().__init__(
      files,
      CLIP_CONTROL,
      lambda piece: b"".join(
        _LETTERS.get(c, c.encode()) for c in piece.removesuffix(WORD_END)
      ),
    )
    tokenizer_files.require(files, "CLIP", self._ids, CLIP_CONTROL)
    self.bos_id, self.eos_id = (self._ids[name] for name in CLIP_CONTROL)
    if max_length < 3:
      raise ValueError(f"max_length is {max_length}; it must be 3 or more.")
    self.max_length = max_length
    if pad_id is None:
      named = files.names.get("pad_token", CLIP_CONTROL[1])
      pad_id = self._ids.get(named, self.eos_id)
    self.pad_id = pad_id
    if not 0 <= self.pad_id < self.vocab_size:
      raise ValueError(
        f"pad_id is {pad_id}; it must be an id below {self.vocab_size}."
      )
    self._open = _changed(self._tokenizer, _without_word_end)
    self._ends = [False] * self.vocab_size
    for piece, number in self._ids.items():
      self._ends[number] = piece.endswith(WORD_END)

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
    return [b"".join(_LETTERS[c] for c in word) for word, _ in words]

  def word_pieces(self, word: bytes, ends: bool = True) -> list[int]:
    """The ids of one word; with `ends` false, of the beginning of a word."""
    tokenizer = self._tokenizer if ends else self._open
    letters = "".join(_LETTER_OF[octet] for octet in word)
    return [piece.id for piece in tokenizer.model.tokenize(letters)]


def _without_word_end(content):
  """A tokenizer.json that marks no piece as the last of its word."""
  model = {**content["model"], "end_of_word_suffix": None}
  return {**content, "model": model}


def load_llm_tokenizer(path: epath.PathLike | None = None) -> LLMTokenizer:
  """Reads the language model's tokenizer; the small one by default.

  Args:
    path: a checkpoint's folder, or its tokenizer.json, without what the files
      beside it say.

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
  """Reads the text encoder's tokenizer; the small one by default.

  Args:
    path: the folder of a checkpoint's tokenizer, with a tokenizer.json or a
      vocab.json and a merges.txt; or the tokenizer.json.
    max_length: slots of a caption, m; the text encoder's
      `max_position_embeddings`.
    pad_id: what fills a caption up, as its text encoder was trained: EOS
      (Stable Diffusion 1.5) or 0 (Stable Diffusion 2.x); None takes what the
      folder says, or EOS.

  Returns:
    The tokenizer.

  Raises:
    ValueError: there is no such file, or it is of another kind.
  """
  return CLIPTokenizer(path, max_length, pad_id)
