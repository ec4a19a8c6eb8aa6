"""Heartbeats, and the end of a run that is stuck."""

import json
import threading

import jax
import pytest

from photochat_jax.runtime.watchdog import STUCK, Watchdog


class Clock:
  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return Clock()


def watchdog(folder, clock, ended):
  return Watchdog(folder, 100.0, clock, ended.append)


def beat_of_other(folder, **changes):
  beat = {
    "process": 1, "host": "pod-1", "pid": 7, "step": 41, "stepped": 990.0,
    "told": 1000.0,
  }  # fmt: skip
  path = folder / "heartbeats" / "1.json"
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(beat | changes))


def test_a_run_that_steps_goes_on(tmp_path, clock):
  ended = []
  dog = watchdog(tmp_path, clock, ended)
  for step in range(3):
    dog.beat(step)
    clock.now += 99
    dog.look()
  assert not ended
  beat = json.loads((tmp_path / "heartbeats" / "0.json").read_text())
  assert beat["step"] == 2
  assert beat["told"] - beat["stepped"] == 99


def test_the_process_that_is_behind_is_named_and_stacks_are_written(
  tmp_path, clock, monkeypatch, capsys
):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  ended = []
  dog = watchdog(tmp_path, clock, ended)
  dog.beat(42)
  clock.now += 120
  beat_of_other(tmp_path, told=1110.0)
  dog.look()
  assert ended == [STUCK]
  said = (tmp_path / "stacks" / "0.txt").read_text()
  assert (
    "process 1 (host pod-1, pid 7) has not gone beyond step 41 for 130 s"
  ) in said
  assert "process 0 (host" not in said
  # The stack of this very test.
  assert "test_the_process_that_is_behind" in said
  assert "stuck" in capsys.readouterr().err


def test_a_heartbeat_of_an_earlier_start_does_not_count(
  tmp_path, clock, monkeypatch
):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  beat_of_other(tmp_path, step=90, told=900.0)
  ended = []
  dog = watchdog(tmp_path, clock, ended)
  clock.now += 101
  dog.look()
  said = (tmp_path / "stacks" / "0.txt").read_text()
  assert "process 1 has not been heard of" in said
  assert "90" not in said.splitlines()[0]


def test_while_paused_no_step_is_missed(tmp_path, clock):
  ended = []
  dog = watchdog(tmp_path, clock, ended)
  with dog.paused():
    clock.now += 1000
    dog.look()
  clock.now += 99
  dog.look()
  assert not ended
  clock.now += 1
  dog.look()
  assert ended == [STUCK]


def test_its_thread_ends_a_process_that_hangs(tmp_path):
  ended = threading.Event()
  with Watchdog(tmp_path, 0.05, end=lambda code: ended.set()):
    assert ended.wait(30)


def test_zero_watches_nothing(tmp_path):
  with Watchdog(tmp_path, 0.0) as dog:
    dog.beat(1)
  assert not list(tmp_path.iterdir())
