r"""Trains the two small tokenizers that the package ships.

  python tools/train_tokenizers.py --sample=tests/data/photochat_sample \
      --output=photochat_jax/data/assets

One in the format of Llama 2's tokenizer.json, one in the format of CLIP's, on
the synthetic talk and on real dialogues. They learn from different texts and
so disagree about words, as the real ones do.
"""

import json
import pathlib
from collections.abc import Iterable

import tokenizers
from absl import app, flags
from tokenizers import models, normalizers, pre_tokenizers, trainers

from photochat_jax.data import synthetic

_SAMPLE = flags.DEFINE_string(
  "sample", "tests/data/photochat_sample", "Folder of real dialogues."
)
_OUTPUT = flags.DEFINE_string(
  "output", "photochat_jax/data/assets", "Where the two JSON files go."
)
_DIALOGUES = flags.DEFINE_integer("dialogues", 3000, "Synthetic dialogues.")
_LLM_SIZE = flags.DEFINE_integer(
  "llm_size", 766, "Entries of the LLM; [img] and [/img] come on top."
)
_CLIP_SIZE = flags.DEFINE_integer("clip_size", 768, "Entries of CLIP.")

_MARK = "▁"
_LLM_CONTROL = ("<unk>", "<s>", "</s>")
_CLIP_CONTROL = ("<|startoftext|>", "<|endoftext|>")
_CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Pieces that merges may not cross: the marks of Llama 2's chat template, words,
# single digits, single signs.
_LLM_PATTERN = r"▁?(?:\[/?INST\]|<</?SYS>>|\p{L}+|\p{N}|[^\s\p{L}\p{N}▁])"


def _merges(texts, normalizer, pre_tokenizer, **trainer):
  """Merge rules learnt on texts, the first ones first."""
  learner = tokenizers.Tokenizer(models.BPE())
  learner.normalizer = normalizer
  learner.pre_tokenizer = pre_tokenizer
  learner.train_from_iterator(
    texts,
    trainers.BpeTrainer(
      vocab_size=10**6, min_frequency=2, show_progress=False, **trainer
    ),
  )
  return [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]]


def _select(merges, room: int, known: Iterable[str]):
  """The first merges that make `room` pieces; and these pieces, in order.

  Args:
    merges: pairs of pieces.
    room: how many new pieces there may be.
    known: pieces to start from; a merge of anything else is left out.
  """
  pieces, kept = dict.fromkeys(known), []
  start = len(pieces)
  for left, right in merges:
    if left in pieces and right in pieces:
      if len(pieces) == start + room and left + right not in pieces:
        break
      pieces[left + right] = None
      kept.append([left, right])
  return kept, list(pieces)[start:]


def _added(names, vocabulary):
  return [
    {
      "id": vocabulary[name],
      "content": name,
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      "normalized": False,
      "special": True,
    }
    for name in names
  ]


def _write(name, pieces, control, model, parts):
  """Writes one tokenizer.json without white space."""
  vocabulary = {piece: number for number, piece in enumerate(pieces)}
  content = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": _added(control, vocabulary),
    **parts,
    "model": {"type": "BPE", "dropout": None, **model, "vocab": vocabulary},
  }
  path = pathlib.Path(_OUTPUT.value) / name
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
  path.write_text(text, encoding="utf-8")
  tokenizers.Tokenizer.from_file(str(path))
  print(f"{path}: {len(vocabulary)} entries, {path.stat().st_size} bytes")


def _train_llm(texts):
  normalizer = normalizers.Sequence(
    [normalizers.Prepend(_MARK), normalizers.Replace(" ", _MARK)]
  )
  split = pre_tokenizers.Split(tokenizers.Regex(_LLM_PATTERN), "isolated")
  letters = [_MARK, *map(chr, range(33, 127))]
  octets = [f"<0x{octet:02X}>" for octet in range(256)]
  room = _LLM_SIZE.value - len(_LLM_CONTROL) - len(octets) - len(letters)
  merges, pieces = _select(_merges(texts, normalizer, split), room, letters)
  _write(
    "llm_tokenizer.json",
    [*_LLM_CONTROL, *octets, *pieces, *letters],
    _LLM_CONTROL,
    {
      "unk_token": _LLM_CONTROL[0],
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": True,
      "byte_fallback": True,
      "merges": merges,
    },
    {
      "normalizer": {
        "type": "Sequence",
        "normalizers": [
          {"type": "Prepend", "prepend": _MARK},
          {"type": "Replace", "pattern": {"String": " "}, "content": _MARK},
        ],
      },
      "pre_tokenizer": None,
      "post_processor": None,
      "decoder": {
        "type": "Sequence",
        "decoders": [
          {"type": "Replace", "pattern": {"String": _MARK}, "content": " "},
          {"type": "ByteFallback"},
          {"type": "Fuse"},
          {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
      },
    },
  )


def _train_clip(texts):
  normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Lowercase()]
  )
  split = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_CLIP_PATTERN), "removed", True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  letters += [f"{letter}</w>" for letter in letters]
  room = _CLIP_SIZE.value - len(letters) - len(_CLIP_CONTROL)
  merges, pieces = _select(
    _merges(texts, normalizer, split, end_of_word_suffix="</w>"), room, letters
  )
  _write(
    "clip_tokenizer.json",
    [*letters, *pieces, *_CLIP_CONTROL],
    _CLIP_CONTROL,
    {
      "unk_token": _CLIP_CONTROL[1],
      "continuing_subword_prefix": "",
      "end_of_word_suffix": "</w>",
      "fuse_unk": False,
      "byte_fallback": False,
      "merges": merges,
    },
    {
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
          {
            "type": "Split",
            "pattern": {"Regex": _CLIP_PATTERN},
            "behavior": "Removed",
            "invert": True,
          },
          {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
          },
        ],
      },
      "post_processor": None,
      "decoder": {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
      },
    },
  )


def main(argv):
  """Trains and writes both."""
  del argv
  records = synthetic.make_records(0, "train", _DIALOGUES.value)
  turns = [turn for record in records for turn in record["dialogue"]]
  talk = [turn["message"] for turn in turns if turn["message"]]
  captions = [turn["photo_caption"] for turn in turns if turn["share_photo"]]
  full = [
    photo["full_caption"]
    for record in records
    for photo in record["synthetic"]["photos"].values()
  ]
  real = []
  for path in sorted(pathlib.Path(_SAMPLE.value).glob("*/*.json")):
    for record in json.loads(path.read_text(encoding="utf-8")):
      real += [turn["message"] for turn in record["dialogue"]]
  marks = ["[INST] ", " [/INST] "] * len(records)
  _train_llm(talk + captions + marks + real)
  _train_clip(full[::40] + real)


if __name__ == "__main__":
  app.run(main)
