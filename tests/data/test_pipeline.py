"""Batches against hand-written layouts, and their independence of history."""

import collections
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from photochat_jax.data import index, pipeline
from photochat_jax.data.photochat import Dialogue, Photo, Turn
from photochat_jax.data.spec import DataSpec

PAD, BOS, EOS, IMG, END_IMG = 0, 1, 2, 3, 4


class Words:
  """One id a word; `encoded` counts the calls."""

  pad_id, bos_id, eos_id, img_id, end_img_id = PAD, BOS, EOS, IMG, END_IMG
  digest = "words"

  def __init__(self, words=""):
    self.words = []
    self.encode(words)
    self.encoded = 0

  def encode(self, text):
    self.encoded = getattr(self, "encoded", 0) + 1
    for word in text.split():
      if word not in self.words:
        self.words.append(word)
    return [10 + self.words.index(word) for word in text.split()]

  def decode(self, ids):
    return " ".join(self.words[i - 10] for i in ids)


class Letters:
  """One piece a word, its length; BOS 90, EOS 91, padding 92."""

  digest, max_length, pad_id = "letters", 6, 92

  def encode_padded(self, text):
    ids = [90, *(len(w) for w in text.split()[:4]), 91]
    return np.asarray(ids + [92] * (6 - len(ids)), np.int32)


def align(llm_tokenizer, clip_tokenizer, caption_ids, text):
  """Word i owns piece i; the last of the first four words ends the caption."""
  n = len(caption_ids)
  alignment = np.zeros((clip_tokenizer.max_length, n), np.float32)
  for i in range(min(n, 4)):
    alignment[i + 1, i] = 1
  return clip_tokenizer.encode_padded(text), alignment, np.arange(n) == n - 1


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
  monkeypatch.setattr(index.vocabulary, "align", align)
  index.forget()


SPEC = DataSpec(
  batch_size=1,
  length=20,
  photos_in=3,
  photos_out=2,
  num_visual_tokens=2,
  vision_size=4,
  photo_size=8,
  caption_tokens=3,
  template="bare",
)


def save(path, colour, right=None):
  """A photo of one colour, or of another one on its right half."""
  pixels = np.full((8, 8, 3), colour, np.uint8)
  if right is not None:
    pixels[:, 4:] = right
  Image.fromarray(pixels).save(path)
  return str(path)


def make(dialogues, kind="dialogues", spec=SPEC, words=None, **options):
  return pipeline.Pipeline(
    dialogues, kind, spec, words or Words(), Letters(), **options
  )


def talk(number, *turns):
  return Dialogue(str(number), "train", turns, None)


def same(one, two):
  assert one.keys() == two.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], two[name], name)


@pytest.fixture
def pets(tmp_path):
  cat = Photo("1", "", "a cat", save(tmp_path / "1.png", 50))
  dog = Photo("2", "", "dog", save(tmp_path / "2.png", 100))
  return [
    talk(0, Turn(0, "hi"), Turn(1, "", cat)),
    talk(1, Turn(0, "", dog)),
  ]


