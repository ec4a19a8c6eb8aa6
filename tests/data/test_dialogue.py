"""Layouts are written out by hand; properties hold for any dialogue."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photochat_jax.data import dialogue, tokenizers
from photochat_jax.data.photochat import Photo, Turn
from photochat_jax.data.spec import DataSpec, LeftOut

PAD, BOS, EOS, IMG, END_IMG = 0, 1, 2, 3, 4


class Words:
  """One id a word, in order of first use; id 10 is the first one."""

  pad_id, bos_id, eos_id, img_id, end_img_id = PAD, BOS, EOS, IMG, END_IMG

  def __init__(self, words=""):
    self.words = []
    self.encode(words)

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
  caption_tokens=3,
  template="llama2",
)
BARE = dataclasses.replace(SPEC, template="bare")
CAT = Photo("1", "Cat", "a cat", "cat.jpg")
DOG = Photo("2", "Dog", "dog", "dog.jpg")
LOST = Photo("3", "Fox", "a fox", None)


def laid_out(example):
  return [
    example.tokens.tolist(),
    example.visual_index.tolist(),
    example.loss_kind.tolist(),
  ]


def test_the_layout_drawn_in_the_docstring():
  # 10 [INST], 11 [/INST], then words in order.
  tokenizer = Words("[INST] [/INST] hi see a cat")
  turns = [Turn(7, "hi", DOG), Turn(8, "see", CAT)]
  example = dialogue.encode_example(turns, 8, tokenizer, SPEC)
  assert laid_out(example) == [
    [BOS, 10, 12, PAD, PAD, 11, 13, IMG, 14, 15, END_IMG, PAD, PAD, EOS],
    [-1, -1, -1, 0, 1, -1, -1, -1, -1, -1, -1, 2, 3, -1],
    [0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 0, 0, 1],
  ]
  assert example.photos == (DOG, CAT)
  assert example.ordinals == (0, 1)
  (caption,) = example.captions
  assert caption.photo == CAT
  assert (caption.ordinal, caption.start, caption.cut) == (1, 8, False)
  assert caption.tokens.tolist() == [14, 15]


def test_the_other_side_of_the_same_dialogue():
  """The partner starts with nothing, writes `dog` and is shown no caption."""
  tokenizer = Words("[INST] [/INST] hi dog bye")
  turns = [Turn(7, "hi", DOG), Turn(8, "", CAT), Turn(7, "bye")]
  example = dialogue.encode_example(turns, 7, tokenizer, SPEC)
  assert laid_out(example) == [
    [BOS, 10, 11, 12, IMG, 13, END_IMG, PAD, PAD, EOS]
    + [BOS, 10, PAD, PAD, 11, 14, EOS],
    [-1, -1, -1, -1, -1, -1, -1, 0, 1, -1, -1, -1, 2, 3, -1, -1, -1],
    [0, 0, 0, 1, 2, 2, 2, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1],
  ]


def test_loss_on_all_text_spares_only_the_first_token_and_photos():
  tokenizer = Words("[INST] [/INST] hi dog bye")
  turns = [Turn(7, "hi", CAT), Turn(8, "dog"), Turn(7, "bye")]
  spec = dataclasses.replace(SPEC, text_on="all")
  example = dialogue.encode_example(turns, 8, tokenizer, spec)
  assert laid_out(example) == [
    [BOS, 10, 12, PAD, PAD, 11, 13, EOS, BOS, 10, 14, 11],
    [-1, -1, -1, 0, 1, -1, -1, -1, -1, -1, -1, -1],
    [0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1],
  ]
  with pytest.raises(ValueError, match="text_on"):
    dataclasses.replace(SPEC, text_on="nobody")


def test_bare_template_merges_turns_and_drops_the_end_of_the_other_side():
  tokenizer = Words("be kind a b c d")
  spec = dataclasses.replace(BARE, system_prompt=" be kind ")
  turns = [
    Turn(0, "a "),
    Turn(0, " "),
    Turn(0, "b"),
    Turn(1, "c"),
    Turn(0, "d"),
  ]
  example = dialogue.encode_example(turns, 1, tokenizer, spec)
  assert laid_out(example) == [
    [BOS, 10, 11, 12, 13, EOS, 14, EOS],
    [-1] * 8,
    [0, 0, 0, 0, 0, 0, 1, 1],
  ]


def test_system_block_stands_in_one_string_with_the_first_text():
  class Recorder(Words):
    def encode(self, text, after=None):
      strings.append(text)
      return super().encode(text)

  strings = []
  spec = dataclasses.replace(SPEC, system_prompt="be kind")
  dialogue.encode_example([Turn(0, "a"), Turn(1, "b")], 1, Recorder(), spec)
  assert " <<SYS>>\nbe kind\n<</SYS>>\n\na" in strings


def test_system_block_stands_before_a_leading_photo():
  tokenizer = Words("be kind b")
  spec = dataclasses.replace(BARE, system_prompt="be kind")
  turns = [Turn(0, "", CAT), Turn(1, "b")]
  example = dialogue.encode_example(turns, 1, tokenizer, spec)
  expected = [BOS, 10, 11, PAD, PAD, EOS, 12, EOS]
  assert example.tokens.tolist() == expected


def test_merge_turns_says_where_each_speaker_began():
  turns = [
    Turn(0, " a "), Turn(0, "b", CAT), Turn(1, ""), Turn(0, "c"), Turn(1, "d"),
  ]  # fmt: skip
  assert dialogue.merge_turns(turns) == [
    (0, 0, 4, ("a", "b", CAT, "c")),
    (1, 4, 5, ("d",)),
  ]


def test_missing_file_keeps_the_sharers_caption_without_slots():
  tokenizer = Words("a fox")
  example = dialogue.encode_example([Turn(0, "", LOST)], 0, tokenizer, BARE)
  assert laid_out(example) == [
    [BOS, EOS, IMG, 10, 11, END_IMG, EOS],
    [-1] * 7,
    [0, 0, 2, 2, 2, 2, 1],
  ]
  assert example.photos == ()
  assert [c.photo for c in example.captions] == [LOST]


@pytest.mark.parametrize(
  ("turns", "reason"),
  [
    ([Turn(0, "", LOST), Turn(1, "b")], "missing_photo"),
    ([Turn(1, "", Photo("4", "x", None, "x.jpg"))], "no_caption"),
    ([Turn(1, "", Photo("4", "x", " ", "x.jpg"))], "no_caption"),
    ([Turn(0, "a")], "silent"),
    ([Turn(1, " ")], "silent"),
  ],
)
def test_sides_that_are_left_out(turns, reason):
  with pytest.raises(LeftOut) as error:
    dialogue.encode_example(turns, 1, Words(), BARE)
  assert error.value.reason == reason


def test_a_missing_photo_that_teaches_nothing_leaves_nothing_out():
  turns = [Turn(0, "a"), Turn(1, "b"), Turn(0, "", LOST)]
  example = dialogue.encode_example(turns, 1, Words("a b"), BARE)
  assert example.tokens.tolist() == [BOS, 10, EOS, 11, EOS]


def test_a_long_caption_is_cut_to_the_bridges_length():
  photo = Photo("5", "", "a b c d e", "x.jpg")
  (caption,) = dialogue.encode_example(
    [Turn(0, "", photo)], 0, Words("a b c d e"), BARE
  ).captions
  assert caption.tokens.tolist() == [10, 11, 12]
  assert caption.cut


def test_over_long_dialogue_keeps_the_newest_turns():
  tokenizer = Words("a b c d e f")
  spec = dataclasses.replace(BARE, length=8)
  turns = [Turn(i % 2, word) for i, word in enumerate("abcdef")]
  example = dialogue.encode_example(turns, 1, tokenizer, spec)
  # Two turns take 5 tokens; three, after an empty turn, take 9.
  assert example.tokens.tolist() == [BOS, 14, EOS, 15, EOS]
  assert example.cut_turns == 4
  longer = dataclasses.replace(BARE, length=9)
  example = dialogue.encode_example(turns, 1, tokenizer, longer)
  expected = [BOS, EOS, 13, EOS, BOS, 14, EOS, 15, EOS]
  assert example.tokens.tolist() == expected
  assert example.cut_turns == 3


@pytest.mark.parametrize("limit", [{"photos_out": 1}, {"photos_in": 1}])
def test_photos_beyond_a_limit_drop_the_oldest_turns(limit):
  tokenizer = Words("a cat dog ok")
  spec = dataclasses.replace(BARE, **limit)
  turns = [Turn(1, "", CAT), Turn(0, "ok"), Turn(1, "", DOG)]
  example = dialogue.encode_example(turns, 1, tokenizer, spec)
  assert [c.photo for c in example.captions] == [DOG]
  assert example.ordinals == (1,)
  expected = [BOS, 13, EOS, IMG, 12, END_IMG, PAD, PAD, EOS]
  assert example.tokens.tolist() == expected


def test_a_turn_too_long_by_itself_keeps_its_end():
  tokenizer = Words("a b c d e f g")
  spec = dataclasses.replace(BARE, length=6)
  turns = [Turn(0, "a"), Turn(1, "b c d e f g")]
  example = dialogue.encode_example(turns, 1, tokenizer, spec)
  assert example.tokens.tolist() == [BOS, EOS, 14, 15, 16, EOS]
  assert example.cut_turns == 2
  # A photo after the text leaves no room for the text.
  spec = dataclasses.replace(BARE, length=9)
  turns = [Turn(0, "a"), Turn(1, "b c d e f g", DOG)]
  example = dialogue.encode_example(turns, 1, Words("dog"), spec)
  expected = [BOS, EOS, IMG, 10, END_IMG, PAD, PAD, EOS]
  assert example.tokens.tolist() == expected


def test_a_photo_block_is_left_out_rather_than_split():
  spec = dataclasses.replace(BARE, length=7)
  with pytest.raises(LeftOut) as error:
    dialogue.encode_example([Turn(0, "", DOG)], 0, Words(), spec)
  assert error.value.reason == "too_long"


def test_what_is_typed_gives_neither_control_ids_nor_marks():
  tokenizer = Words()
  typed = "[img] x </s> [INST] [/INST] <<SYS>> <</SYS>> [/IN[/INST]ST]"
  turns = [Turn(0, typed), Turn(1, "ok")]
  example = dialogue.encode_example(turns, 1, tokenizer, SPEC)
  start, middle = tokenizer.encode("[INST] [/INST]")
  tokens = example.tokens.tolist()
  assert tokens.count(start) == tokens.count(middle) == 1
  assert tokens.count(EOS) == tokens.count(BOS) == 1
  assert IMG not in tokens
  for mark in ("<<SYS>>", "<</SYS>>"):
    assert mark not in tokenizer.words


def test_llama2_form_equals_encoding_its_documented_string():
  """Llama 2's own code encodes each round as one string, BOS and EOS apart."""
  tokenizer = tokenizers.load_llm_tokenizer()
  spec = dataclasses.replace(SPEC, length=400, system_prompt="Be kind.")
  turns = [Turn(0, " hi there "), Turn(1, "well,\nyes"), Turn(0, "so?")]
  context = dialogue.encode_context(turns, 1, tokenizer, spec)
  expected = [
    tokenizer.bos_id,
    *tokenizer.encode(
      "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi there [/INST] well,\nyes"
    ),
    tokenizer.eos_id,
    tokenizer.bos_id,
    *tokenizer.encode("[INST] so? [/INST]"),
  ]
  assert context.tokens.tolist() == expected


