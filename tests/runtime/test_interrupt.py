"""Requests to stop, of one process and of two."""

import pathlib
import signal

import pair
import pytest

from photochat_jax.runtime.interrupt import (
  INTERRUPTED,
  SAVED,
  Interrupted,
  StopRequest,
)

SCRIPT = pathlib.Path(__file__).with_name("stopping.py")
CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


def test_the_codes_that_launchers_know():
  assert (SAVED, INTERRUPTED) == (75, 130)


@pytest.mark.parametrize("number", CODES)
def test_alone_a_signal_is_noticed_after_the_step(number):
  before = signal.getsignal(number)
  with StopRequest() as stop:
    assert stop.agreed(1) is None
    signal.raise_signal(number)
    assert stop.agreed(2) == CODES[number]
  assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", CODES)
def test_a_request_after_the_last_step_ends_the_run_too(number):
  with pytest.raises(Interrupted) as stopped, StopRequest() as stop:
    assert stop.agreed(1) is None
    signal.raise_signal(number)
  assert stopped.value.code == CODES[number]


def test_an_error_is_not_hidden_by_a_request():
  with pytest.raises(OSError, match="disk"), StopRequest():
    signal.raise_signal(signal.SIGTERM)
    raise OSError("disk")


def test_a_second_ctrl_c_ends_at_once():
  before = signal.getsignal(signal.SIGINT)
  with pytest.raises(KeyboardInterrupt), StopRequest():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
  "sent",
  [
    {1: signal.SIGTERM},
    {0: signal.SIGTERM, 1: signal.SIGTERM},
    {0: signal.SIGINT},
  ],
  ids=["one told", "both told", "ctrl-c of one"],
)
def test_two_processes_stop_after_the_same_step(sent):
  address = pair.free_address()
  with pair.started(lambda number: (SCRIPT, address, number)) as processes:
    for process in processes:
      while "stepping" not in (line := process.stdout.readline()):
        assert line, process.communicate()  # Gloo says something first.
    for process, number in sent.items():
      processes[process].send_signal(number)
    said = [process.communicate(timeout=120) for process in processes]
  codes = [process.returncode for process in processes]
  assert codes == [CODES[sent.get(p, signal.SIGTERM)] for p in (0, 1)], said
  steps = {int(out.split("stopped ")[1]) for out, _ in said}
  assert len(steps) == 1
  assert steps.pop() > 5
