"""The runs of an ablation: what arms share, and every arm from it.

  OUT/seed<N>/before_<STAGE>  the stages before one, trained once for all arms
                              that begin with it
  OUT/seed<N>/captions        what a captioner of them says of the photos
  OUT/seed<N>/<arm>           the other stages from there, measured
  OUT/seed<N>/<name>/log.txt  what a run said

A run is a program of its own (`photochat_jax.main`), so it can be killed and
goes on; what is done is not done again.
"""

import concurrent.futures
import json
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath

from photochat_jax.ablation.arms import Arm
from photochat_jax.config import ConfigError, RunConfig

BASE = "before_joint"
CAPTIONS = "captions"
Execute = Callable[[Sequence[str], epath.Path], int]


class Job(NamedTuple):
  """One run.

  Attributes:
    seed: of everything.
    name: an arm, `before_<STAGE>` for what several share, or `CAPTIONS`.
    workdir: its folder.
    command: the program.
  """

  seed: int
  name: str
  workdir: epath.Path
  command: tuple[str, ...]

  @property
  def result(self) -> epath.Path:
    """The file that is there when it is done."""
    if self.name == CAPTIONS:
      return self.workdir / "done"
    return self.workdir / "eval" / "metrics.json"


class RunFailed(ValueError):
  """A run ended with an error; the message says where its words are."""


def plan(
  config: str,
  run: RunConfig,
  arms: Sequence[Arm],
  seeds: Sequence[int],
  out: epath.PathLike,
  extra: Sequence[str] = (),
  captioner: str = "tools/caption_photos.py",
) -> list[Job]:
  """The runs in their order: what a seed's arms share, then its arms.

  Args:
    config: the file, with its argument.
    run: what it says.
    arms: to train.
    seeds: to train them with.
    out: the folder of all.
    extra: more of the command line, for all runs: --config.FIELD=VALUE.
    captioner: the file of the program that captions photos.

  Raises:
    ConfigError: the config has no stage with which an arm begins.
  """
  names = [stage.name for stage in run.stages]
  for arm in arms:
    if arm.since not in names:
      raise ConfigError(
        f"The arm {arm.name} needs a stage called {arm.since}; {config} has "
        f"{', '.join(names)}."
      )
  captioners = {arm.since for arm in arms if arm.captioned}
  if captioners and run.data.source != "synthetic" and len(seeds) > 1:
    raise ConfigError(
      "Each seed's captioner writes captions into the data set's folder, so "
      "arms that read them need one seed at a time."
    )
  cuts = sorted({names.index(arm.since) for arm in arms} - {0})
  jobs = []
  for seed in seeds:
    folder = epath.Path(out) / f"seed{seed}"
    given = (f"--config={config}", f"--config.seed={seed}", *extra)

    def job(name, start, end, changes, folder=folder, given=given, seed=seed):
      """A run of the stages from `start` to `end`."""
      workdir = folder / name
      changes = {"stage_order": _tuple(names[start:end]), **changes}
      if start:
        changes["pretrained.run"] = str(folder / f"before_{names[start]}")
      fields = (f"--config.{field}={v}" for field, v in changes.items())
      return Job(
        seed,
        name,
        workdir,
        (
          *(sys.executable, "-m", "photochat_jax.main"),
          *(f"--workdir={workdir}", *given, *fields),
        ),
      )

    jobs += [
      job(f"before_{names[end]}", start, end, {})
      for start, end in zip([0, *cuts], cuts, strict=False)
    ]
    data = run.data.path
    if captioners:
      (since,) = captioners
      writer = folder / f"before_{since}"
      data = data or str(writer / "data")
      source = run.data.source
      command = (
        *(sys.executable, captioner, f"--path={data}", f"--workdir={writer}"),
        f"--dataset={'photochat' if source == 'synthetic' else source}",
      )
      jobs.append(Job(seed, CAPTIONS, folder / CAPTIONS, command))
    for arm in arms:
      changes = dict(arm.changes)
      if arm.captioned:
        changes |= {
          "data.path": data,
          "pretrained.captioner": str(folder / f"before_{arm.since}"),
        }
      start = names.index(arm.since)
      jobs.append(job(arm.name, start, len(names), changes))
  return jobs


def run_all(
  jobs: Sequence[Job],
  tell: Callable[[Job, int, bool], None] = lambda *_: None,
  execute: Execute | None = None,
  parallel: int = 1,
) -> None:
  """Makes the runs that are not done yet, those of a seed in their order.

  Args:
    jobs: from `plan`.
    tell: called with each job, its number, and whether it was done before.
    execute: (command, file for what it says) -> exit status.
    parallel: seeds that are worked on at a time.

  Raises:
    RunFailed: a run ended with an error; what is done is kept, and what was
      under way is ended first.
  """
  lanes: dict[epath.Path, list[tuple[int, Job]]] = {}
  for number, job in enumerate(jobs):
    lanes.setdefault(job.workdir.parent, []).append((number, job))
  failed, one_at_a_time = threading.Event(), threading.Lock()

  def work(lane):
    for number, job in lane:
      if failed.is_set():
        return
      done = job.result.exists()
      with one_at_a_time:
        tell(job, number, done)
      try:
        if not done:
          _run(job, execute or _execute)
      except BaseException:
        failed.set()
        raise

  with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
    for future in [pool.submit(work, lane) for lane in lanes.values()]:
      future.result()


def _run(job: Job, execute: Execute) -> None:
  job.workdir.mkdir(parents=True, exist_ok=True)
  log = job.workdir / "log.txt"
  status = execute(job.command, log)
  if job.name == CAPTIONS and not status:
    job.result.touch()
  if status or not job.result.exists():
    raise RunFailed(
      f"{shlex.join(job.command)} ended with {status}; {log} says why. The "
      "same command of yours goes on from here."
    )


def read(
  jobs: Sequence[Job],
) -> dict[tuple[str, int], dict[str, Any]]:
  """What there is of results: (name, seed) -> what `metrics.json` holds."""
  return {
    (job.name, job.seed): json.loads(job.result.read_text())
    for job in jobs
    if job.name != CAPTIONS and job.result.exists()
  }


def _tuple(names: Sequence[str]) -> str:
  return f"({', '.join(map(repr, names))},)"


def _execute(command: Sequence[str], log: epath.Path) -> int:
  with open(log, "a") as file:
    return subprocess.run(
      command, stdout=file, stderr=subprocess.STDOUT, check=False
    ).returncode