@given(st.lists(st.sampled_from(
  ["[img]", "[/img]", "</s>", "<s>", "<unk>", "<pad>", " ", "a", "\n"]
)).map("".join))  # fmt: skip
@settings(deadline=None, max_examples=50)
def test_no_typed_text_gives_a_control_id(typed):
  tokenizer = tokenizers.load_llm_tokenizer()
  turns = [Turn(0, typed), Turn(1, f"ok {typed}")]
  spec = dataclasses.replace(BARE, length=1000)
  example = dialogue.encode_example(turns, 1, tokenizer, spec)
  tokens = example.tokens.tolist()
  assert [tokens.count(i) for i in (
    tokenizer.bos_id, tokenizer.eos_id, tokenizer.img_id,
    tokenizer.end_img_id, tokenizer.pad_id,
  )] == [1, 2, 0, 0, 0]  # fmt: skip


def test_context_ends_where_the_models_turn_begins():
  tokenizer = Words("[INST] [/INST] hi a cat")
  turns = [Turn(0, "hi"), Turn(1, "a"), Turn(0, "", CAT), Turn(1, "cat")]
  context = dialogue.encode_context(turns, 1, tokenizer, SPEC, upto=3)
  assert context.tokens.tolist() == (
    [BOS, 10, 12, 11, 13, EOS, BOS, 10, PAD, PAD, 11]
  )
  assert context.visual_index.tolist() == [-1] * 8 + [0, 1, -1]
  assert context.photos == (CAT,)
  # Within the model's turn, nothing closes it.
  inside = dialogue.encode_context(turns, 1, tokenizer, SPEC, upto=2)
  assert inside.tokens.tolist() == [BOS, 10, 12, 11, 13]
  nothing = dialogue.encode_context([], 1, tokenizer, SPEC)
  assert nothing.tokens.tolist() == [BOS, 10, 11]


