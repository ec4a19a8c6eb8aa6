"""Rates and goodput on clocks that are told what time it is."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from photochat_jax.runtime import flops
from photochat_jax.runtime import meters as meters_lib

JOINT = 2


class World:
  """Meters, and the time and the compiler that they see."""

  def __init__(self, kind="cpu", chips=2, stage=JOINT, **options):
    self.time, self.compiled = 50.0, 0
    self.run = small_run.run_config()
    self.stage = self.run.stages[stage]
    devices = [
      types.SimpleNamespace(device_kind=kind, id=i) for i in range(chips)
    ]
    self.meters = meters_lib.Meters(
      self.run,
      types.SimpleNamespace(devices=np.array(devices)),
      clock=lambda: self.time,
      now=lambda: 1000.0 + self.time,
      compilations=lambda: self.compiled,
      **options,
    )
    self.meters.begin(self.stage)

  def passes(self, seconds):
    self.time += seconds

  def step(self, wait=0.0, work=0.0, compiles=0, counts=True, batch=None):
    """Takes a batch after `wait` seconds and works for `work` seconds."""

    def come():
      self.passes(wait)
      yield batch or dialogues(2, 128)

    for _ in self.meters.batches(come()):
      self.passes(work)
      self.compiled += compiles
      self.meters.step_done(counts)


def dialogues(rows, length, seen=3, drawn=1):
  """A process's share of a batch with so many real photos."""
  return {
    "tokens": np.zeros((rows, length), np.int32),
    "photos_in_mask": np.arange(rows * 4).reshape(rows, 4) < seen,
    "photos_out_mask": np.arange(rows * 2).reshape(rows, 2) < drawn,
  }


def test_rates_worked_out_by_hand():
  world = World()
  world.step(wait=1.0, work=30.0)  # The first step compiles.
  world.step(wait=0.5, work=1.5)
  world.step(wait=0.0, work=2.0)
  found = world.meters.take()
  # 2 steps of 2 s; each has 2 x 128 tokens and 3 + 1 photos, on 2 chips.
  assert found == {
    "perf/steps_per_second": 0.5,
    "perf/tokens_per_second_per_chip": 64.0,
    "perf/photos_per_second_per_chip": 1.0,
    "perf/data_wait": 0.125,
    # 35 s since the start, of which 1.5 + 2 went into steps.
    "perf/goodput": pytest.approx(3.5 / 35),
  }


def test_taking_starts_a_new_window_but_goodput_goes_on():
  world = World()
  world.step()
  world.step(work=4.0)
  world.meters.take()
  world.step(work=1.0)
  found = world.meters.take()
  assert found["perf/steps_per_second"] == 1.0
  assert found["perf/goodput"] == 1.0
  world.passes(5.0)
  assert world.meters.take() == {"perf/goodput": 0.5}


def test_utilisation_is_flops_over_peak():
  world = World(kind="TPU v5 lite", chips=4)
  world.step()
  world.step(work=0.25)
  one = sum(flops.train_flops(world.run, world.stage).values())
  # A quarter of a second on four chips of 197 TFLOP/s.
  assert world.meters.take()["perf/mfu"] == pytest.approx(one / 197e12)


def test_a_step_that_compiles_again_is_left_out():
  world = World()
  world.step(work=10.0)
  world.step(work=1.0)
  world.step(work=8.0, compiles=1)
  world.step(work=1.0)
  found = world.meters.take()
  assert found["perf/steps_per_second"] == 1.0
  assert found["perf/goodput"] == pytest.approx(2 / 20)


def test_a_batch_that_is_not_learnt_from_is_left_out():
  world = World()
  world.step()
  world.step(work=1.0)
  world.step(work=3.0, counts=False)
  found = world.meters.take()
  assert found["perf/steps_per_second"] == 1.0
  assert found["perf/goodput"] == 0.25


def test_pauses_count_neither_as_steps_nor_as_compilation():
  world = World()
  world.step()
  world.step(work=1.0)
  with world.meters.paused(jnp.ones(2)):
    world.passes(6.0)
    world.compiled += 3
  world.step(work=1.0)
  found = world.meters.take()
  assert found["perf/steps_per_second"] == 1.0
  assert found["perf/goodput"] == 0.25


