"""How fast a run is, and how much of its time it trains.

| metric                          | what it is                                 |
|---------------------------------|--------------------------------------------|
| perf/steps_per_second           | updates                                    |
| perf/tokens_per_second_per_chip | positions of rows, padding too, as MaxText |
| perf/photos_per_second_per_chip | real photos, seen and learnt to draw       |
| perf/mfu                        | see `runtime.flops`, from 0 to 1           |
| perf/hbm_peak_gb                | most memory in use since the start, in GB  |
|                                 | of 2**30 bytes, the fullest local chip     |
| perf/data_wait                  | share of the time that the loop stood      |
|                                 | waiting for a batch                        |
| perf/goodput                    | share of the time since the run's first    |
|                                 | start that went into updates that counted  |

The rates are of the steps since they were last taken. A step that compiles is
left out of them, and so are pauses for anything that is no training. Goodput
leaves out the same, and waiting for data, the time between two starts, and
updates that were lost: its totals are part of a checkpoint, so that what was
made after the last one, before a kill or a roll-back, is not in them.

Nothing here waits for the device. Programs are sent to it ahead of time; what
the loop sees over many steps is the device's speed all the same, and waiting
for data while the device is busy counts as waiting.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from photochat_jax.config import RunConfig, StageConfig
from photochat_jax.runtime import flops

_COMPILED = "/jax/core/compile/backend_compile_duration"

Batch = Mapping[str, np.ndarray]


@functools.cache
def _counter() -> list[int]:
  """Programs compiled in this process, from the first call on."""
  count = [0]

  def listen(event: str, seconds: float, **_) -> None:
    del seconds
    count[0] += event == _COMPILED

  jax.monitoring.register_event_duration_secs_listener(listen)
  return count


def _compilations() -> int:
  return _counter()[0]


class Meters:
  """Measures a run, from inside its loop.

  ```
  meters = Meters(run, mesh)
  meters.restore(meta["meters"])  # Of the checkpoint that is gone on from.
  meters.begin(stage)
  for batch in meters.batches(batches):
    ...  # The step.
    meters.step_done()
    with meters.paused(metrics):
      ...  # An evaluation.
    progress.perf(step, meters.take())
    checkpoints.save(step, state, {"meters": meters.state()})
  ```
  """

  def __init__(
    self,
    run: RunConfig,
    mesh: Any,
    started_at: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], float] = time.time,
    compilations: Callable[[], int] = _compilations,
  ):
    """Starts the run's first clock.

    Args:
      run: the run.
      mesh: all devices.
      started_at: when this process started, in seconds since 1970; now
        without. What `restore` is given goes before it.
      clock: seconds that pass evenly.
      now: seconds since 1970, which outlast a process.
      compilations: how many programs have been compiled.
    """
    self._run, self._devices = run, list(mesh.devices.flat)
    self._chips = flops.count_chips(self._devices)
    self._clock, self._now, self._compilations = clock, now, compilations
    self._first_start = now() if started_at is None else started_at
    self._productive = 0.0
    self._stage: StageConfig | None = None
    self._flops = 0.0
    self._batch = (0, 0)
    self._clear()
    self._mark()

  def begin(self, stage: StageConfig) -> None:
    """A stage starts, or starts again; its first step is not measured."""
    self._stage = stage
    self._flops = sum(flops.train_flops(self._run, stage).values())
    self._clear()
    self._mark()
    self._is_first = True

  def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Hands on batches of this process's rows, and times their coming."""
    iterator = iter(batches)
    while True:
      before = self._clock()
      batch = next(iterator, None)
      if batch is None:
        return
      self.batch_waited(self._clock() - before)
      self._batch = self._size(batch)
      yield batch

  def batch_waited(self, seconds: float) -> None:
    """Adds seconds that the loop stood waiting for data."""
    self._waited += seconds

  def step_done(self, counts: bool = True) -> None:
    """Ends a step, when it has been sent to the device.

    Args:
      counts: False for a batch that was taken and not learnt from.
    """
    seconds = self._clock() - self._since
    compiled = self._compilations() != self._compiled
    if counts and not compiled and not self._is_first:
      tokens, photos = self._batch
      self._steps += 1
      self._seconds += seconds
      self._waits += self._waited
      self._tokens += tokens
      self._photos += photos
      self._productive += max(seconds - self._waited, 0.0)
    self._is_first = False
    self._mark()

  @contextlib.contextmanager
  def paused(self, after: Any = None) -> Iterator[None]:
    """Leaves out what is no training: evaluation, samples, the last save.

    Args:
      after: arrays of the last step. They are waited for before the pause
        begins, where the device's last steps would otherwise fall into it.
    """
    jax.block_until_ready(after)
    before = self._clock()
    compiled = self._compilations()
    try:
      yield
    finally:
      self._since += self._clock() - before
      self._compiled += self._compilations() - compiled

  def take(self) -> dict[str, float]:
    """Returns the metrics since the last time, those that can be known."""
    found: dict[str, float] = {}
    if self._steps and self._seconds > 0:
      found["perf/steps_per_second"] = self._steps / self._seconds
      each = self._seconds * self._chips
      if self._tokens:
        found["perf/tokens_per_second_per_chip"] = self._tokens / each
      found["perf/photos_per_second_per_chip"] = self._photos / each
      share = flops.mfu(
        self._flops, self._seconds / self._steps, self._devices
      )
      if share is not None:
        found["perf/mfu"] = share
      found["perf/data_wait"] = self._waits / self._seconds
    peak = hbm_peak()
    if peak is not None:
      found["perf/hbm_peak_gb"] = peak / 2**30
    wall = self._now() - self._first_start
    if wall > 0:
      found["perf/goodput"] = self._productive / wall
    self._clear()
    return found

  def state(self) -> dict[str, float]:
    """What goodput needs of the past, as JSON for a checkpoint."""
    return {"first_start": self._first_start, "productive": self._productive}

  def restore(self, state: Mapping[str, float] | None) -> None:
    """Goes on from a checkpoint's totals, after a start or a roll-back.

    Args:
      state: of `state`; None where there is no checkpoint, and nothing that
        was made counts.
    """
    if state is not None:
      self._first_start = state["first_start"]
    self._productive = state["productive"] if state is not None else 0.0
    self._clear()
    self._mark()

  def _size(self, batch: Batch) -> tuple[int, int]:
    """Tokens and photos of the global batch, from this process's rows."""
    photos = int(np.sum(batch.get("photos_in_mask", 0)))
    losses = self._stage.losses if self._stage else None
    if losses and (losses.photo or losses.autoencoder):
      photos += int(np.sum(batch["photos_out_mask"]))
    tokens = np.size(batch["tokens"]) if "tokens" in batch else 0
    return tokens * jax.process_count(), photos * jax.process_count()

  def _clear(self) -> None:
    """Forgets the steps that were measured."""
    self._steps = self._tokens = self._photos = 0
    self._seconds = self._waits = 0.0

  def _mark(self) -> None:
    """A step begins."""
    self._since, self._waited = self._clock(), 0.0
    self._compiled = self._compilations()
    self._is_first = False


def hbm_peak() -> int | None:
  """Most bytes in use so far on a device of this process, where it says."""
  found = []
  for device in jax.local_devices():
    found.append((device.memory_stats() or {}).get("peak_bytes_in_use"))
  known = [peak for peak in found if peak is not None]
  return max(known) if known else None
