"""Real PhotoChat dialogues, without their photos, through the whole input."""

import pathlib

import numpy as np
import pytest

from photochat_jax.data import photochat, pipeline, tokenizers
from photochat_jax.data.spec import DataSpec

SAMPLE = pathlib.Path(__file__).parent / "photochat_sample"


@pytest.fixture(scope="module")
def source():
  dialogues, _ = photochat.read_split(SAMPLE, "train", caption_source="labels")
  spec = DataSpec(
    batch_size=64,
    length=256,
    photos_in=2,
    photos_out=1,
    num_visual_tokens=2,
    vision_size=4,
    photo_size=4,
    caption_tokens=24,
  )
  return pipeline.Pipeline(
    dialogues,
    "dialogues",
    spec,
    tokenizers.load_llm_tokenizer(),
    tokenizers.load_clip_tokenizer(max_length=32),
  )


def test_less_than_a_batch_is_still_one_batch_an_epoch(source):
  counts = source.describe()
  assert counts["dialogues"] == 40
  assert counts["batches_per_epoch"] == 1
  # No photo is here: 40 sharers keep their captions; a partner stays only
  # where nothing is said after the photo.
  assert counts["photos_out"] == counts["photos_out_missing"] == 40
  assert counts["examples"] + counts["left_out/missing_photo"] == 80
  assert counts["examples"] == counts["examples_per_epoch"]


def test_captions_reach_clip_whole(source):
  llm = tokenizers.load_llm_tokenizer()
  clip = tokenizers.load_clip_tokenizer(max_length=32)
  batch = source.batch(1)
  assert batch["caption_mask"].any(-1).sum() == 40
  for b, q in np.argwhere(batch["caption_mask"].any(-1)):
    mask = batch["caption_mask"][b, q]
    text = llm.decode(batch["caption_tokens"][b, q][mask])
    z = batch["clip_tokens"][b, q]
    assert z.tolist() == clip.encode_padded(text).tolist()
    share = batch["alignment"][b, q].sum(axis=-1)
    pieces = len(clip.encode(text)[:30])
    expected = [0] + [1] * pieces + [0] * (31 - pieces)
    np.testing.assert_allclose(share, expected, atol=1e-6)
    assert not batch["alignment"][b, q][:, ~mask].any()
    assert batch["caption_final"][b, q][mask][-1]