def test_a_pause_that_fails_is_over_all_the_same():
  world = World()
  world.step()
  with pytest.raises(KeyError), world.meters.paused():
    world.passes(9.0)
    raise KeyError
  world.step(work=2.0)
  assert world.meters.take()["perf/steps_per_second"] == 0.5


def test_each_stage_has_a_first_step():
  world = World()
  world.step()
  world.step(work=1.0)
  world.meters.begin(world.stage)
  world.step(work=7.0)
  assert "perf/steps_per_second" not in world.meters.take()
  world.step(work=2.0)
  assert world.meters.take()["perf/steps_per_second"] == 0.5


def test_goodput_spans_a_restart():
  first = World()
  first.step()
  first.step(work=10.0)
  saved = json.loads(json.dumps(first.meters.state()))
  first.step(work=20.0)  # Lost: the process is killed after it.
  # It starts again 100 s after the first start, and makes the step again.
  second = World()
  second.passes(100.0)
  second.meters.restore(saved)
  second.meters.begin(second.stage)
  second.step(work=5.0)
  second.step(work=20.0)
  found = second.meters.take()
  assert found["perf/goodput"] == pytest.approx((10 + 20) / 125)
  assert found["perf/steps_per_second"] == pytest.approx(1 / 20)


def test_a_roll_back_takes_back_what_was_made_since():
  world = World()
  world.step()
  world.step(work=10.0)
  saved = world.meters.state()
  world.step(work=10.0)
  world.meters.restore(saved)
  assert world.meters.take() == {"perf/goodput": 0.5}
  world.meters.restore(None)
  assert world.meters.take() == {"perf/goodput": 0.0}


def test_the_process_may_have_started_before_the_meters():
  world = World(started_at=1000.0 + 50.0 - 30.0)
  world.step()
  world.step(work=10.0)
  assert world.meters.take()["perf/goodput"] == pytest.approx(10 / 40)


def test_a_share_of_the_batch_stands_for_all_processes(monkeypatch):
  monkeypatch.setattr(meters_lib.jax, "process_count", lambda: 8)
  world = World(chips=8)
  world.step()
  world.step(work=1.0)
  found = world.meters.take()
  assert found["perf/tokens_per_second_per_chip"] == 256.0
  assert found["perf/photos_per_second_per_chip"] == 4.0


def test_photos_that_are_not_learnt_do_not_count():
  world = World(chips=1)
  world.stage = types.SimpleNamespace(
    **vars(world.stage) | {"losses": type(world.stage.losses)(text=1.0)}
  )
  world.meters.begin(world.stage)
  world.step()
  world.step(work=1.0)
  assert world.meters.take()["perf/photos_per_second_per_chip"] == 3.0


def test_a_stage_of_photos_has_no_tokens():
  world = World(chips=1, stage=0)
  batch = {"photos_out_mask": np.array([[True], [True], [False]])}
  world.step(batch=batch)
  world.step(work=0.5, batch=batch)
  found = world.meters.take()
  assert "perf/tokens_per_second_per_chip" not in found
  assert found["perf/photos_per_second_per_chip"] == 4.0


def test_the_fullest_device_is_told(monkeypatch):
  def device(**stats):
    return types.SimpleNamespace(memory_stats=lambda: stats or None)

  full = [
    device(peak_bytes_in_use=3 * 2**30),
    device(peak_bytes_in_use=5 * 2**30),
    device(),
  ]
  monkeypatch.setattr(meters_lib.jax, "local_devices", lambda: full)
  assert World().meters.take()["perf/hbm_peak_gb"] == 5.0
  monkeypatch.setattr(meters_lib.jax, "local_devices", lambda: full[2:])
  assert "perf/hbm_peak_gb" not in World().meters.take()


def test_real_compilations_are_seen():
  seen = meters_lib._compilations
  seen()
  double = jax.jit(lambda x: x * 2 + 0.125)
  inputs = [jnp.zeros(n) for n in (3, 3, 5)]
  counts = [seen()]
  for x in inputs:
    double(x)
    counts.append(seen())
  first, again, other = np.diff(counts)
  assert first >= 1 and again == 0 and other >= 1