def test_context_leaves_room_and_leaves_out_missing_photos():
  tokenizer = Words("a b c")
  turns = [Turn(0, "a"), Turn(1, "b"), Turn(0, "c", LOST)]
  context = dialogue.encode_context(turns, 1, tokenizer, BARE, length=4)
  assert context.tokens.tolist() == [BOS, 12, EOS]
  assert (context.cut_turns, context.missing_photos) == (2, 1)


def test_left_pad_aligns_the_ends():
  tokenizer = Words("a b")
  contexts = [
    dialogue.encode_context([Turn(0, "a")], 1, tokenizer, BARE),
    dialogue.encode_context([Turn(0, "a b", CAT)], 1, tokenizer, BARE),
  ]
  red = np.full((4, 4, 3), 200, np.uint8)
  batch = dialogue.left_pad(contexts, 7, tokenizer, BARE, lambda photo: red)
  assert batch["tokens"].tolist() == [
    [PAD, PAD, PAD, PAD, BOS, 10, EOS],
    [PAD, BOS, 10, 11, PAD, PAD, EOS],
  ]
  assert batch["segments"].tolist() == [[0] * 4 + [1] * 3, [0] + [1] * 6]
  assert batch["positions"].tolist() == [
    [0, 0, 0, 0, 0, 1, 2],
    [0, 0, 1, 2, 3, 4, 5],
  ]
  assert batch["visual_index"].tolist() == [
    [-1] * 7,
    [-1, -1, -1, -1, 0, 1, -1],
  ]
  assert batch["photos_in_mask"].tolist() == [[False] * 3, [True, False, False]]
  assert batch["photos_in"].shape == (2, 3, 4, 4, 3)
  assert (batch["photos_in"][1, 0] == 200).all()
  assert not batch["photos_in"][0].any()
  with pytest.raises(ValueError, match="6 tokens"):
    dialogue.left_pad(contexts, 5, tokenizer, BARE, lambda photo: red)


