"""What is indexed, numbered, counted and kept."""

import dataclasses

import numpy as np
import pytest

from photochat_jax.data import index
from photochat_jax.data.photochat import Dialogue, Photo, Turn
from photochat_jax.data.spec import DataSpec


class Words:
  """Every letter of a word is its id; `encoded` counts the calls."""

  pad_id, bos_id, eos_id, img_id, end_img_id = range(5)
  digest = "words"
  encoded = 0

  def encode(self, text):
    self.encoded += 1
    return [ord(word[0]) for word in text.split()]

  def decode(self, ids):
    return " ".join(map(chr, ids))


class Clip:
  digest, max_length, pad_id = "clip", 6, 0


def align(llm_tokenizer, clip_tokenizer, caption_ids, text):
  """Only the second of 6 slots is used, by the first token."""
  assert text == llm_tokenizer.decode(caption_ids)
  alignment = np.zeros((6, len(caption_ids)), np.float32)
  alignment[1, 0] = 1
  return np.arange(6), alignment, np.ones(len(caption_ids), bool)


@pytest.fixture(autouse=True)
def no_vocabulary(monkeypatch):
  monkeypatch.setattr(index.vocabulary, "align", align)
  index.forget()


SPEC = DataSpec(
  batch_size=1,
  length=200,
  photos_in=9,
  photos_out=9,
  num_visual_tokens=2,
  vision_size=4,
  photo_size=8,
  caption_tokens=3,
  template="bare",
)


def build(dialogues, spec=SPEC, words=None, clip=None):
  return index.build_index(dialogues, spec, words or Words(), clip or Clip())


def talk(number, *turns):
  return Dialogue(str(number), "train", turns, None)


def photo(name, path="a.jpg", caption="a b"):
  return Photo(name, "", caption, path)


CHAT = [
  talk(0, Turn(0, "a"), Turn(1, "", photo("p")), Turn(0, "b", photo("q"))),
  talk(1, Turn(5, "c d e f g h"), Turn(5, "", photo("r"))),
  talk(2, Turn(1, "", photo("s")), Turn(0, "", photo("p")), Turn(1, "i")),
]


def test_example_ids_count_photos_and_sides():
  # Two ids a photo where two sides speak, one where one does.
  seen = {
    e.caption_ids: [c.photo.id for c in e.example.captions]
    for e in build(CHAT).examples
  }
  expected = {(2,): "q", (1,): "p", (4,): "r", (7,): "p", (6,): "s"}
  assert seen == {ids: [name] for ids, name in expected.items()}
  shown = [e.photo_ids for e in build(CHAT).examples]
  # Side 0 of the last dialogue is shown `s` and its own `p`; side 1 both.
  assert shown == [(0, 2), (1,), (4,), (5, 7), (6, 8)]


def test_alignment_is_kept_without_its_zeros():
  (aligned,) = build(CHAT[1:2]).examples[0].aligned
  np.testing.assert_array_equal(aligned.alignment, [[0, 0], [1, 0]])
  assert aligned.clip_tokens.tolist() == [0, 1, 2, 3, 4, 5]


def test_ids_do_not_depend_on_what_is_cut():
  # A caption's block with its template takes 9 tokens; only the last example
  # ends in a turn without one.
  short = build(CHAT, dataclasses.replace(SPEC, length=9, photos_in=1))
  ids = [e.caption_ids for e in short.examples]
  assert ids == [(2,), (1,), (4,), (7,), ()]
  assert short.counts["examples_cut"] == 5


def test_counts_of_what_is_there_cut_and_left_out():
  lost = photo("x", path=None, caption="a b c d")
  turns = [Turn(i % 2, f"{w} {w}") for i, w in enumerate("abcdef")]
  dialogues = [
    talk(0, *turns),
    talk(1, Turn(0, "", lost), Turn(1, "n")),
    talk(2, Turn(0, "", photo("y", caption=None))),
    talk(3, Turn(0, " ")),
  ]
  counts = build(dialogues, dataclasses.replace(SPEC, length=8)).counts
  assert counts == {
    "dialogues": 4,
    "examples": 3,
    # Two turns of two words: 1 + 2 + 1 + 2 + 1, twice. The photo without a
    # file: 2 + 3 of its caption + 2 marks + 1.
    "tokens": 7 + 7 + 8,
    "loss_tokens": 3 + 3 + 6,
    "photos_in": 0,
    "photos_out": 1,
    "photos_out_missing": 1,
    "captions_cut": 1,
    # Side 1 keeps 2 turns of 6; side 0, which does not see the last, of 5.
    "turns_cut": 4 + 3,
    "examples_cut": 2,
    "left_out/missing_photo": 1,
    "left_out/no_caption": 1,
    "left_out/silent": 1,
  }


def test_an_index_is_made_once_for_the_same_data_and_tokenizers():
  words = Words()
  first = build(CHAT, words=words)
  encoded = words.encoded
  other = dataclasses.replace(SPEC, batch_size=9, augment=True)
  assert build(list(CHAT), other, words) is first
  assert words.encoded == encoded
  longer = Clip()
  longer.max_length = 8
  words.digest = "other words"
  for spec, llm, clip in (
    (dataclasses.replace(SPEC, length=100), Words(), Clip()),
    (SPEC, words, Clip()),
    (SPEC, Words(), longer),
  ):
    assert build(CHAT, spec, llm, clip) is not first
  assert build(CHAT[:2]) is not first


def test_pictures_are_listed_once():
  facts = {"photos": {"t": {"full_caption": "a full b"}}}
  dialogues = [
    *CHAT[:2],
    Dialogue("3", "train", (Turn(0, "", photo("t")),), facts),
    talk(4, Turn(0, "", photo("u", path=None)), Turn(0, "", photo("r"))),
    talk(5, Turn(0, "", photo("v", caption=None))),
  ]
  found = index.list_pictures(dialogues, captioned=False)
  assert [(p.photo.id, p.number) for p in found] == [
    ("p", 0), ("q", 1), ("r", 2), ("t", 3), ("v", 4),
  ]  # fmt: skip
  found = index.list_pictures(dialogues, captioned=True)
  assert [p.photo.id for p in found] == ["p", "q", "r", "t"]
  assert [p.caption for p in found] == ["a b", "a b", "a b", "a full b"]


def test_questions_show_the_photo_then_ask_what_its_dialogue_asks():
  cat = Photo("p/1", "Cat", "a cat", "1.jpg")
  lost = Photo("p/2", "Dog", "a dog", None)
  talk = Dialogue(
    id="0",
    split="train",
    turns=(
      Turn(0, "look", cat),
      Turn(1, "which wall?"),
      Turn(0, "pink"),
      Turn(0, "", lost),
    ),
    facts={
      "photos": {"p/1": {"full_caption": "a red cat"}},
      "questions": [{"turn": 2, "photo_id": "p/1"}],
    },
  )
  (made,) = index.as_questions([talk])
  assert [(turn.speaker, turn.text) for turn in made.turns] == [
    (1, ""),
    (0, "a red cat"),
    (1, "which wall?"),
    (0, "pink"),
  ]
  # Without a caption nobody is trained to share this photo.
  assert made.turns[0].photo == Photo("p/1", "Cat", None, "1.jpg")
