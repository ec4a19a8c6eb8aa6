"""The report's dialogues: what is shown where, and what is right or wrong."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from photochat_jax import assess, generate, said, showcase
from photochat_jax.data.dialogue import merge_turns
from photochat_jax.data.photochat import Dialogue, Photo, Turn
from photochat_jax.metrics.figures import Figures
from photochat_jax.metrics.report import Mark, Said
from photochat_jax.transcript import Prompt

SCENE = {"shape": "ball", "colour": "red"}


def reply(text, caption=None):
  return generate.Reply((), text, caption, caption is None)


@pytest.fixture
def gold(tmp_path):
  path = tmp_path / "gold.png"
  Image.new("RGB", (6, 4), (0, 0, 255)).save(path)
  return Photo("p", "labels", "a nice ball", path)


def found_of(turns, replies, answers=()):
  """`Found` with a reply for each merged turn of user 0."""
  facts = {"photos": {"p": {"attributes": SCENE}}}
  dialogue = Dialogue("12", "test", tuple(turns), facts)
  spoken = [s for s in merge_turns(turns) if s.speaker == 0]
  entries = [
    said.ModelTurn(Prompt(0, 0, s.start), s, said.first_photo(s), *r)
    for s, r in zip(spoken, replies, strict=True)
  ]
  return assess.Found(
    Figures(), [], {}, [dialogue], entries, list(answers)
  )


def bubbles_of(found):
  return showcase.example(found.dialogues[0], 0, {"": found}, 8).bubbles


def test_gold_and_drawn_photo_stand_side_by_side(gold):
  drawn = np.full((8, 8, 3), 9, np.uint8)
  seen = {"shape": "ball", "colour": "blue"}
  turns = [Turn(1, "hi"), Turn(0, "look"), Turn(0, "", gold), Turn(0, "nice?")]
  found = found_of(turns, [(reply("see", "a ball"), drawn, SCENE, seen)])
  theirs, mine = bubbles_of(found)
  assert not theirs.mine and theirs.parts == ("hi",) and theirs.said == ()
  assert mine.mine
  assert mine.said == (Said("see", (Mark("shares a photo", True),)),)
  before, (left, right), after = mine.parts
  assert (before, after) == ("look", "nice?")
  assert left.caption == "a nice ball"
  assert left.marks == (Mark("ball"), Mark("red"))
  np.testing.assert_array_equal(left.pixels, np.full((8, 8, 3), (0, 0, 255)))
  assert right.caption == "a ball"
  assert right.marks == (Mark("ball", True), Mark("blue", False))
  np.testing.assert_array_equal(right.pixels, drawn)


def test_a_photo_not_shared_is_an_empty_frame(gold):
  found = found_of([Turn(1, "hi"), Turn(0, "", gold)], [(reply("no"),)])
  _, mine = bubbles_of(found)
  ((_, right),) = mine.parts
  assert right.pixels is None and right.marks == ()
  assert mine.said == (Said("no", (Mark("shares no photo", False),)),)


def test_a_photo_nobody_asked_for_is_wrong():
  found = found_of([Turn(1, "hi"), Turn(0, "yes")], [(reply("so", "a cat"),)])
  _, mine = bubbles_of(found)
  assert mine.said == (Said("so [a cat]", (Mark("shares a photo", False),)),)


def test_plain_turns_have_no_verdict():
  found = found_of([Turn(1, "hi"), Turn(0, "yes")], [(reply("so"),)])
  _, mine = bubbles_of(found)
  assert mine.said == (Said("so"),)


def test_answers_of_either_side_are_marked():
  turns = [Turn(0, "what colour?"), Turn(1, "it is mint")]
  answer = said.Answer(0, 1, "wall", "mint", "it is pink")
  found = found_of(turns, [(reply("what"),)], [answer])
  _, theirs = bubbles_of(found)
  assert not theirs.mine
  assert theirs.said == (Said("it is pink", (Mark("wall: mint", False),)),)


def test_several_models_stand_beside_each_other(gold):
  turns = [Turn(1, "hi"), Turn(0, "look"), Turn(0, "", gold)]
  drawn = np.full((8, 8, 3), 9, np.uint8)
  one = found_of(turns, [(reply("see", "a ball"), drawn, SCENE, SCENE)])
  other = said.Said(
    [dataclasses.replace(one.turns[0], reply=reply("no"), drawn=None)], []
  )
  _, mine = showcase.example(
    one.dialogues[0], 0, {"joint": one, "apart": other}, 8
  ).bubbles
  replies = [(one.by, one.text) for one in mine.said]
  assert replies == [("joint", "see"), ("apart", "no")]
  _, pictures = mine.parts
  assert [p.label for p in pictures] == ["in the data", "joint", "apart"]
  assert pictures[2].pixels is None


@pytest.mark.parametrize("broken", [False, True])
def test_a_missing_or_broken_file_is_an_empty_frame(tmp_path, broken):
  path = tmp_path / "broken.jpg" if broken else None
  if broken:
    path.write_text("<html>")
  photo = Photo("elsewhere", "Cat, Tree", None, path)
  found = found_of([Turn(1, "", photo), Turn(0, "oh")], [(reply("oh"),)])
  theirs, _ = bubbles_of(found)
  (((picture,),)) = theirs.parts
  assert picture.pixels is None
  assert picture.caption == "Cat, Tree" and picture.marks == ()