def test_one_row_by_hand(pets):
  source = make(
    pets,
    spec=dataclasses.replace(SPEC, length=24),
    words=Words("hi a cat dog"),
  )
  batch = source.batch(0)
  assert {k: (v.shape[1:], v.dtype) for k, v in batch.items()} == (
    {k: (shape, np.dtype(d)) for k, (shape, d) in source.element_spec().items()}
  )
  batch = {name: array[0] for name, array in batch.items()}
  # Longest first: 10 tokens of the cat's sharer, 8 of the dog's, 4 of the
  # cat's partner; 2 are left.
  assert batch["tokens"].tolist() == (
    [BOS, 10, EOS, IMG, 11, 12, END_IMG, PAD, PAD, EOS]
    + [BOS, EOS, IMG, 13, END_IMG, PAD, PAD, EOS]
    + [BOS, EOS, 10, EOS]
    + [PAD, PAD]
  )
  assert batch["segments"].tolist() == [1] * 10 + [2] * 8 + [3] * 4 + [0] * 2
  assert batch["positions"].tolist() == (
    [*range(10), *range(8), *range(4), 0, 0]
  )
  assert batch["loss_kind"].tolist() == (
    [0, 0, 0, 2, 2, 2, 2, 0, 0, 1]
    + [0, 0, 2, 2, 2, 0, 0, 1]
    + [0, 0, 1, 1]
    + [0, 0]
  )
  assert batch["visual_index"].tolist() == (
    [-1] * 7 + [0, 1, -1] + [-1] * 5 + [2, 3, -1] + [-1] * 6
  )
  assert batch["photos_in"][:, 0, 0, 0].tolist() == [50, 100, 0]
  assert batch["photos_in_mask"].tolist() == [True, True, False]
  assert batch["photos_out"][:, 7, 7, 2].tolist() == [50, 100]
  assert batch["photos_out_mask"].tolist() == [True, True]
  assert batch["caption_index"].tolist() == [[3, 4, 0], [12, 0, 0]]
  assert batch["caption_mask"].tolist() == (
    [[True, True, False], [True, False, False]]
  )
  assert batch["caption_tokens"].tolist() == [[11, 12, PAD], [13, PAD, PAD]]
  assert batch["caption_final"].tolist() == (
    [[False, True, False], [True, False, False]]
  )
  assert batch["clip_tokens"].tolist() == (
    [[90, 1, 3, 91, 92, 92], [90, 3, 91, 92, 92, 92]]
  )
  expected = np.zeros((2, 6, 3))
  expected[0, 1, 0] = expected[0, 2, 1] = expected[1, 1, 0] = 1
  np.testing.assert_array_equal(batch["alignment"], expected)
  # Two ids (sides) for the only photo of the first dialogue, then one.
  assert batch["example_id"].tolist() == [1, 2]


def test_rows_without_examples_are_padding(pets):
  spec = dataclasses.replace(SPEC, length=24, batch_size=3)
  batch = make(pets, spec=spec).batch(0)
  empty = np.flatnonzero(~batch["segments"].any(axis=1))
  assert len(empty) == 2
  for name in ("loss_kind", "caption_mask", "photos_out_mask", "alignment"):
    assert not batch[name][empty].any()
  assert (batch["visual_index"][empty] == -1).all()
  assert (batch["clip_tokens"][empty] == [90, 91, 92, 92, 92, 92]).all()


def chat(seed, folder, count=40):
  """Random dialogues; some photos have no file."""
  rng = np.random.default_rng(seed)
  files = [save(folder / f"{i}.png", 10 * i + 5) for i in range(5)]
  dialogues = []
  for number in range(count):
    turns = []
    for _ in range(rng.integers(2, 7)):
      photo = None
      if rng.random() < 0.3:
        kind = int(rng.integers(6))
        path = files[kind] if kind < 5 else None
        photo = Photo(f"{kind}", "", "w " * int(rng.integers(1, 5)), path)
      text = " ".join(rng.choice(list("abcdef"), rng.integers(0, 4)))
      turns.append(Turn(int(rng.integers(2)), text, photo))
    dialogues.append(talk(number, *turns))
  return dialogues


BATCHED = dataclasses.replace(SPEC, batch_size=4, length=40)


def test_a_batch_does_not_depend_on_what_was_asked_before(tmp_path):
  dialogues = chat(0, tmp_path)
  first = make(dialogues, spec=BATCHED, seed=3, stage="talk")
  steps = [first.batch(step) for step in range(30)]
  for step in (29, 0, 11):
    same(first.batch(step), steps[step])
    fresh = make(dialogues, spec=BATCHED, seed=3, stage="talk")
    same(fresh.batch(step), steps[step])
  other = make(dialogues, spec=BATCHED, seed=4, stage="talk").batch(0)
  assert (other["tokens"] != steps[0]["tokens"]).any()
  # The photos are the same whether or not they were kept in memory.
  forgetful = make(
    dialogues, spec=BATCHED, seed=3, stage="talk",
    photo_cache=pipeline.PhotoCache(max_bytes=0),
  )  # fmt: skip
  same(forgetful.batch(11), steps[11])


