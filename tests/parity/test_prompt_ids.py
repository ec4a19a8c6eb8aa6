r"""The ids of texts and prompts are Hugging Face's, for every kind.

Alone, a text has the ids that transformers gives it when asked to take control
tokens for text (`split_special_tokens=True`).

A whole prompt is compared twice. The published chat templates (in
`hf_tokenizers`) give one string in which control tokens and what users typed
look alike. *Segments*: that string is cut at the control tokens before what
was said is put in, and each stretch between them is encoded by transformers as
text. That is what we must give, whatever is typed. *String*: for what holds no
look-alike the same ids come out of `apply_chat_template(tokenize=True)`, so
the cutting is right.

Where ours differs from the published strings, on purpose:

* Llama 2's has a space before the `</s>` of each past answer, which becomes a
  piece of its own; ours has none (a model would have to learn to say it).
  The two are compared without it. Its `strip` is done as turns are read.
* SmolLM2's puts in a system prompt where there is none; the tests always give
  one or leave the first block out. Llama 3.1 and later add two lines of dates
  to the system prompt; the template here is that of Llama 3, without them.
* ChatML and Zephyr end a conversation with a newline after the last end of
  turn; there it is the start of the next turn.
* What stands after a control token is as the folder's tokenizer.json says.
  transformers 5 reads one of the old style as 'first' where the class is
  LlamaTokenizer, and so differs from the file and from Meta's own code.
* TinyLlama's and Llama 2's marks are plain text; ours breaks them in what is
  said. A first turn of the model's has an empty one of the user before it.

Merges across the edges of what is said would show as differences. There are
none: a newline or a space stands there, which no merge of these kinds crosses;
but Llama 2's kind takes '▁' for a space, so one typed at the very edge would
melt with ours. The conversations here have none at their edges.
"""

import functools
import json
import random
import re
import string

import numpy as np
import pytest

from photochat_jax.data import dialogue
from photochat_jax.data.photochat import Photo, Turn
from photochat_jax.data.spec import DataSpec
from photochat_jax.data.tokenizers import (
  load_clip_tokenizer,
  load_llm_tokenizer,
)

pytest.importorskip("transformers")
hf_tokenizers = pytest.importorskip("hf_tokenizers")
tokenizers = pytest.importorskip("tokenizers")

COUNT = 1000
K = 2  # Visual slots of a photo.
KINDS = {
  "llama2 old": lambda: hf_tokenizers.llama2("old"),
  "llama2 always": lambda: hf_tokenizers.llama2("always"),
  "llama2 first": lambda: hf_tokenizers.llama2("first"),
  "llama3": hf_tokenizers.llama3,
  "smollm2": hf_tokenizers.smollm2,
}
MARKS = {
  "llama2": ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
  "zephyr": ("<|user|>", "<|assistant|>", "<|system|>"),
}
PAIRS = [
  *(
    (template, kind)
    for template in ("llama2", "zephyr")
    for kind in ("llama2 old", "llama2 always", "llama2 first")
  ),
  ("llama3", "llama3"),
  ("chatml", "smollm2"),
]
SYSTEM = "You chat, and share photos: ça va?"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """kind -> transformers' tokenizer and ours, read from the former's folder."""

  @functools.cache
  def make(kind):
    theirs = KINDS[kind]()
    folder = tmp_path_factory.mktemp("tokenizer")
    theirs.save_pretrained(folder)
    return theirs, load_llm_tokenizer(folder)

  return make


def as_text(theirs, text):
  return theirs.encode(
    text, add_special_tokens=False, split_special_tokens=True
  )


