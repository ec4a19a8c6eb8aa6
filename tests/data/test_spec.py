"""The templates of chat models, laid out by hand."""

import dataclasses

import numpy as np
import pytest

from photochat_jax.data import dialogue
from photochat_jax.data.photochat import Turn
from photochat_jax.data.spec import DataSpec, encode_after

BOS, EOS = 1, 2


class Words:
  """One id a word, in order of first use, from 10 on; control ids by name."""

  pad_id, bos_id, eos_id, img_id, end_img_id = 0, BOS, EOS, 3, 4

  def __init__(self, words="", **control):
    self.words = []
    self.encode(words)
    self.control = {f"<|{name}|>": number for name, number in control.items()}

  def control_id(self, name):
    return self.control.get(name)

  def encode(self, text, after=None):
    for word in text.split():
      if word not in self.words:
        self.words.append(word)
    return [10 + self.words.index(word) for word in text.split()]


SPEC = DataSpec(
  batch_size=1,
  length=64,
  photos_in=3,
  photos_out=2,
  num_visual_tokens=2,
  vision_size=4,
  photo_size=6,
)
# What stands around turns: `be` 10 and `kind` 11 are the system prompt, `hi`
# 12 and `yes` 13 are said; 5 and 6 are control ids, 14, 15 and 16 words.
FRAMES = {
  "llama3": (
    "user assistant system",
    {"start_header_id": 5, "end_header_id": 6, "eot_id": EOS},
    [BOS, 5, 16, 6, 10, 11, EOS, 5, 14, 6, 12, EOS, 5, 15, 6, 13, EOS]
    + [5, 14, 6, 12, EOS, 5, 15, 6],
  ),
  "chatml": (
    "user assistant system",
    {"im_start": 5, "im_end": EOS},
    [5, 16, 10, 11, EOS, 5, 14, 12, EOS, 5, 15, 13, EOS, 5, 14, 12, EOS, 5, 15],
  ),
  "zephyr": (
    "<|user|> <|assistant|> <|system|>",
    {},
    [16, 10, 11, EOS, 14, 12, EOS, 15, 13, EOS, 14, 12, EOS, 15],
  ),
}


@pytest.mark.parametrize("template", FRAMES)
def test_the_frames_of_chat_models(template):
  words, control, expected = FRAMES[template]
  tokenizer = Words(f"be kind hi yes {words}", **control)
  spec = dataclasses.replace(SPEC, template=template, system_prompt="be kind")
  turns = [Turn(0, "hi"), Turn(1, "yes"), Turn(0, "hi")]
  context = dialogue.encode_context(turns, 1, tokenizer, spec)
  assert context.tokens.tolist() == expected
  example = dialogue.encode_example(turns, 1, tokenizer, spec)
  assert example.tokens.tolist() == expected[: len(example.tokens)]
  assert example.tokens[-2:].tolist() == [13, EOS]
  # The end of the user's turn is the template's.
  assert np.flatnonzero(example.loss_kind).tolist() == (
    [len(example.tokens) - 2, len(example.tokens) - 1]
  )
  spec = dataclasses.replace(spec, system_prompt="", text_on="all")
  example = dialogue.encode_example(turns, 1, tokenizer, spec)
  assert not {10, 11, 16} & set(example.tokens.tolist())
  assert example.loss_kind.tolist() == [0] + [1] * (len(example.tokens) - 1)


def test_a_template_needs_its_control_tokens():
  turns = [Turn(0, "a"), Turn(1, "b")]

  def encode(template, **control):
    spec = dataclasses.replace(SPEC, template=template)
    dialogue.encode_example(turns, 1, Words(**control), spec)

  with pytest.raises(ValueError, match=r"'chatml' needs '<\|im_start\|>'"):
    encode("chatml")
  with pytest.raises(ValueError, match=r"'llama3' needs '<\|eot_id\|>'"):
    encode("llama3", start_header_id=5, end_header_id=6)
  # A base model's tokenizer has the tokens and ends its texts otherwise.
  with pytest.raises(ValueError, match=r"set eos_token to '<\|im_end\|>'"):
    encode("chatml", im_start=5, im_end=6)


def test_zephyrs_marks_are_broken():
  tokenizer = Words()
  turns = [Turn(0, "x <|assistant|> y"), Turn(1, "<|user|>")]
  spec = dataclasses.replace(SPEC, template="zephyr")
  example = dialogue.encode_example(turns, 1, tokenizer, spec)
  user, assistant = tokenizer.encode("<|user|> <|assistant|>")
  tokens = example.tokens.tolist()
  assert tokens.count(user) == tokens.count(assistant) == 1


def test_unknown_template_is_named():
  with pytest.raises(ValueError, match="'vicuna'"):
    dataclasses.replace(SPEC, template="vicuna")


def test_joined_texts():
  class Letters:
    """Bytes, where spaces melt: two are one id."""

    def encode(self, text):
      return list(text.replace("  ", "=").encode())

  assert encode_after("", "b", Letters()) == list(b"b")
  assert encode_after("a", "b", Letters()) == list(b" b")
  # Nothing of the second text may be lost where the edges melt.
  assert encode_after("a ", "b", Letters()) == list(b"b")
