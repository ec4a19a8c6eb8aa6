"""Starts two processes that find each other on this machine."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys

_TESTS = pathlib.Path(__file__).parent
_PATH = os.pathsep.join(map(str, (_TESTS, _TESTS / "data", _TESTS.parent)))


def free_address():
  """An address of this machine where nobody listens."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def started(arguments, stderr=subprocess.PIPE, **environment):
  """Two Python processes, which are killed at the end.

  Args:
    arguments: 0 or 1 -> what this one's Python is started with.
    stderr: where it goes; what both write is piped.
    **environment: values for both, or a function of 0 or 1.
  """
  processes = [
    subprocess.Popen(
      [sys.executable, *map(str, arguments(number))],
      stdout=subprocess.PIPE,
      stderr=stderr,
      text=True,
      env={
        **os.environ,
        "PYTHONPATH": _PATH,
        **{
          name: value(number) if callable(value) else value
          for name, value in environment.items()
        },
      },
    )
    for number in (0, 1)
  ]
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()


def run(arguments, timeout=120, **environment):
  """What two processes wrote that ended well: (stdout, stderr) of each."""
  with started(arguments, **environment) as processes:
    said = [process.communicate(timeout=timeout) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], said
  return said
