"""Summaries, histograms, labels and numbers: by hand."""

import pytest

from photochat_jax.data import records
from photochat_jax.data.schema import Photo
from photochat_jax.inspection import counts, table


def test_a_summary_by_hand():
  found = counts.summarise([1, 2, 3, 10])
  assert found == {
    "count": 4, "sum": 16, "mean": 4.0, "median": 2.5,
    "p95": pytest.approx(3 + 7 * 0.85), "max": 10,
  }  # fmt: skip
  assert counts.summarise([])["mean"] is None


@pytest.mark.parametrize(
  ("values", "start", "step", "bins"),
  [
    ([3, 3, 5], 3, 1, [2, 0, 1]),
    ([0, 23], 0, 1, [1, *[0] * 22, 1]),
    ([7, 47], 6, 2, [1, *[0] * 19, 1]),
    ([999, 1201], 990, 10, [1, *[0] * 20, 1]),
    ([], 0, 1, []),
  ],
)
def test_histograms_by_hand(values, start, step, bins):
  found = counts.histogram(values)
  assert found == {"start": start, "step": step, "counts": bins}


def test_the_last_place_is_in_the_last_bin():
  found = counts.histogram([0.0, 0.05, 0.55, 1.0], share=True)
  assert found["counts"] == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
  ("part", "whole", "said"),
  [
    (9_999, 10_000, "99.9 %"),
    (1, 10_000, "0.1 %"),
    (0, 5, "0 %"),
    (5, 5, "100 %"),
    (1, 0, "–"),
    (None, 1, "–"),
  ],
)
def test_a_share_is_all_only_if_it_is(part, whole, said):
  assert table.percent(part, whole) == said


def test_descriptions_that_are_no_lists_have_no_labels(tmp_path):
  labels = records.Captions("labels", tmp_path)
  photos = [
    Photo("a", "Objects in the photo: Cat, Dog, Cat", None),
    Photo("a", "Objects in the photo: Cat, Dog, Cat", None),
    Photo("b", "a cat, and a dog", None),
    Photo("c", "", None),
  ]
  found = counts.count_labels(photos, labels)
  assert found["counts"] == {"Cat": 1, "Dog": 1}
  assert found["per_photo"]["count"] == 1


@pytest.mark.parametrize(
  ("value", "said"),
  [(None, "–"), (5.0, "5"), (1234567, "1,234,567"), (1234.5, "1,234"),
   (12.34, "12.3"), (0.5, "0.50"), (0, "0")],
)  # fmt: skip
def test_numbers_as_they_are_written(value, said):
  assert table.number(value) == said
