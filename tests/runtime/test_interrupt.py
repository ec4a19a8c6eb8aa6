"""Requests to stop, of one process and of two."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from photochat_jax.runtime.interrupt import INTERRUPTED, SAVED, StopRequest

SCRIPT = pathlib.Path(__file__).with_name("stopping.py")


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, SAVED), (signal.SIGINT, INTERRUPTED)]
)
def test_alone_a_signal_is_noticed_after_the_step(number, code):
  before = signal.getsignal(number)
  with StopRequest() as stop:
    assert stop.agreed(1) is None
    signal.raise_signal(number)
    assert stop.agreed(2) == code
  assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once():
  with pytest.raises(KeyboardInterrupt), StopRequest():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_of_two_is_asked_and_both_stop_after_the_same_step(number):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  processes = [
    subprocess.Popen(
      [sys.executable, SCRIPT, address, str(index)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])},
    )
    for index in (0, 1)
  ]
  try:
    for process in processes:
      while "stepping" not in (line := process.stdout.readline()):
        assert line, process.communicate()  # Gloo says something first.
    processes[1].send_signal(number)
    said = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [SAVED, SAVED], said
  steps = {out.split("stopped ")[1] for out, _ in said}
  assert len(steps) == 1
