"""Heartbeats, and the end of a run that is stuck."""

import json
import os
import pathlib
import socket
import subprocess
import threading

import jax
import pair
import pytest

from photochat_jax.runtime.watchdog import STUCK, Watchdog

SCRIPT = pathlib.Path(__file__).with_name("hanging.py")
START = 1_700_000_000.0


class Clock:
  """Seconds since a beginning."""

  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now

  def calendar(self):
    return START + self.now


@pytest.fixture
def clock():
  return Clock()


def watchdog(folder, clock):
  return Watchdog(folder, 1800.0, clock, clock.calendar)


def others(folder, *beats):
  """Heartbeats of processes 1, 2, ...; None where there is none."""
  (folder / "heartbeats").mkdir(exist_ok=True)
  for process, beat in enumerate(beats, start=1):
    if beat is not None:
      step, stepped, written = beat
      text = json.dumps(
        {
          "process": process,
          "host": f"pod-{process}",
          "pid": 100 + process,
          "step": step,
          "stepped": START + stepped,
          "paused": False,
          "written": START + written,
        }
      )
      (folder / "heartbeats" / f"{process}.json").write_text(text)


def said(folder):
  return (folder / "stacks" / "0.txt").read_text()


@pytest.fixture
def three(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 3)


def test_the_code_that_launchers_know():
  assert STUCK == 76


def test_a_run_that_steps_goes_on(tmp_path, clock):
  dog = watchdog(tmp_path, clock)
  for step in range(3):
    dog.beat(step)
    clock.now += 1799.0
    assert not dog.look()
  beat = json.loads((tmp_path / "heartbeats" / "0.json").read_text())
  assert beat == {
    "process": 0,
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "step": 2,
    "stepped": START + 2 * 1799,
    "paused": False,
    "written": START + 3 * 1799,
  }
  assert os.listdir(tmp_path / "heartbeats") == ["0.json"]
  assert not (tmp_path / "stacks").exists()


def test_the_process_that_is_behind_is_named(tmp_path, clock, three, capsys):
  dog = watchdog(tmp_path, clock)
  clock.now = 100.0
  dog.beat(42)
  clock.now = 1900.0
  others(tmp_path, (42, 100, 1890), (41, 90, 1880))
  assert dog.look()
  assert said(tmp_path).startswith(
    "Process 2 (host pod-2, pid 102) has not gone beyond step 41 for 1,810 s; "
    "the others wait for it at step 42. Ending process 0, at step 42, with "
    "exit code 76"
  )
  # The stack of this very test.
  assert "in test_the_process_that_is_behind_is_named" in said(tmp_path)
  err = capsys.readouterr().err
  assert "in test_the_process_that_is_behind_is_named" in err


def test_it_names_itself_when_it_is_behind(tmp_path, clock, three):
  dog = watchdog(tmp_path, clock)
  dog.beat(41)
  clock.now = 1800.0
  others(tmp_path, (42, 10, 1790), (43, 20, 1790))
  assert dog.look()
  host, pid = socket.gethostname(), os.getpid()
  assert said(tmp_path).startswith(
    f"Process 0 (host {host}, pid {pid}) has not gone beyond step 41 for "
    "1,800 s; the others wait for it at step 43."
  )


def test_where_none_is_behind_it_says_so(tmp_path, clock, three):
  dog = watchdog(tmp_path, clock)
  dog.beat(41)
  clock.now = 1800.0
  others(tmp_path, (41, 0, 1800), (41, 0, 1800))
  assert dog.look()
  assert said(tmp_path).startswith(
    "None of the 3 processes has gone beyond step 41 for 1,800 s"
  )


def test_heartbeats_of_an_earlier_start_do_not_count(tmp_path, clock, three):
  """Process 1 was at step 90 then, and hangs before it gets here."""
  others(tmp_path, (90, -20, -10), (90, -20, -10))
  dog = watchdog(tmp_path, clock)
  dog.beat(42)
  clock.now = 1800.0
  others(tmp_path, None, (42, 0, 1790))
  assert dog.look()
  assert said(tmp_path).startswith(
    "Process 1 has written no heartbeat since the run's start."
  )


def test_a_process_that_fell_silent_is_named(tmp_path, clock, three):
  dog = watchdog(tmp_path, clock)
  dog.beat(42)
  clock.now = 1800.0
  others(tmp_path, (42, 0, 1790), (42, 0, 5))
  assert dog.look()
  assert said(tmp_path).startswith(
    "Process 2 (host pod-2, pid 102) has written no heartbeat for 1,795 s."
  )


def test_a_torn_heartbeat_is_none(tmp_path, clock, three):
  dog = watchdog(tmp_path, clock)
  clock.now = 1800.0
  others(tmp_path, (0, 0, 1790), (0, 0, 1790))
  (tmp_path / "heartbeats" / "2.json").write_text('{"process": 2, "st')
  assert dog.look()
  assert said(tmp_path).startswith("Process 2 has written no heartbeat")


def test_a_pause_does_not_count(tmp_path, clock):
  dog = watchdog(tmp_path, clock)
  with dog.paused(), dog.paused():
    clock.now += 10_000.0
    assert not dog.look()
  clock.now += 1799.0
  assert not dog.look()
  clock.now += 1.0
  assert dog.look()


def test_a_folder_that_cannot_be_written_does_not_stop_it(tmp_path, clock):
  (tmp_path / "heartbeats").write_text("no folder")
  (tmp_path / "stacks").write_text("no folder")
  dog = watchdog(tmp_path, clock)
  assert not dog.look()
  clock.now = 1800.0
  assert dog.look()


def test_its_thread_ends_a_process_that_hangs(tmp_path):
  ended = threading.Event()
  codes = []

  def end(code):
    codes.append(code)
    ended.set()

  with Watchdog(tmp_path, 0.05, end=end):
    assert ended.wait(60)
  assert codes == [STUCK]


def test_it_stays_when_the_run_is_over(tmp_path):
  codes = []
  with Watchdog(tmp_path, 1800.0, end=codes.append) as dog:
    dog.beat(1)
  assert not codes
  assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_zero_watches_nothing(tmp_path):
  with Watchdog(tmp_path, 0.0) as dog:
    dog.beat(1)
    with dog.paused():
      pass
  assert not list(tmp_path.iterdir())


def test_of_two_processes_both_end_and_tell_which_one_hangs(tmp_path):
  address = pair.free_address()
  with pair.started(
    lambda number: (SCRIPT, address, number, tmp_path),
    stderr=subprocess.STDOUT,
  ) as processes:
    told = [process.communicate(timeout=120)[0] for process in processes]
  assert [process.returncode for process in processes] == [STUCK] * 2, told
  host, hanging = socket.gethostname(), processes[1].pid
  for process in (0, 1):
    stacks = (tmp_path / "stacks" / f"{process}.txt").read_text()
    assert stacks.startswith(
      f"Process 1 (host {host}, pid {hanging}) has not gone beyond step 41 for"
    )
    assert ("in fall_asleep" in stacks) == (process == 1)
    assert "Process 1 (host" in told[process]
