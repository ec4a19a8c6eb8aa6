"""How full rows are at the lengths of real dialogues.

72 dialogues of PhotoChat are indexed as if their photos were there, and drawn
from again and again until they are as many as its train split has.
"""

import dataclasses
import pathlib

import numpy as np
import pytest

from photochat_jax.data import index, packing, photochat, tokenizers
from photochat_jax.data.spec import DataSpec

SAMPLE = pathlib.Path(__file__).parent / "photochat_sample"
TRAIN = 10_286  # dialogues of PhotoChat's train split

SPEC = DataSpec(
  batch_size=16,
  length=1024,
  photos_in=6,
  photos_out=3,
  num_visual_tokens=32,  # of BLIP-2
  vision_size=224,
  photo_size=512,
  system_prompt="You chat and share photos.",
)


def there(dialogue):
  """The dialogue with a file for each of its photos."""
  turns = tuple(
    dataclasses.replace(t, photo=dataclasses.replace(t.photo, path="a.jpg"))
    if t.photo
    else t
    for t in dialogue.turns
  )
  return dataclasses.replace(dialogue, turns=turns)


@pytest.fixture(scope="module")
def dialogues():
  return [
    there(dialogue)
    for split in ("train", "dev", "test")
    for dialogue in photochat.read_split(SAMPLE, split, "labels")[0]
  ]


def padding(dialogues, spec, scale=1.0):
  """Shares of tokens and of both kinds of photos of an epoch that are empty."""
  examples = index.build_index(
    dialogues,
    # Where lengths are scaled, what is too long is cut afterwards.
    spec if scale == 1 else dataclasses.replace(spec, length=4096),
    tokenizers.load_llm_tokenizer(),
    tokenizers.load_clip_tokenizer(),
  ).examples
  sizes = np.array(
    [
      (len(e.example.tokens), len(e.example.photos), len(e.caption_ids))
      for e in examples
    ]
  )
  sizes[:, 0] = np.minimum(np.round(sizes[:, 0] * scale), spec.length)
  # Both sides of a dialogue stand beside each other.
  assert len(sizes) == 2 * len(dialogues)
  drawn = np.random.default_rng(0).integers(len(dialogues), size=TRAIN)
  sizes = sizes[np.concatenate([2 * drawn, 2 * drawn + 1])]
  limits = np.array([spec.length, spec.photos_in, spec.photos_out])
  rows = packing.Plan(
    sizes, limits, spec.batch_size, 0, "talk"
  ).rows_of_epoch(0)
  used = np.array([sizes[row].sum(axis=0) for row in rows])
  assert (used <= limits).all()
  return 1 - used.mean(axis=0) / limits


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"length": 512, "photos_in": 4, "photos_out": 2},
    # What tiny shows of a photo, and no system prompt.
    {
      "length": 512, "photos_in": 6, "photos_out": 3,
      "num_visual_tokens": 4, "system_prompt": "",
    },
  ],
)  # fmt: skip
def test_at_most_a_tenth_of_the_tokens_is_padding(dialogues, change):
  tokens, _, _ = padding(dialogues, dataclasses.replace(SPEC, **change))
  assert tokens <= 0.10


def test_at_the_lengths_of_a_vocabulary_of_32000_too(dialogues):
  # Mistral 7B's tokenizer, of Llama 2's kind and size, writes the dialogues
  # of the sample in 0.82 of the tokens of the small one shipped here.
  for length, limits in ((1024, (6, 4)), (1024, (5, 3)), (512, (4, 2))):
    spec = dataclasses.replace(
      SPEC, length=length, photos_in=limits[0], photos_out=limits[1]
    )
    tokens, _, _ = padding(dialogues, spec, scale=0.82)
    assert tokens <= 0.10, (length, limits)


def test_few_photos_a_row_are_met_before_its_tokens(dialogues):
  few = dataclasses.replace(SPEC, photos_in=4, photos_out=2)
  tokens, seen, drawn = padding(dialogues, few)
  assert tokens > 0.10
  assert seen < 0.25 and drawn < 0.2


def test_a_stage_has_one_shape(dialogues):
  from photochat_jax.data import pipeline

  source = pipeline.Pipeline(
    dialogues[:30],
    "dialogues",
    dataclasses.replace(SPEC, batch_size=2, vision_size=4, photo_size=4),
    tokenizers.load_llm_tokenizer(),
    tokenizers.load_clip_tokenizer(),
  )
  shapes = {
    tuple((name, array.shape) for name, array in source.batch(step).items())
    for step in range(12)
  }
  assert len(shapes) == 1