@pytest.mark.parametrize("kind", KINDS)
def test_lines(pair, kind):
  theirs, ours = pair(kind)
  lines = hf_tokenizers.lines(COUNT, seed=1)
  assert len(set(lines)) > 0.99 * COUNT
  for mark in hf_tokenizers.LOOKALIKES:
    assert any(mark in line for line in lines), mark
  control = {ours.bos_id, ours.eos_id, ours.img_id, ours.end_img_id}
  control |= set(theirs.all_special_ids)
  for line in lines:
    ids = as_text(theirs, line)
    assert ours.encode(line) == ids, line
    assert ours.decode(ids) == theirs.decode(ids), line
    assert not control & set(ids)
    assert b"".join(map(ours.token_bytes, ids)).decode().strip(" ") == (
      line.replace("▁", " ").strip(" ") if "llama2" in kind else line.strip(" ")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_and_control_ids(pair, kind):
  theirs, ours = pair(kind)
  assert ours.vocab_size == len(theirs) + 2
  assert (ours.img_id, ours.end_img_id) == (len(theirs), len(theirs) + 1)
  assert ours.bos_id == theirs.bos_token_id
  assert ours.eos_id == theirs.eos_token_id
  pads = {"llama3": "<|finetune_right_pad_id|>", "smollm2": "<|endoftext|>"}
  pad = pads.get(kind, "<unk>")
  assert ours.pad_id == theirs.convert_tokens_to_ids(pad)
  for name, number in theirs.get_added_vocab().items():
    assert ours.control_id(name) == number
    assert ours.token_bytes(number) == b""


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("older", [False, True])
def test_captions(tmp_path, pad, older):
  """77 slots, padded as Stable Diffusion 1.5 and 2.x are.

  The latter's '!' is text here and, in a caption, its own piece, as it was
  when the text encoder was trained; transformers takes it for padding unless
  asked not to.
  """
  theirs = hf_tokenizers.clip(pad)
  theirs.save_pretrained(tmp_path)
  if older:  # As Stable Diffusion's folders are.
    newer = tmp_path / "tokenizer.json"
    model = json.loads(newer.read_text("utf-8"))["model"]
    newer.unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = ["#version: 0.2", *(" ".join(m) for m in model["merges"]), ""]
    (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    theirs = type(theirs).from_pretrained(tmp_path)
  ours = load_clip_tokenizer(tmp_path)
  assert (ours.pad_id == 0) == (pad == "!")
  assert (ours.vocab_size, ours.max_length) == (len(theirs), 77)
  cut = 0
  for line in hf_tokenizers.lines(COUNT, seed=2):
    ids = theirs(
      line,
      padding="max_length",
      max_length=77,
      truncation=True,
      split_special_tokens=True,
    ).input_ids
    np.testing.assert_array_equal(ours.encode_padded(line), ids, line)
    cut += ids[-1] == theirs.eos_token_id != ids[-2]
  assert cut > 10


def stripped(lines):
  """Without white space at the edges, as turns are, nor the sign for it."""
  edges = f"▁{string.whitespace}\u00a0\u3000"
  lines = [line.strip(edges) for line in lines]
  return [line for line in lines if line]


def conversations(lookalikes):
  """Lists of stripped texts, the user's and the model's in turn."""
  draw = random.Random(3)
  lines = stripped(hf_tokenizers.lines(COUNT, 4, lookalikes))
  return [
    [draw.choice(lines) for _ in range(draw.randint(1, 7))]
    for _ in range(COUNT)
  ]


def messages(texts, system):
  roles = ["user", "assistant"] * len(texts)
  found = [{"role": "system", "content": system}] if system else []
  return found + [
    {"role": role, "content": text}
    for role, text in zip(roles, texts, strict=False)
  ]


def disarmed(template, text):
  for mark in MARKS.get(template, ()):
    text = text.replace(mark, f"{mark[0]} {mark[1:]}")
  return text


def cut(theirs, template, count, system):
  """The published prompt of `count` turns, as control tokens and strings.

  What is said is '\uf8f0', '\uf8f1', ... in it.
  """
  theirs.chat_template = hf_tokenizers.CHAT_TEMPLATES[template]
  holes = [chr(0xF8F0 + i) for i in range(count)]
  whole = theirs.apply_chat_template(
    messages(holes, system), tokenize=False, add_generation_prompt=count % 2
  )
  if template == "llama2":
    whole = whole.replace(" </s>", "</s>")
  elif count % 2 == 0:
    whole = whole.removesuffix("\n")
  if template == "chatml" and not system:
    whole = whole[whole.index("<|im_start|>user") :]
  names = sorted(theirs.get_added_vocab())
  pattern = "|".join(map(re.escape, names))
  return [part for part in re.split(f"({pattern})", whole) if part]


def segment_ids(theirs, kind, parts, texts):
  """The ids of a prompt that was cut, with what is said in it."""
  special, found = theirs.get_added_vocab(), []
  for part in parts:
    if part in special:
      found.append(special[part])
      continue
    for number, text in enumerate(texts):
      part = part.replace(chr(0xF8F0 + number), text)
    if kind == "llama2 first" and found:
      # Only the very first stretch has a mark put before it.
      found += inner(theirs).encode(part, add_special_tokens=False).ids
    else:
      found += as_text(theirs, part)
  return found


@functools.cache
def inner(theirs):
  backend = tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
    prepend_scheme="never", split=False
  )
  backend.encode_special_tokens = True
  return backend


def spec(template, system):
  return DataSpec(
    *(1, 100_000, 9, 9, K, 8, 8), template=template, system_prompt=system
  )


@pytest.mark.parametrize(("template", "kind"), PAIRS)
def test_prompts(pair, template, kind):
  theirs, ours = pair(kind)
  shapes = {
    (count, system): cut(theirs, template, count, system)
    for count in range(1, 8)
    for system in ("", SYSTEM)
  }
  number = 0
  for texts in conversations(lookalikes=True):
    number += 1
    system = SYSTEM if number % 2 else ""
    said = [disarmed(template, text) for text in texts]
    parts = shapes[len(texts), system]
    expected = segment_ids(theirs, kind, parts, said)
    turns = [Turn(i % 2, text) for i, text in enumerate(texts)]
    encode = (
      dialogue.encode_context if len(texts) % 2 else dialogue.encode_example
    )
    found = encode(turns, 1, ours, spec(template, system))
    assert found.tokens.tolist() == expected, texts
    if len(texts) % 2 == 0:
      check_loss(theirs, found, said[1::2])
  assert number == COUNT


def check_loss(theirs, example, answers):
  """The model's words and the end of each turn bear loss, nothing else."""
  own = np.flatnonzero(example.loss_kind)
  assert set(example.loss_kind[own]) == {dialogue.TEXT}
  runs = np.split(own, np.flatnonzero(np.diff(own) > 1) + 1)
  assert len(runs) == len(answers)
  for run, answer in zip(runs, answers, strict=True):
    *ids, last = example.tokens[run].tolist()
    assert last == theirs.eos_token_id
    assert theirs.decode(ids).removeprefix(" ") == answer.replace(
      "▁", " " if "▁" in theirs.get_vocab() else "▁"
    )


@pytest.mark.parametrize(("template", "kind"), PAIRS)
def test_the_cut_is_that_of_apply_chat_template(pair, template, kind):
  theirs, ours = pair(kind)
  theirs.chat_template = hf_tokenizers.CHAT_TEMPLATES[template]
  for texts in conversations(lookalikes=False):
    ids = theirs.apply_chat_template(
      messages(texts, SYSTEM),
      add_generation_prompt=len(texts) % 2,
      return_dict=False,
    )
    expected = np.array(ids)
    turns = [Turn(i % 2, text) for i, text in enumerate(texts)]
    found = dialogue.encode_context(
      turns, 1, ours, spec(template, SYSTEM)
    ).tokens
    if len(texts) % 2 == 0:
      found = np.append(found, theirs.eos_token_id)
      if template in ("chatml", "zephyr"):
        assert theirs.decode(expected[-1:]).endswith("\n")
        last = np.flatnonzero(expected == theirs.eos_token_id)[-1]
        expected = expected[: last + 1]
    if template == "llama2":
      (ends,) = np.nonzero(expected == theirs.eos_token_id)
      mark = theirs.convert_tokens_to_ids("▁")
      assert (expected[ends - 1] == mark).all()
      expected = np.delete(expected, ends - 1)
    np.testing.assert_array_equal(found, expected, repr(texts))


@pytest.mark.parametrize(("template", "kind"), [*PAIRS, ("bare", "smollm2")])
def test_photos(pair, template, kind):
  """Blocks are control ids and the ids of the caption; photos are slots."""
  theirs, ours = pair(kind)
  lines = stripped(hf_tokenizers.lines(60, seed=5))
  for caption, text in zip(lines[::2], lines[1::2], strict=False):
    mine = Photo("1", "", caption, "mine.jpg")
    yours = Photo("2", "", None, "yours.jpg")
    turns = [Turn(0, "", yours), Turn(0, text), Turn(1, text, mine)]
    settings = spec(template, SYSTEM)
    example = dialogue.encode_example(turns, 1, ours, settings)
    tokens, kinds = example.tokens.tolist(), example.loss_kind.tolist()
    ids = as_text(theirs, caption)[:96]
    block = [ours.img_id, *ids, ours.end_img_id]
    start = tokens.index(ours.img_id)
    assert tokens[start:] == [*block, *[ours.pad_id] * K, ours.eos_id]
    assert kinds[start:] == [2] * len(block) + [0] * K + [1]
    assert example.visual_index[-1 - K : -1].tolist() == [K, K + 1]
    seen = example.visual_index.tolist().index(0)
    # After a photo a text is one of its own.
    words = as_text(theirs, disarmed(template, text))
    assert tokens[seen + K : seen + K + len(words)] == words
    assert not any(kinds[: seen + K + len(words)])
    context = dialogue.encode_context(turns[:2], 1, ours, settings)
    size = len(context.tokens)
    assert context.tokens.tolist() == tokens[:size]
    assert all(kinds[size:start])


@pytest.mark.parametrize("kind", ["llama2 old", "llama3", "smollm2"])
def test_texts_of_one_turn_are_joined_with_a_space(pair, kind):
  theirs, ours = pair(kind)
  for texts in conversations(lookalikes=True)[:200]:
    turns = [Turn(0, text) for text in texts]
    context = dialogue.encode_context(turns, 1, ours, spec("bare", ""))
    assert context.tokens.tolist() == [
      ours.bos_id, *as_text(theirs, " ".join(texts)), ours.eos_id,
    ]  # fmt: skip