def test_tf_data_resumes_at_any_step(tmp_path):
  source = make(chat(0, tmp_path), spec=BATCHED)
  whole = list(source.batches(0, 8))
  assert len(whole) == 8
  for step, batch in enumerate(whole):
    same(batch, source.batch(step))
    assert all(
      batch[k].dtype == d for k, (_, d) in source.element_spec().items()
    )
  resumed = source.batches(5)
  for step in (5, 6, 7):
    same(next(resumed), whole[step])


def test_an_error_in_a_batch_is_raised_as_it_is(tmp_path, monkeypatch):
  source = make(chat(0, tmp_path), spec=BATCHED)

  def fail(step):
    raise KeyError("lost")

  monkeypatch.setattr(source, "batch", fail)
  with pytest.raises(KeyError, match="lost"):
    next(source.batches(0, 1))


def test_hosts_make_slices_of_the_same_batch(tmp_path):
  dialogues = chat(0, tmp_path)
  whole = make(dialogues, spec=BATCHED).batch(7)
  parts = [
    make(dialogues, spec=BATCHED, rows=rows).batch(7) for rows in ([0, 3], [2])
  ]
  for part, rows in zip(parts, ([0, 3], [2]), strict=True):
    same(part, {k: array[rows] for k, array in whole.items()})


def mixed(tmp_path, **options):
  """A set of 40 dialogues, and two that are mixed in."""
  parts = []
  for name, weight, count in (("b", 0.5, 12), ("c", 2.0, 20)):
    (tmp_path / name).mkdir(exist_ok=True)
    part = chat(len(parts) + 1, tmp_path / name, count)
    parts.append(pipeline.Part(name, weight, part))
  return make(
    chat(0, tmp_path), mix=parts, words=Words("a b c d e f w"),
    **{"spec": BATCHED, "seed": 3} | options,
  )  # fmt: skip


def segments_of(batch):
  """Tokens of every example of a batch, row by row."""
  for row, segments in zip(batch["tokens"], batch["segments"], strict=True):
    for segment in range(1, segments.max() + 1):
      yield tuple(row[segments == segment].tolist())


def test_a_mixture_draws_on_every_set_by_its_weight(tmp_path):
  source = mixed(tmp_path)
  counts = source.describe()
  assert counts["dialogues"] == 40 + 12 + 20
  names, shares = ("main", "b", "c"), (2 / 7, 1 / 7, 4 / 7)
  assert [counts[f"share/{name}"] for name in names] == (
    pytest.approx(shares, abs=1e-4)
  )
  assert counts["examples"] == sum(counts[f"examples/{n}"] for n in names)
  assert 0 < counts["row_fill"] <= 1
  # Which of the three a row is of is told by its examples' sizes and ids: the
  # photos of no two sets have a number in common.
  first = np.cumsum([0, *(counts[f"examples/{name}"] for name in names)])
  ids = [set(), set(), set()]
  had = np.zeros(3)
  for step in range(150):
    batch = source.batch(step)
    rows = source.plan.batch(step)
    for b, row in enumerate(rows):
      part = int(np.searchsorted(first, row[0], side="right")) - 1
      had[part] += 1
      said = batch["caption_mask"][b].any(axis=-1)
      ids[part] |= set(batch["example_id"][b][said].tolist())
      assert len(row) == batch["segments"][b].max()
  assert (np.abs(had - 600 * np.array(shares)) < 1.1).all()
  assert all(ids)
  assert not (ids[0] & ids[1] or ids[1] & ids[2] or ids[0] & ids[2])


def test_a_set_is_used_up_before_any_of_it_comes_again(tmp_path):
  source = mixed(tmp_path)
  alone = {
    name: index.build_index(
      part, BATCHED, Words("a b c d e f w"), Letters()
    ).examples
    for name, part in (
      ("main", chat(0, tmp_path)), ("b", chat(1, tmp_path / "b", 12))
    )
  }  # fmt: skip
  for name, examples in alone.items():
    counts = source.describe()
    batches = int(np.ceil(counts[f"batches_per_epoch/{name}"])) + 1
    found = [
      tokens
      for step in range(batches)
      for tokens in segments_of(source.batch(step))
    ]
    wanted = [tuple(e.example.tokens.tolist()) for e in examples]
    # Nothing of the set is missing when its epoch is over.
    assert not collections.Counter(wanted) - collections.Counter(found)


