"""The runs of an ablation: a base for each seed, and every arm from it.

  OUT/seed<N>/base            the stages before the joint one, trained once
  OUT/seed<N>/<arm>           the joint stage from the base's weights, measured
  OUT/seed<N>/<arm>/log.txt   what the run said

A run is a program of its own (`photochat_jax.main`), so it can be killed and
goes on; what is done is not done again.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath

from photochat_jax.ablation.arms import Arm
from photochat_jax.config import ConfigError, RunConfig

BASE = "base"
Execute = Callable[[Sequence[str], epath.Path], int]


class Job(NamedTuple):
  """One run.

  Attributes:
    seed: of everything.
    arm: its name, `BASE` for what all share.
    workdir: its folder.
    command: the program.
  """

  seed: int
  arm: str
  workdir: epath.Path
  command: tuple[str, ...]

  @property
  def result(self) -> epath.Path:
    """The file that is there when it is done."""
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
) -> list[Job]:
  """The runs in their order: a seed's base, then its arms.

  Args:
    config: the file, with its argument.
    run: what it says.
    arms: to train.
    seeds: to train them with.
    out: the folder of all.
    extra: more of the command line, for all runs: --config.FIELD=VALUE.

  Raises:
    ConfigError: the config has no joint stage behind others.
  """
  names = [stage.name for stage in run.stages]
  if names[-1] != "joint" or len(names) < 2:
    raise ConfigError(
      f"An ablation needs stages that all arms share and a last one called "
      f"joint; {config} has {', '.join(names)}."
    )
  jobs = []
  for seed in seeds:
    folder = epath.Path(out) / f"seed{seed}"
    given = [f"--config={config}", f"--config.seed={seed}", *extra]

    def job(name, changes, folder=folder, given=given, seed=seed):
      workdir = folder / name
      return Job(
        seed,
        name,
        workdir,
        (
          *(sys.executable, "-m", "photochat_jax.main"),
          *(f"--workdir={workdir}", *given),
          *(f"--config.{field}={value}" for field, value in changes.items()),
        ),
      )

    base = job(BASE, {"stage_order": _tuple(names[:-1])})
    jobs.append(base)
    begin = {
      "stage_order": _tuple(names[-1:]),
      "pretrained.run": str(base.workdir),
    }
    jobs += [job(arm.name, {**begin, **arm.changes}) for arm in arms]
  return jobs


def run_all(
  jobs: Sequence[Job],
  tell: Callable[[Job, int, bool], None] = lambda *_: None,
  execute: Execute | None = None,
) -> None:
  """Makes the runs that are not done yet.

  Args:
    jobs: from `plan`.
    tell: called with each job, its number, and whether it was done before.
    execute: (command, file for what it says) -> exit status.

  Raises:
    RunFailed: a run ended with an error; those before it are done.
  """
  for number, job in enumerate(jobs):
    done = job.result.exists()
    tell(job, number, done)
    if not done:
      job.workdir.mkdir(parents=True, exist_ok=True)
      log = job.workdir / "log.txt"
      status = (execute or _execute)(job.command, log)
      if status or not job.result.exists():
        raise RunFailed(
          f"{shlex.join(job.command)} ended with {status}; {log} says why. The "
          "same command of yours goes on from here."
        )


def read(
  jobs: Sequence[Job],
) -> dict[tuple[str, int], dict[str, Any]]:
  """What there is of results: (arm, seed) -> what its `metrics.json` holds."""
  return {
    (job.arm, job.seed): json.loads(job.result.read_text())
    for job in jobs
    if job.result.exists()
  }


def _tuple(names: Sequence[str]) -> str:
  return f"({', '.join(map(repr, names))},)"


def _execute(command: Sequence[str], log: epath.Path) -> int:
  with open(log, "a") as file:
    return subprocess.run(
      command, stdout=file, stderr=subprocess.STDOUT, check=False
    ).returncode
