"""A real trainer, killed at any instant and started again.

`pytest tests/test_killed.py --kills=30` kills more often.
"""

import json
import os
import pathlib
import random
import select
import signal
import subprocess
import sys

import pytest

from photochat_jax.runtime.interrupt import SAVED

HERE = pathlib.Path(__file__).parent


class Server:
  """Starts trainers, by `killing.py`."""

  def __init__(self, steps, log):
    self.steps = steps
    self._process = subprocess.Popen(
      [sys.executable, HERE / "killing.py"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=log,
      env=os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}"},
      bufsize=0,
    )
    while self.line(600) != "ready":
      pass

  def line(self, seconds):
    """The next line that it prints; None if there is none in time."""
    if not select.select([self._process.stdout], [], [], seconds)[0]:
      return None
    line = self._process.stdout.readline()
    assert line, "the server ended"
    return line.decode().strip()

  def start(self, folder):
    """Returns the number of a process that trains in a folder."""
    self._process.stdin.write(f"{self.steps} {folder}\n".encode())
    while not (line := self.line(60)).isdigit():
      pass
    return int(line)

  def exit_code(self, until=lambda: False):
    """Its exit code, or None as soon as `until` is true."""
    while not until():
      line = self.line(0.001)
      if line and line.lstrip("-").isdigit():
        return int(line)
    return None

  def close(self):
    self._process.kill()
    self._process.wait()


@pytest.fixture(scope="module")
def server(request, tmp_path_factory):
  # So many that each kill finds a run that is not done.
  steps = request.config.getoption("--kills") + 1
  with (tmp_path_factory.mktemp("server") / "log").open("w+") as log:
    server = Server(steps, log)
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
  """The folder of a run that nobody interrupted."""
  folder = tmp_path_factory.mktemp("whole")
  server.start(folder)
  assert server.exit_code() == 0
  return folder


def rows(folder):
  path = folder / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith("}")]


def saving(folder):
  """Whether a checkpoint is being written at this instant."""
  return any((folder / "checkpoints").glob("*tmp*"))


def saved(folder):
  steps = (folder / "checkpoints").glob("*")
  return max((int(s.name) for s in steps if s.name.isdigit()), default=0)


def test_killed_at_any_instant_it_ends_as_if_it_never_was(
  server, whole, tmp_path, request
):
  kills = request.config.getoption("--kills")
  chance = random.Random(kills)
  killed = in_saves = 0
  while True:
    process = server.start(tmp_path)
    before = saved(tmp_path)
    if killed == kills:
      assert server.exit_code() == 0
      break
    # In a save, or some polls after a row of metrics: between any two lines.
    in_save, wait = killed % 2 == 0, chance.randrange(400)
    seen = len(rows(tmp_path))

    def now(in_save=in_save, seen=seen, left=[wait]):  # noqa: B006
      if in_save:
        return saving(tmp_path)
      if len(rows(tmp_path)) == seen:
        return False
      left[0] -= 1
      return left[0] < 0

    code = server.exit_code(now)
    if code is None:
      os.kill(process, signal.SIGKILL)
      in_saves += saving(tmp_path)
      code = server.exit_code()
    if code == 0:
      # It was done before it could be killed: from some step on again.
      raise AssertionError(f"finished after {killed} kills; give it more steps")
    assert code == -signal.SIGKILL
    killed += 1
    # What was saved stays.
    assert saved(tmp_path) >= before
  assert (tmp_path / "digest").read_text() == (whole / "digest").read_text()
  assert rows(tmp_path) == rows(whole)
  assert [row["step"] for row in rows(whole)] == list(
    range(1, 3 * server.steps + 1)
  )
  assert in_saves >= 1
  print(f"{killed} kills, {in_saves} of them in a save")


def test_asked_to_stop_it_loses_no_step(server, whole, tmp_path):
  process = server.start(tmp_path)
  assert server.exit_code(lambda: len(rows(tmp_path)) > 3) is None
  os.kill(process, signal.SIGTERM)
  assert server.exit_code() == SAVED
  step = saved(tmp_path)
  assert len(rows(tmp_path)) <= step < 3 * server.steps
  server.start(tmp_path)
  assert server.exit_code() == 0
  assert (tmp_path / "digest").read_text() == (whole / "digest").read_text()
  assert rows(tmp_path) == rows(whole)