def test_hosts_and_restarts_see_the_same_mixture(tmp_path):
  whole = mixed(tmp_path)
  count = len(whole.batch(0)["tokens"])
  parts = [
    mixed(tmp_path, rows=range(host * count // 2, (host + 1) * count // 2))
    for host in (0, 1)
  ]
  for step in (0, 7, 100):
    batch = whole.batch(step)
    halves = [part.batch(step) for part in parts]
    same({k: np.concatenate([h[k] for h in halves]) for k in batch}, batch)
  same(next(mixed(tmp_path).batches(100)), whole.batch(100))


@pytest.mark.parametrize("kind", ["photos", "captions", "descriptions"])
def test_other_kinds_are_mixed_too(tmp_path, kind):
  source = mixed(tmp_path, kind=kind)
  counts = source.describe()
  assert counts["share/c"] == pytest.approx(4 / 7, abs=1e-4)
  batch = source.batch(0)
  assert batch["photos_out_mask"].all() == (kind != "descriptions")


def test_a_set_without_examples_is_left_out_and_counted(tmp_path):
  silent = [talk(0, Turn(0, " "))]
  dialogues = chat(0, tmp_path)
  words = "a b c d e f w"
  source = make(
    dialogues, spec=BATCHED, words=Words(words),
    mix=[pipeline.Part("quiet", 1.0, silent)],
  )  # fmt: skip
  counts = source.describe()
  assert counts["sets_without_examples/quiet"] == 1
  assert counts["left_out/silent"] >= 1
  same(
    source.batch(2), make(dialogues, spec=BATCHED, words=Words(words)).batch(2)
  )
  with pytest.raises(ValueError, match="None of 2 dialogues"):
    make(silent, mix=[pipeline.Part("quiet", 1.0, silent)])


def test_an_epoch_holds_every_example_once_and_masks_agree(tmp_path):
  dialogues = chat(1, tmp_path)
  spec = dataclasses.replace(BATCHED, drop_remainder=False)
  source = make(dialogues, spec=spec)
  counts = source.describe()
  seen, ids = [], []
  for step in range(counts["batches_per_epoch"]):
    batch = source.batch(step)
    ids += batch["example_id"][batch["caption_mask"].any(-1)].tolist()
    for b in range(4):
      row = {name: array[b] for name, array in batch.items()}
      segments = row["segments"]
      # Segments are numbered in order, without gaps, then padding.
      used = np.count_nonzero(segments)
      assert (np.diff(segments[:used]) >= 0).all()
      assert set(segments[:used]) == set(range(1, segments.max() + 1))
      assert (row["tokens"][used:] == PAD).all()
      for segment in range(1, segments.max() + 1):
        where = segments == segment
        seen.append(tuple(row["tokens"][where].tolist()))
        assert row["positions"][where].tolist() == list(range(where.sum()))
        assert row["loss_kind"][where][0] == 0
      # A caption's tokens are predicted one position earlier.
      for q in range(spec.photos_out):
        mask = row["caption_mask"][q]
        before = row["caption_index"][q][mask]
        target = row["tokens"][before + 1]
        assert target.tolist() == row["caption_tokens"][q][mask].tolist()
        assert (row["loss_kind"][before + 1] == 2).all()
        assert (segments[before] == segments[before + 1]).all()
        assert not row["caption_index"][q][~mask].any()
        assert row["photos_out_mask"][q] <= mask.any()
        if mask.any():
          assert row["tokens"][before[0]] == IMG
          assert row["tokens"][before[-1] + 2] == END_IMG
      # Every photo that is shown has all its slots, and no other slot exists.
      k = spec.num_visual_tokens
      shown = np.flatnonzero(row["photos_in_mask"])
      slots = row["visual_index"][row["visual_index"] >= 0]
      assert slots.tolist() == [p * k + i for p in shown for i in range(k)]
  assert len(seen) == counts["examples"] == counts["examples_per_epoch"]
  words = Words()
  expected = index.build_index(dialogues, spec, words, Letters()).examples
  assert sorted(seen) == sorted(
    tuple(e.example.tokens.tolist()) for e in expected
  )
  assert len(set(ids)) == len(ids) == counts["photos_out"]


def test_missing_photos_are_counted_and_bear_no_photo_loss(tmp_path):
  lost = Photo("9", "", "fox", None)
  dialogues = [talk(0, Turn(0, "", lost), Turn(1, "nice"))]
  source = make(dialogues)
  counts = source.describe()
  assert counts["left_out/missing_photo"] == 1
  assert counts["photos_out_missing"] == counts["photos_out"] == 1
  assert counts["examples"] == 1
  batch = source.batch(0)
  assert batch["caption_mask"].sum() == 1
  assert (batch["loss_kind"] == 2).sum() == 3
  assert not batch["photos_out_mask"].any()
  assert not batch["photos_in_mask"].any()
  assert (batch["visual_index"] == -1).all()


def test_a_file_that_is_no_photo_is_masked(tmp_path):
  path = tmp_path / "page.jpg"
  path.write_text("<html>")
  photo = Photo("7", "", "a cat", str(path))
  source = make([talk(0, Turn(0, "", photo))])
  batch = source.batch(0)
  assert not batch["photos_in_mask"].any()
  assert not batch["photos_out_mask"].any()
  assert (batch["visual_index"] == -1).all()
  assert batch["caption_mask"].any()
  assert source.describe()["photos_broken"] == 1


def test_flips_are_keyed_and_the_same_for_both_uses(tmp_path):
  photo = Photo("1", "", "cat", save(tmp_path / "1.png", 0, right=200))
  dialogues = [talk(0, Turn(0, "", photo))]
  spec = dataclasses.replace(SPEC, augment=True)
  source = make(dialogues, spec=spec)
  batches = [source.batch(step) for step in range(24)]
  drawn = [int(b["photos_out"][0, 0, 0, 0, 0]) for b in batches]
  seen = [int(b["photos_in"][0, 0, 0, 0, 0]) for b in batches]
  assert 4 < drawn.count(0) < 20  # of 24; outside has probability 3e-4
  assert drawn.count(0) + drawn.count(200) == 24
  assert [x < 100 for x in seen] == [x < 100 for x in drawn]
  same(make(dialogues, spec=spec).batch(17), batches[17])
  still = make(dialogues)
  assert all(
    still.batch(step)["photos_out"][0, 0, 0, 0, 0] == 0 for step in range(24)
  )


def test_captions_and_photos_kinds(tmp_path):
  red = Photo("1", "", "a cat", save(tmp_path / "1.png", 60))
  blue = Photo("2", "", None, save(tmp_path / "2.png", 90))
  lost = Photo("3", "", "fox", None)
  facts = {"photos": {"1": {"full_caption": "a black cat"}}}
  turns = (Turn(0, "", red), Turn(1, "", blue), Turn(0, "", lost))
  dialogues = [
    Dialogue("0", "train", (*turns, Turn(0, "again", red)), facts),
  ]
  spec = dataclasses.replace(SPEC, batch_size=2)
  batch = make(dialogues, "captions", spec).batch(0)
  assert set(batch) == {
    "photos_out", "photos_out_mask", "example_id", "clip_tokens"
  }  # fmt: skip
  row = int(np.argmax(batch["photos_out_mask"][:, 0]))
  assert batch["photos_out_mask"].sum() == 1
  assert batch["clip_tokens"][row].tolist() == [[90, 1, 5, 3, 91, 92]]
  assert (batch["photos_out"][row, 0] == 60).all()
  batch = make(dialogues, "photos", spec).batch(0)
  assert set(batch) == {"photos_out", "photos_out_mask", "example_id"}
  assert batch["photos_out_mask"].all()
  assert sorted(batch["photos_out"][:, 0, 0, 0, 0].tolist()) == [60, 90]
  assert sorted(batch["example_id"][:, 0].tolist()) == [0, 1]


def test_errors_say_what_to_do():
  with pytest.raises(ValueError, match="0 dialogues"):
    make([])
  with pytest.raises(ValueError, match="'movies'"):
    make([], kind="movies")


def test_importing_the_pipeline_loads_no_tensorflow():
  code = (
    "import sys, photochat_jax.data.pipeline;"
    "assert not {'tensorflow', 'torch', 'transformers'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
