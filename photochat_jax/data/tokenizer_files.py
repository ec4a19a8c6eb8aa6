"""The files of a tokenizer, as checkpoints on Hugging Face's hub have them.

`tokenizer.json` says how text is split; `tokenizer_config.json` and
`special_tokens_map.json` beside it say which control tokens open a sequence,
end a turn and pad. Stable Diffusion's folders have `vocab.json` and
`merges.txt` in place of the first one.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

_ASSETS = pathlib.Path(__file__).parent / "assets"
ROLES = ("bos_token", "eos_token", "pad_token")
WORD_END = "</w>"
CLIP_CONTROL = ("<|startoftext|>", "<|endoftext|>")
_NAMES = (
  *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
  *("vocab.json", "merges.txt"),
)
_ENDS = ("normalizer", "pre_tokenizer")
_LISTS = ("normalizers", "pretokenizers")  # Of a part of type Sequence.
# transformers' CLIPTokenizer.
_CLIP_PATTERN = (
  r"<\|startoftext\|>|<\|endoftext\|>|"
  r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class Files(NamedTuple):
  """What there is to know about a tokenizer.

  Attributes:
    path: the file that error messages name.
    content: of a tokenizer.json.
    names: one of `ROLES` -> control token, as far as the folder says.
    digest: SHA-256 of it all, in hexadecimal.
  """

  path: epath.Path
  content: dict[str, Any]
  names: dict[str, str]
  digest: str


def read(path: epath.PathLike | None, default: str) -> Files:
  """Reads a tokenizer.json, or what a checkpoint's folder has.

  Args:
    path: the file or the folder; None takes one that the package ships.
    default: the name of that one.

  Raises:
    ValueError: there is no such file, or it is of another kind.
  """
  path, names = epath.Path(path or _ASSETS / default), {}
  if path.is_dir():
    names = _read_names(path)
    older = path / "vocab.json", path / "merges.txt"
    path = path / "tokenizer.json"
    if not path.exists() and all(file.exists() for file in older):
      return _read_clip(*older, names)
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
  return Files(path, content, names, _digest(data, names))


def copy(source: epath.PathLike, folder: epath.PathLike) -> None:
  """Copies a tokenizer: its file, or what counts of its folder.

  Args:
    source: the file or the folder.
    folder: made where it is not there.
  """
  source, folder = epath.Path(source), epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if not source.is_dir():
    source.copy(folder / "tokenizer.json", overwrite=True)
    return
  for name in _NAMES:
    if (source / name).exists():
      (source / name).copy(folder / name, overwrite=True)


def require(files: Files, kind: str, vocabulary, pieces) -> None:
  """Raises a ValueError where a vocabulary lacks one of some pieces."""
  missing = [piece for piece in pieces if piece not in vocabulary]
  if missing:
    raise ValueError(
      f"{files.path} is not in the format of {kind}'s tokenizer.json: it lacks "
      f"{missing[0]!r} and {len(missing) - 1} more."
    )


def parts(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Every normalizer and pre-tokenizer of a tokenizer.json, in order."""
  for name in _ENDS:
    yield from _leaves(content.get(name))


def glued(content: dict[str, Any]) -> dict[str, Any]:
  """A tokenizer.json for text that goes on within a text.

  Its normalizer or pre-tokenizer puts no space before the first word.
  """
  return {**content, **{name: _glued(content.get(name)) for name in _ENDS}}


def _leaves(part):
  if not part:
    return
  if part["type"] != "Sequence":
    yield part
  for name in _LISTS:
    for inner in part.get(name, ()):
      yield from _leaves(inner)


def _glued(part):
  if not part or part["type"] == "Prepend":
    return None
  if part["type"] == "Metaspace":
    part = {**part, "prepend_scheme": "never"}
  if "add_prefix_space" in part:
    part = {**part, "add_prefix_space": False}
  for name in _LISTS:
    if name in part:
      part = {**part, name: [p for p in map(_glued, part[name]) if p]}
  return part


def _digest(data: bytes, names: dict[str, str]) -> str:
  said = json.dumps(names, sort_keys=True).encode() if names else b""
  return hashlib.sha256(data + said).hexdigest()


def _read_names(folder: epath.Path) -> dict[str, str]:
  """The control tokens that a folder names; an entry is a string or a dict."""
  names = {}
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    path = folder / name
    if not path.exists():
      continue
    try:
      settings = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
      raise ValueError(
        f"{path} holds no JSON object: fetch it again."
      ) from error
    for role in ROLES:
      token = settings.get(role)
      token = token.get("content") if isinstance(token, dict) else token
      if isinstance(token, str):
        names.setdefault(role, token)
  return names


def _read_clip(vocabulary: epath.Path, merges: epath.Path, names) -> Files:
  """CLIP's two files as a tokenizer.json."""
  data = vocabulary.read_bytes(), merges.read_bytes()
  try:
    pieces = dict(json.loads(data[0]))
    lines = data[1].decode().replace("\r", "").split("\n")
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"{vocabulary} or {merges.name} beside it is no vocabulary: fetch both "
      "again."
    ) from error
  split = {"type": "Split", "pattern": {"Regex": _CLIP_PATTERN}}
  letters = {"type": "ByteLevel", "add_prefix_space": False}
  content = {
    "version": "1.0",
    "normalizer": {
      "type": "Sequence",
      "normalizers": [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"},
      ],
    },
    "pre_tokenizer": {
      "type": "Sequence",
      "pretokenizers": [
        {**split, "behavior": "Removed", "invert": True},
        {**letters, "trim_offsets": True, "use_regex": True},
      ],
    },
    "model": {
      "type": "BPE",
      "unk_token": CLIP_CONTROL[1],
      "continuing_subword_prefix": "",
      "end_of_word_suffix": WORD_END,
      "vocab": pieces,
      "merges": [m for m in lines if m and not m.startswith("#version")],
    },
  }
  return Files(vocabulary, content, names, _digest(b"".join(data), names))
