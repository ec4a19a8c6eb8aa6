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


def one_at_a_time(sizes, limits):
  """First fit decreasing as the textbook has it."""
  rows, left = [], []
  for item in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
    after = [
      [r - s for s, r in zip(sizes[item], room, strict=True)]
      for room in [*left, limits]
    ]
    first = next(i for i, room in enumerate(after) if min(room) >= 0)
    if first == len(rows):
      rows.append([])
      left.append([])
    rows[first].append(item)
    left[first] = after[first]
  return rows


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


@settings(deadline=None, max_examples=100)
@given(items, st.integers(1, 70))
def test_windows_are_packed_as_if_each_were_alone(sizes, window):
  limits = (20, 3, 2)
  expected = [
    [start + i for i in row]
    for start in range(0, len(sizes), window)
    for row in one_at_a_time(sizes[start : start + window], limits)
  ]
  rows = packing.first_fit_decreasing(sizes, limits, window)
  assert [row.tolist() for row in rows] == expected


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


weights = st.lists(st.floats(0.01, 100), min_size=2, max_size=5)


@given(weights, st.integers(2000, 40_000))
def test_apportioned_shares_are_the_weights(weights, total):
  counts = packing.apportion([w + 0.1 for w in weights], total)
  assert counts.sum() == total
  exact = np.asarray(weights) + 0.1
  assert (np.abs(counts - exact / exact.sum() * total) < 1).all()


def test_apportion_by_hand():
  # 2/3 and 1/3 of 100 are 66.67 and 33.33: the larger remainder gains one.
  assert packing.apportion([2, 1], 100).tolist() == [67, 33]


@pytest.mark.parametrize(
  "weights, sentence",
  [
    ([1, 0], "above 0"),
    ([1, -2], "above 0"),
    ([1, float("nan")], "above 0"),
    ([1, float("inf")], "above 0"),
    ([1, 1e-9], "less than one row in 10000"),
  ],
)
def test_weights_that_cannot_be_mixed(weights, sentence):
  with pytest.raises(ValueError, match=sentence):
    packing.apportion(weights, packing.PERIOD)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_no_set_is_ever_a_row_off_its_share(counts):
  counts = np.asarray(counts)
  order = packing.interleave(counts)
  assert np.bincount(order, minlength=len(counts)).tolist() == counts.tolist()
  had = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)
  share = np.arange(1, len(order) + 1)[:, None] * counts / counts.sum()
  assert (np.abs(had - share) < 1).all()


def test_interleave_by_hand():
  assert packing.interleave(np.array([3, 1])).tolist() == [0, 0, 0, 1]
  assert packing.interleave(np.array([2, 2])).tolist() == [0, 1, 0, 1]


def mixture(sizes, weights, batch_size=3, **options):
  limits = (20, 3, 2)
  options = {"seed": 5, "stage": "talk"} | options
  return packing.Mixture(
    [np.asarray(part) for part in sizes], weights, limits, batch_size, **options
  )


@settings(deadline=None, max_examples=15)
@given(
  st.lists(items, min_size=2, max_size=3),
  st.tuples(*[st.floats(0.2, 5)] * 3),
  st.integers(1, 7),
)
def test_a_mixture_repeats_nothing_before_all_of_a_set_was_used(
  sizes, weights, batch_size
):
  weights = np.asarray(weights[: len(sizes)])
  plan = mixture(sizes, weights, batch_size)
  rows = [row for step in range(200) for row in plan.batch(step)]
  first, limits = 0, np.array([20, 3, 2])
  whole = np.concatenate([np.asarray(part) for part in sizes])
  assert all((whole[row].sum(axis=0) <= limits).all() for row in rows)
  for part, share in zip(sizes, weights / weights.sum(), strict=True):
    ours = [r for r in rows if first <= r[0] < first + len(part)]
    # No row holds examples of two sets, and rows come in the set's share.
    assert all((first <= r).all() & (r < first + len(part)).all() for r in ours)
    assert abs(len(ours) - share * len(rows)) < 1 + len(rows) / packing.PERIOD
    used = np.concatenate([*ours, []]).astype(int) - first
    for start in range(0, len(used), len(part)):
      epoch = used[start : start + len(part)].tolist()
      assert len(set(epoch)) == len(epoch)
    first += len(part)


def test_shares_over_many_periods_are_exact():
  ones = np.ones((7, 3), int)
  plan = mixture([ones, ones, ones], [1, 0.5, 0.03], batch_size=1)
  counts = np.zeros(3, int)
  for step in range(3 * packing.PERIOD, 4 * packing.PERIOD):
    part, number = plan.locate(step)
    # Numbers follow one another without a gap.
    before = 3 * round(plan.shares[part] * packing.PERIOD)
    assert number == before + counts[part]
    counts[part] += 1
  wanted = np.array([1, 0.5, 0.03]) / 1.53
  np.testing.assert_allclose(counts / packing.PERIOD, wanted, atol=1e-4)


def test_a_mixture_at_a_step_does_not_depend_on_what_was_asked_before():
  rng = np.random.default_rng(0)
  sizes = [rng.integers(1, [20, 4, 3], (n, 3)) for n in (50, 20)]
  forward = mixture(sizes, [1, 2])
  batches = [plain(forward.batch(step)) for step in range(60)]
  for step in (59, 0, 33, 7):
    assert plain(mixture(sizes, [1, 2]).batch(step)) == batches[step]
    assert plain(forward.batch(step)) == batches[step]
  assert plain(mixture(sizes, [1, 2], seed=6).batch(0)) != batches[0]
  assert plain(mixture(sizes, [1, 2], stage="draw").batch(0)) != batches[0]
  # A set's own order does not depend on how much of the others there is.
  other = mixture(sizes, [1, 7])
  second = [
    [row for b in plans for row in b if row[0] >= 50][:15]
    for plans in (batches, [plain(other.batch(step)) for step in range(60)])
  ]
  assert second[0] == second[1]
