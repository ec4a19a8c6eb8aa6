"""Which examples stand in which row of which step: a plan without state.

For an epoch the examples are permuted by (seed, stage, epoch), cut into
windows, each window is packed first-fit-decreasing into rows, and the rows are
permuted and cut into batches. A step finds its epoch by adding up the epochs'
batch counts, so the plan at a step never depends on what was asked before,
and a run resumes from one integer.
"""

import bisect
import threading
import zlib
from collections.abc import Sequence

import numpy as np

# Large enough to fill rows well, small enough to mix lengths over an epoch.
WINDOW = 1024

# Rows of this many epochs are kept: neighbours, for prefetching across one.
_EPOCHS_KEPT = 3


def stage_number(stage: str | int) -> int:
  """A stage's name or number as a number that seeds."""
  return stage if isinstance(stage, int) else zlib.crc32(stage.encode())


def random_bits(count: int, *key: int) -> np.ndarray:
  """uint64[count] from a key.

  Raw bits, because numpy promises that a bit generator's stream never
  changes, and promises no such thing of `Generator.permutation`.
  """
  return np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)


def first_fit_decreasing(
  sizes: np.ndarray, limits: Sequence[int]
) -> list[np.ndarray]:
  """Packs items into rows; no row exceeds a limit of any resource.

  Args:
    sizes: int[N, R], what each item takes of each resource; items are placed
      from the largest first resource to the smallest, ties in order.
    limits: [R], what a row has.

  Returns:
    Indices of the items of each row, in the order of placing.

  Raises:
    ValueError: an item is larger than a row.
  """
  sizes, limits = np.asarray(sizes), np.asarray(limits)
  if np.any(sizes > limits):
    raise ValueError(
      f"An item needs {sizes.max(axis=0).tolist()} and a row has "
      f"{limits.tolist()}; cut the item first."
    )
  free = np.tile(limits, (len(sizes), 1))  # at most one row an item
  rows: list[list[int]] = []
  for item in np.argsort(-sizes[:, 0], kind="stable"):
    fits = np.all(free[: len(rows) + 1] >= sizes[item], axis=1)
    row = int(np.argmax(fits))
    if row == len(rows):
      rows.append([])
    rows[row].append(item)
    free[row] -= sizes[item]
  return [np.asarray(row, np.int64) for row in rows]


class Plan:
  """Rows of examples for every step.

  With `drop_remainder` an epoch's rows that fill no batch are left out; they
  are others in the next epoch. Otherwise, and where all data are less than
  one batch, empty rows fill the last batch: repeating examples under the same
  keys would teach nothing more.

  Attributes:
    batch_size: rows of a batch.
  """

  def __init__(
    self,
    sizes: np.ndarray,
    limits: Sequence[int],
    batch_size: int,
    seed: int,
    stage: str | int,
    drop_remainder: bool = True,
  ):
    """Takes sizes int[N, R] and limits [R] as `first_fit_decreasing` does."""
    if not len(sizes):
      raise ValueError("There are no examples to plan; give some data.")
    self.batch_size = batch_size
    self._sizes = np.asarray(sizes)
    self._limits = limits
    self._key = (seed, stage_number(stage))
    self._drop = drop_remainder
    self._ends: list[int] = []  # first step after each epoch
    self._epochs: dict[int, list[np.ndarray]] = {}
    self._lock = threading.Lock()

  def rows_of_epoch(self, epoch: int) -> list[np.ndarray]:
    """An epoch's rows of example numbers, a whole number of batches."""
    order = np.argsort(
      random_bits(len(self._sizes), *self._key, epoch, 0), kind="stable"
    )
    rows = []
    for start in range(0, len(order), WINDOW):
      window = order[start : start + WINDOW]
      packed = first_fit_decreasing(self._sizes[window], self._limits)
      rows.extend(window[items] for items in packed)
    # Placing sorts a window by length; batches should not be sorted.
    shuffled = np.argsort(
      random_bits(len(rows), *self._key, epoch, 1), kind="stable"
    )
    rows = [rows[i] for i in shuffled]
    extra = len(rows) % self.batch_size
    if self._drop and len(rows) > extra:
      return rows[: len(rows) - extra]
    empty = np.zeros(0, np.int64)
    return rows + [empty] * (-len(rows) % self.batch_size)

  def locate(self, step: int) -> tuple[int, int]:
    """A step's epoch, and its number among the epoch's batches."""
    with self._lock:
      while not self._ends or self._ends[-1] <= step:
        count = len(self._rows(len(self._ends))) // self.batch_size
        self._ends.append((self._ends or [0])[-1] + count)
      epoch = bisect.bisect_right(self._ends, step)
      return epoch, step - ([0] + self._ends)[epoch]

  def batch(self, step: int) -> list[np.ndarray]:
    """Example numbers of each of a step's rows."""
    epoch, number = self.locate(step)
    with self._lock:
      rows = self._rows(epoch)
    return rows[number * self.batch_size : (number + 1) * self.batch_size]

  def _rows(self, epoch: int) -> list[np.ndarray]:
    if epoch not in self._epochs:
      while len(self._epochs) >= _EPOCHS_KEPT:
        self._epochs.pop(next(iter(self._epochs)))
      self._epochs[epoch] = self.rows_of_epoch(epoch)
    return self._epochs[epoch]
