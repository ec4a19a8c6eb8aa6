"""Alignment and vocabulary maps of byte-level language models."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photochat_jax.data import tokenizers as tokenizers_lib
from photochat_jax.data import vocabulary

pytest.importorskip("transformers")
hf_tokenizers = pytest.importorskip("hf_tokenizers")

M = 77
SPACES = b" \t\n\v\f\r"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip")
  hf_tokenizers.clip().save_pretrained(folder)
  return tokenizers_lib.load_clip_tokenizer(folder)


@pytest.fixture(scope="module", params=["llama3", "smollm2", "llama2"])
def llm(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("llm")
  getattr(hf_tokenizers, request.param)().save_pretrained(folder)
  return tokenizers_lib.load_llm_tokenizer(folder)


def check(llm, clip, ids):
  """Every piece is owned, whole, by tokens that write something."""
  z, share, final = vocabulary.align(llm, clip, ids)
  np.testing.assert_array_equal(z, clip.encode_padded(llm.decode(ids)))
  pieces = list(z).index(clip.eos_id) - 1
  expected = np.zeros(M)
  expected[1 : 1 + pieces] = 1
  np.testing.assert_allclose(share.sum(-1), expected, atol=1e-6)
  assert (share >= 0).all()
  silent = [not llm.token_bytes(i).strip(SPACES) for i in ids]
  assert not share[:, silent].any()
  return share, final


def test_lines_are_owned(llm, clip):
  for line in hf_tokenizers.lines(300, seed=6):
    share, _ = check(llm, clip, llm.encode(line))
    assert share.any() == bool(clip.encode(line))


def test_any_tokens_are_owned(llm, clip):
  rng = np.random.default_rng(0)
  for _ in range(200):
    ids = rng.integers(llm.vocab_size, size=rng.integers(30)).tolist()
    check(llm, clip, ids)


def test_a_byte_count_where_case_keeps_lengths(llm, clip):
  @settings(max_examples=100, deadline=None, derandomize=True)
  @given(st.text("acatDOGg in'Én日本😀1,\n", max_size=20))
  def compare(text):
    ids = llm.encode(text)
    share, _ = check(llm, clip, ids)
    owners = [
      i
      for i, token in enumerate(ids)
      for octet in llm.token_bytes(token)
      if octet not in SPACES
    ]
    expected = np.zeros_like(share)
    z = clip.encode_padded(text)
    for slot in range(1, list(z).index(clip.eos_id)):
      size = len(clip.token_bytes(int(z[slot])))
      for _ in range(size):
        expected[slot, owners.pop(0)] += 1 / size
    np.testing.assert_allclose(share, expected, atol=1e-6)

  compare()


def test_words_end_where_the_next_one_starts(llm, clip):
  """Also at the first word, which has no space before it, and line feeds."""
  for text in ("look here", "look\nhere", "look\n\nhere", "look  here"):
    ids = llm.encode(text)
    _, final = check(llm, clip, ids)
    written = [llm.token_bytes(i) for i in ids]
    # The tokens after which the text goes on with white space, or ends.
    ends = [
      (b"".join(written[i + 1 :]) or b" ")[:1].isspace()
      for i in range(len(ids))
    ]
    visible = [w.strip() != b"" for w in written]
    assert np.sum(np.array(ends) & visible) == 2
    assert final.tolist() == ends


def test_every_token_reaches_clip_by_its_own_bytes(llm, clip):
  maps, coverage = vocabulary.build_vocabulary_map(llm, clip)
  empty = [not llm.token_bytes(i).strip(SPACES) for i in range(llm.vocab_size)]
  for name in ("final", "internal"):
    table = maps[name]
    total = np.bincount(
      table["rows"], table["weights"], minlength=llm.vocab_size
    )
    np.testing.assert_allclose(total, 1.0 - np.array(empty), atol=1e-6)
    assert sum(coverage.zero[name].values()) == sum(empty)
    for row, col in zip(table["rows"], table["cols"], strict=True):
      piece = clip.token_bytes(int(col))
      written = llm.token_bytes(int(row))
      assert piece.strip() == piece != b""
      if written.isascii():
        assert piece in written.lower()


def test_parts_of_characters_lose_their_space_and_case():
  class Part:
    """One token: a space, a capital and the first half of an emoji."""

    vocab_size = 1

    def token_bytes(self, token):
      return b" A\xf0\x9f"

  clip = tokenizers_lib.load_clip_tokenizer()
  maps, _ = vocabulary.build_vocabulary_map(Part(), clip)
  for name, ends in (("final", True), ("internal", False)):
    cols = maps[name]["cols"].tolist()
    assert cols == sorted(set(clip.word_pieces(b"a\xf0\x9f", ends)))
    assert b"".join(sorted(map(clip.token_bytes, cols))) == b"a\x9f\xf0"
