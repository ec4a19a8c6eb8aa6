"""Packing covers exactly, keeps limits, and has no memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photochat_jax.data import packing


def test_first_fit_decreasing_by_hand():
  # By length: 5 opens row 0, 4 and 3 row 1, 2 returns to row 0 (5 + 2); the
  # last 2 would fit row 0 by length, but its photo does not.
  sizes = [(2, 0), (5, 1), (3, 0), (4, 1), (2, 1)]
  rows = packing.first_fit_decreasing(sizes, (9, 1))
  assert [row.tolist() for row in rows] == [[1, 2], [3, 0], [4]]


def test_an_item_larger_than_a_row_is_an_error():
  with pytest.raises(ValueError, match="cut the item first"):
    packing.first_fit_decreasing([(1, 2)], (9, 1))


items = st.lists(
  st.tuples(st.integers(1, 20), st.integers(0, 3), st.integers(0, 2)),
  min_size=1,
  max_size=60,
)


@settings(deadline=None)
@given(items)
def test_packing_is_an_exact_cover_within_limits(sizes):
  limits = np.array([20, 3, 2])
  rows = packing.first_fit_decreasing(sizes, limits)
  assert sorted(np.concatenate(rows).tolist()) == list(range(len(sizes)))
  used = [np.asarray(sizes)[row].sum(axis=0) for row in rows]
  assert (np.asarray(used) <= limits).all()
  # First fit: no two rows could be one.
  for i in range(len(used)):
    for j in range(i):
      first = np.asarray(sizes)[rows[i][0]]
      taken = [m for m in rows[j] if sizes[m][0] >= first[0]]
      room = limits - np.asarray(sizes)[taken].sum(axis=0)
      assert (first > room).any()


@settings(deadline=None)
@given(items, st.integers(1, 9), st.integers(0, 5))
def test_padding_rows_make_an_epoch_an_exact_cover(sizes, batch_size, epoch):
  plan = packing.Plan(
    sizes, (20, 3, 2), batch_size, 0, "talk", drop_remainder=False
  )
  rows = plan.rows_of_epoch(epoch)
  assert len(rows) % batch_size == 0
  assert sorted(np.concatenate(rows).tolist()) == list(range(len(sizes)))
  assert sum(len(row) == 0 for row in rows) < batch_size


def test_only_whole_batches_unless_there_is_none():
  ones = np.ones((10, 1), int)
  plan = packing.Plan(ones, (1,), 4, 0, 0)
  rows = plan.rows_of_epoch(0)
  assert [len(row) for row in rows] == [1] * 8
  assert len(set(np.concatenate(rows).tolist())) == 8
  small = packing.Plan(ones, (1,), 16, 0, 0).rows_of_epoch(0)
  assert sorted(len(row) for row in small) == [0] * 6 + [1] * 10


def test_what_is_left_out_changes_with_the_epoch():
  plan = packing.Plan(np.ones((10, 1), int), (1,), 4, 0, 0)
  seen = {
    i for e in range(8) for row in plan.rows_of_epoch(e) for i in row.tolist()
  }
  assert seen == set(range(10))


def plain(rows):
  return [row.tolist() for row in rows]


def test_a_step_does_not_depend_on_what_was_asked_before():
  sizes = np.random.default_rng(0).integers(1, 20, (50, 1))

  def plan(**change):
    arguments = {"batch_size": 3, "seed": 5, "stage": "talk"} | change
    return packing.Plan(sizes, (20,), **arguments)

  forward = plan()
  batches = [plain(forward.batch(step)) for step in range(60)]
  assert forward.locate(59)[0] >= 5  # several epochs were crossed
  for step in (59, 0, 33, 7):
    assert plain(plan().batch(step)) == batches[step]
    assert plain(forward.batch(step)) == batches[step]
  assert plain(plan(seed=6).batch(0)) != batches[0]
  assert plain(plan(stage="draw").batch(0)) != batches[0]
  first_epoch = [row for row in plan().rows_of_epoch(0)]
  assert plain(first_epoch) == sum(batches[: len(first_epoch) // 3], [])


def test_windows_mix_lengths_and_rows_are_not_sorted():
  sizes = np.random.default_rng(0).integers(1, 100, (3000, 1))
  plan = packing.Plan(sizes, (256,), 8, 0, 0)
  rows = plan.rows_of_epoch(0)
  longest = [sizes[row].max() for row in rows]
  assert np.corrcoef(longest, np.arange(len(rows)))[0, 1] ** 2 < 0.01
  filled = sum(sizes[row].sum() for row in rows) / (len(rows) * 256)
  assert filled > 0.95


def test_examples_meet_others_in_the_next_epoch():
  sizes = np.random.default_rng(0).integers(1, 20, (60, 1))
  plan = packing.Plan(sizes, (40,), 1, 0, 0)
  first, second = (
    {frozenset(row.tolist()) for row in plan.rows_of_epoch(epoch)}
    for epoch in (0, 1)
  )
  assert len(first & second) < len(first) / 2


def test_nothing_to_plan_is_an_error():
  with pytest.raises(ValueError, match="no examples"):
    packing.Plan(np.zeros((0, 1), int), (1,), 4, 0, 0)