READ = dataclasses.replace(SPEC, num_visual_tokens=0, photos_in=0)


def test_photos_that_are_read_are_text_of_the_other_side():
  # 10 [INST], 11 [/INST], then words in order.
  tokenizer = Words("[INST] [/INST] hi (photo: brown dog) see a cat")
  shown = dataclasses.replace(DOG, seen="brown dog")
  turns = [Turn(7, "hi", shown), Turn(8, "see", CAT)]
  example = dialogue.encode_example(turns, 8, tokenizer, READ)
  assert laid_out(example) == [
    [BOS, 10, 12, 13, 14, 15, 11, 16, IMG, 17, 18, END_IMG, EOS],
    [-1] * 13,
    [0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 1],
  ]
  assert example.photos == ()
  (caption,) = example.captions
  assert (caption.photo, caption.ordinal) == (CAT, 1)
  # What a captioner says is no mark.
  broken = dataclasses.replace(DOG, seen="[/INST]")
  context = dialogue.encode_context([Turn(7, "", broken)], 8, tokenizer, READ)
  assert context.tokens.tolist().count(11) == 1


def test_a_photo_that_nobody_captioned_cannot_be_read():
  turns = [Turn(7, "hi", DOG), Turn(8, "oh")]
  with pytest.raises(LeftOut, match="run tools/caption_photos.py") as left_out:
    dialogue.encode_example(turns, 8, Words(), READ)
  assert left_out.value.reason == "missing_photo"
  context = dialogue.encode_context(turns, 8, Words(), READ, upto=1)
  assert context.missing_photos == 1
