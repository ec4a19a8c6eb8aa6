"""Of a dialogue that does not fit, as many of the newest turns stay as can."""

import dataclasses
import itertools

import numpy as np
from hypothesis import assume, given, settings
from test_dialogue_rules import Words, specs, turns

from photochat_jax.data import dialogue
from photochat_jax.data.spec import LeftOut

ROOM = {"length": 10_000, "photos_in": 100, "photos_out": 100}


# One for all, since it numbers words as it meets them.
WORDS = Words("w x y z")


def encode(turns, spec):
  """The example of side 1, or None."""
  try:
    return dialogue.encode_example(turns, 1, WORDS, spec)
  except LeftOut:
    return None


def starts(turns, side=1):
  """Where each stretch of one side begins, up to the side's last one."""
  spoken = dialogue.merge_turns(turns)
  groups = [
    (own, next(group).start)
    for own, group in itertools.groupby(spoken, lambda s: s.speaker == side)
  ]
  while groups and not groups[-1][0]:
    groups.pop()
  return [start for _, start in groups]


def sizes(example):
  return len(example.tokens), len(example.photos), len(example.captions)


@settings(max_examples=300, deadline=None)
@given(turns, specs)
def test_the_newest_turns_stay_whole_and_no_more_would_fit(turns, spec):
  example = encode(turns, spec)
  assume(example is not None)
  begins = starts(turns)
  cut = example.cut_turns
  if cut == len(begins):
    return  # Not even the last turn fits.
  free = dataclasses.replace(spec, **ROOM)
  kept = encode(turns[begins[cut] :], free)
  # What is there is what those turns alone would be.
  assert example.tokens.tolist() == kept.tokens.tolist()
  assert example.loss_kind.tolist() == kept.loss_kind.tolist()
  assert example.visual_index.tolist() == kept.visual_index.tolist()
  assert [c.photo for c in example.captions] == [c.photo for c in kept.captions]
  if cut:
    more = encode(turns[begins[cut - 1] :], free)
    if more is None:  # An older photo has no file: the side would be dropped.
      return
    limits = spec.length, spec.photos_in, spec.photos_out
    assert any(n > limit for n, limit in zip(sizes(more), limits, strict=True))


@settings(max_examples=300, deadline=None)
@given(turns, specs)
def test_a_photo_block_is_there_whole_or_not_at_all(turns, spec):
  spec = dataclasses.replace(spec, length=min(spec.length, 24))
  example = encode(turns, spec)
  assume(example is not None)
  tokens, k = example.tokens.tolist(), spec.num_visual_tokens
  assert example.visual_index.max(initial=-1) + 1 == k * len(example.photos)
  opened = [i for i, token in enumerate(tokens) if token == WORDS.img_id]
  assert [c.start for c in example.captions] == [i + 1 for i in opened]
  for caption in example.captions:
    stop = caption.start + len(caption.tokens)
    assert tokens[stop] == WORDS.end_img_id
    ids = WORDS.encode(caption.photo.caption)[: spec.caption_tokens]
    assert tokens[caption.start : stop] == ids
    slots = example.visual_index[stop + 1 : stop + 1 + k]
    if caption.photo.path is not None:
      assert (np.diff(slots) == 1).all() and slots[0] % k == 0


def test_the_strategies_do_cut_dialogues():
  """Else the properties above would hold of nothing."""
  found = []

  @settings(max_examples=200, deadline=None, database=None)
  @given(turns, specs)
  def look(turns, spec):
    example = encode(turns, spec)
    if example is not None and example.cut_turns:
      found.append(example.cut_turns < len(starts(turns)))

  look()
  assert found.count(True) > 10 and found.count(False) > 3
