"""Rules that the layout of any dialogue keeps."""

import dataclasses

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from photochat_jax.data import dialogue
from photochat_jax.data.photochat import Photo, Turn
from photochat_jax.data.spec import TEMPLATES, DataSpec, LeftOut

PAD, BOS, EOS, IMG, END_IMG = 0, 1, 2, 3, 4


class Words:
  """One id a word, in order of first use; id 10 is the first one."""

  pad_id, bos_id, eos_id, img_id, end_img_id = PAD, BOS, EOS, IMG, END_IMG

  def control_id(self, name):
    return EOS if name in ("<|eot_id|>", "<|im_end|>") else 5

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

# A busy machine is no reason to fail.
RELAXED = settings(
  deadline=None,
  max_examples=200,
  suppress_health_check=[HealthCheck.too_slow],
)

photos = st.builds(
  Photo,
  st.sampled_from("pqr"),
  st.just(""),
  st.sampled_from(["w", "w x", "w x y z w x"]),
  st.sampled_from(["file.jpg", None]),
)
turns = st.lists(
  st.builds(
    Turn,
    st.integers(0, 2),
    st.lists(st.sampled_from("ABCDEFG"), max_size=6).map(" ".join),
    st.none() | photos,
  ),
  max_size=10,
)
specs = st.builds(
  dataclasses.replace,
  st.just(SPEC),
  length=st.integers(4, 60),
  photos_in=st.integers(1, 3),
  photos_out=st.integers(1, 2),
  num_visual_tokens=st.integers(1, 3),
  template=st.sampled_from(TEMPLATES),
  system_prompt=st.sampled_from(["", "sys tem"]),
)


def encode(turns, side, spec):
  """The example, or None, with a tokenizer where w-z are captions' words."""
  tokenizer = Words("w x y z")
  try:
    return dialogue.encode_example(turns, side, tokenizer, spec), tokenizer
  except LeftOut:
    return None, tokenizer


@RELAXED
@given(turns, specs)
def test_any_example_keeps_the_rules(turns, spec):
  example, tokenizer = encode(turns, 1, spec)
  if example is None:
    return
  tokens, kinds = example.tokens, example.loss_kind
  visual, k = example.visual_index, spec.num_visual_tokens
  assert len(tokens) == len(kinds) == len(visual) <= spec.length
  assert len(example.photos) <= spec.photos_in
  assert len(example.captions) <= spec.photos_out

  # Visual slots: every photo's, whole, in order, without loss.
  assert visual[visual >= 0].tolist() == list(range(k * len(example.photos)))
  for p in range(len(example.photos)):
    where = np.flatnonzero(visual // k == p)
    assert where.tolist() == list(range(where[0], where[0] + k))
  assert (tokens[visual >= 0] == PAD).all()
  assert (kinds[visual >= 0] == dialogue.NONE).all()

  # Loss: what the model said, and nothing else.
  own = {i for t in turns if t.speaker == 1 for i in tokenizer.encode(t.text)}
  text = set(tokens[kinds == dialogue.TEXT].tolist())
  assert text <= own | {EOS}
  assert own <= text or example.cut_turns
  assert kinds[-1] == dialogue.TEXT
  assert tokens[-1] == EOS

  # Photo blocks: marks around exactly the caption, slots right after it.
  assert np.sum(tokens == IMG) == np.sum(tokens == END_IMG)
  assert np.sum(tokens == IMG) == len(example.captions)
  for caption in example.captions:
    end = caption.start + len(caption.tokens)
    block = slice(caption.start - 1, end + 1)
    ids = tokenizer.encode(caption.photo.caption)[: spec.caption_tokens]
    assert tokens[block].tolist() == [IMG, *ids, END_IMG]
    assert (kinds[block] == dialogue.CAPTION).all()
    has_slots = visual[end + 1] >= 0
    assert has_slots == (caption.photo.path is not None)
  blocks = sum(len(c.tokens) + 2 for c in example.captions)
  assert np.sum(kinds == dialogue.CAPTION) == blocks

  # The newest turn of the model is always there, in its newest part.
  last = [t for t in turns if t.speaker == 1 and (t.text or t.photo)][-1]
  if last.photo:
    assert example.captions[-1].photo == last.photo
  else:
    assert tokens[-2] == tokenizer.encode(last.text)[-1]


@RELAXED
@given(turns, specs)
def test_a_context_is_a_prefix_of_the_example(turns, spec):
  spec = dataclasses.replace(spec, length=400, photos_in=20, photos_out=20)
  example, tokenizer = encode(turns, 1, spec)
  if example is None:
    return
  for spoken in dialogue.merge_turns(turns):
    if spoken.speaker != 1:
      continue
    for upto in range(spoken.start, spoken.stop + 1):
      context = dialogue.encode_context(turns, 1, tokenizer, spec, upto)
      n = len(context.tokens)
      assert context.tokens.tolist() == example.tokens[:n].tolist()
      assert context.visual_index.tolist() == example.visual_index[:n].tolist()
      assert context.photos == example.photos[: len(context.photos)]
      # What the example says next is the model's to say.
      assert example.loss_kind[n] != dialogue.NONE
