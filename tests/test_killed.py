"""A real trainer, killed at random instants and started again.

`pytest tests/test_killed.py --kills=30 -n 0 -s` kills more often, and tells
where.
"""

import contextlib
import json
import os
import pathlib
import random
import select
import signal
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
# Steps that can be lost where every step is saved: the one being saved, and
# the one that is made meanwhile.
UNSAVED = 2


class Trainers:
  """Starts one run after the other, by `killing.py`."""

  def __init__(self, steps, log):
    self.steps, self._log = steps, log
    with log.open("w") as file:
      self._server = subprocess.Popen(
        [sys.executable, HERE / "killing.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=file,
        env=os.environ
        | {
          "PYTHONPATH": f"{HERE.parent}:{HERE}",
          # Also what is compiled fast: each start does it again.
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        bufsize=0,
      )
    while self._line() != "ready":  # What is imported may print.
      pass

  def _line(self, seconds=None):
    """The next line it prints; None if none comes in that time."""
    out = self._server.stdout
    if not select.select([out], [], [], seconds)[0]:
      return None
    line = out.readline()
    assert line, self._log.read_text()
    return line.decode().strip()

  def start(self, folder, processes=1):
    """Goes on with the run of a folder; returns its processes' numbers."""
    line = " ".join(map(str, (processes, *self.steps, folder)))
    self._server.stdin.write(f"{line}\n".encode())
    return [int(number) for number in self._line().split()]

  def end(self):
    """The exit codes of the run's processes, when they have ended."""
    return [int(code) for code in self._line().split()]

  def finish(self):
    """Waits for the run's end, which must be a success."""
    codes = self.end()
    assert not any(codes), (codes, self._log.read_text())

  def has_ended(self, seconds):
    """Waits at most so long, and returns whether it has."""
    return bool(select.select([self._server.stdout], [], [], seconds)[0])

  def wait_until(self, holds):
    """Returns once that holds; what ends before it does is a failure."""
    while not holds():
      if self.has_ended(0.005):
        raise AssertionError(
          f"ended with {self.end()} before its time\n{self._log.read_text()}"
        )

  def close(self):
    # Its standard input ends, and so does it.
    self._server.communicate()


@pytest.fixture(scope="module")
def trainers(request, tmp_path_factory):
  # Kills before and after the end of the first stage.
  kills = request.config.getoption("--kills")
  steps = kills // 2, 3 * kills
  found = Trainers(steps, tmp_path_factory.mktemp("trainers") / "log.txt")
  yield found
  found.close()


@pytest.fixture(scope="module")
def whole(trainers, tmp_path_factory):
  """The folder of a run that nobody interrupts."""
  folder = tmp_path_factory.mktemp("whole") / "run"
  trainers.start(folder)
  trainers.finish()
  return folder


def lines(path):
  """The whole lines of a file of JSON."""
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text.split("\n")[:-1]]


def starts(folder, process=0):
  """The batches that a process took in each start of a run."""
  found = []
  for line in lines(folder / f"batches.{process}.jsonl"):
    if "start" in line:
      found.append([])
    else:
      found[-1].append(line)
  return found


def saved(folder):
  """The newest whole checkpoint's step."""
  names = (path.name for path in (folder / "checkpoints").glob("*"))
  return max((int(name) for name in names if name.isdigit()), default=0)


def half_saved(folder):
  """Checkpoints that are being written or never will be whole.

  One that was left by a killed process has the name of the next one.
  """
  found = set()
  for path in (folder / "checkpoints").glob("*tmp*"):
    with contextlib.suppress(FileNotFoundError):  # It is whole by now.
      found.add((path.name, path.stat().st_mtime_ns))
  return found


def assert_same(folder, whole):
  """Batches, losses, parameters and optimiser are those of `whole`."""
  (wanted,) = starts(whole)
  assert [line["step"] for line in wanted] == list(range(1, len(wanted) + 1))
  wanted = {line["step"]: line for line in wanted}
  found = [line for start in starts(folder) for line in start]
  assert all(line == wanted[line["step"]] for line in found)
  assert {line["step"] for line in found} == set(wanted)
  rows = lines(whole / "metrics.jsonl")
  assert [row["step"] for row in rows] == sorted(wanted)
  assert lines(folder / "metrics.jsonl") == rows
  assert digests(folder) == digests(whole)


def digests(folder):
  return json.loads((folder / "digests.json").read_text())


def test_killed_at_any_instant_it_goes_on_with_the_same_bits(
  trainers, whole, tmp_path, request
):
  folder, kills = tmp_path / "run", request.config.getoption("--kills")
  chance = random.Random(kills)
  in_save, resumed_from = 0, []
  for kill in range(kills):
    resumed_from.append(saved(folder))
    old = half_saved(folder)
    (process,) = trainers.start(folder)
    # So few that the run does not end before.
    most = min(4, (sum(trainers.steps) - resumed_from[-1]) // 4)
    to_save = kill % 2 == 0
    batches = chance.randint(min(most, to_save), most)
    trainers.wait_until(
      lambda kill=kill, batches=batches: (
        list(map(len, starts(folder)[kill:])) >= [batches]
      )
    )
    if to_save:
      # Some way into the next save.
      now = half_saved(folder)
      trainers.wait_until(lambda now=now: half_saved(folder) - now)
      trainers.has_ended(chance.uniform(0.0, 0.05))
    else:
      # Some way into the start, or some time after a batch was taken.
      trainers.has_ended(chance.uniform(0.0, 0.2 if batches else 3.0))
    os.kill(process, signal.SIGKILL)
    assert trainers.end() == [-signal.SIGKILL]
    in_save += bool(half_saved(folder) - old)
    # What was saved stays.
    assert saved(folder) >= resumed_from[-1]
  resumed_from.append(saved(folder))
  trainers.start(folder)
  trainers.finish()
  print(f"{kills} kills, {in_save} of them in a save, from {resumed_from}")
  assert in_save > 0
  assert not half_saved(folder)
  assert_same(folder, whole)
  taken = 0
  for step, batches in zip(resumed_from, starts(folder), strict=True):
    assert taken - step <= UNSAVED
    if batches:
      assert batches[0]["step"] == step + 1
      taken = batches[-1]["step"]


def test_told_to_end_it_saves_and_no_step_is_made_again(
  trainers, whole, tmp_path
):
  folder = tmp_path / "run"
  (process,) = trainers.start(folder)
  trainers.wait_until(lambda: len(sum(starts(folder), [])) >= 2)
  os.kill(process, signal.SIGTERM)
  assert trainers.end() == [75]
  step = saved(folder)
  assert 2 <= step < sum(trainers.steps)
  assert not half_saved(folder)
  trainers.start(folder)
  trainers.finish()
  assert_same(folder, whole)
  before, after = starts(folder)
  assert [line["step"] for line in before] == list(range(1, step + 1))
  assert after[0]["step"] == step + 1


@pytest.mark.slow
def test_one_of_two_processes_is_told_and_both_save_the_same_step(
  trainers, whole, tmp_path
):
  folder = tmp_path / "run"
  _, told = trainers.start(folder, processes=2)
  trainers.wait_until(lambda: len(sum(starts(folder), [])) >= 2)
  os.kill(told, signal.SIGTERM)
  assert trainers.end() == [75, 75]
  step = saved(folder)
  assert 2 <= step < sum(trainers.steps)
  assert not half_saved(folder)
  trainers.start(folder, processes=2)
  trainers.finish()
  (wanted,) = starts(whole)
  wanted = [(line["step"], line["examples"]) for line in wanted]
  for process in (0, 1):
    before, after = (
      [(line["step"], line["examples"]) for line in start]
      for start in starts(folder, process)
    )
    assert before == wanted[:step]
    assert after == wanted[step:]
  # Sums in another order: not the same bits as one process's.
  rows = lines(folder / "metrics.jsonl")
  assert [row["step"] for row in rows] == [number for number, _ in wanted]
  assert [row["train/loss"] for row in rows] == pytest.approx(
    [row["train/loss"] for row in lines(whole / "metrics.jsonl")], rel=1e-4
  )
