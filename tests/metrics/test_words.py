"""BLEU, ROUGE-L and Distinct, counted by hand."""

import math
import sys

import pytest

from photochat_jax.metrics import words


def test_bleu_by_hand():
  # "a b c d" against "a b x d e f": three of four words, one of three pairs;
  # four words for six.
  found = words.bleu(["a b c d"], ["a b x d e f"])
  penalty = math.exp(1 - 6 / 4)
  assert found["bleu_1"] == pytest.approx(100 * penalty * 3 / 4)
  assert found["bleu_2"] == pytest.approx(
    100 * penalty * math.sqrt(3 / 4 * 1 / 3)
  )
  assert found["released_bleu_1"] == pytest.approx(100 * penalty * 3 / 4)
  # The second order alone.
  assert found["released_bleu_2"] == pytest.approx(100 * penalty / 3)
  assert "tok:13a" in found["bleu_signature"]


def test_bleu_is_of_the_corpus_and_not_a_mean():
  found = words.bleu(["a b", "c"], ["a b", "d"])
  assert found["bleu_1"] == pytest.approx(100 * 2 / 3)
  # What was not written counts for nothing, but its length does.
  silent = words.bleu(["a b", ""], ["a b", "c d"])
  assert silent["bleu_1"] == pytest.approx(100 * math.exp(1 - 4 / 2))


def test_rouge_l_by_hand():
  # The longest common subsequence of "a c b" and "a b c d" has two words:
  # precision 2 / 3, recall 2 / 4.
  f1 = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
  found = words.rouge_l(["a c b", "x"], ["a b c d", "y"])
  assert found == pytest.approx(100 * f1 / 2)


def test_distinct_by_hand():
  texts = ["the cat", "The cat sat", ""]
  assert words.distinct(texts, 1) == pytest.approx(100 * 3 / 5)
  assert words.distinct(texts, 2) == pytest.approx(100 * 2 / 3)
  assert words.distinct(["one", ""], 2) is None


def test_a_missing_library_is_named_with_its_cure(monkeypatch):
  monkeypatch.setitem(sys.modules, "sacrebleu", None)
  with pytest.raises(words.NotInstalled, match=r"sacrebleu.*\[eval\]"):
    words.bleu(["a"], ["a"])
