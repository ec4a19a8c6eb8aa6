r"""Trains the same model in several ways and says what it makes.

  python tools/run_ablation.py --config=configs/tiny.py --arms=core --seeds=5 \
    --out=runs/ablation

What arms have in common is trained once for a seed: for most of them all stages
but the joint one. What is done is kept: the same command goes on, with more
seeds or arms too. Fields of the config are changed as for
training, --config.data.told_share=0.05. Writes, after every arm:

  OUT/table.md     means over the seeds with 95 % intervals, and the differences
                   to the arm `none`
  OUT/figures.png  the same as a picture, a dot for each seed
  OUT/report.html  the first seed's arms side by side, dialogue by dialogue

With --sweep=data.told_share=0,0.05,0.25,0.5 all of that is made for each value,
in OUT/data.told_share=0.05 and so on; in the end OUT/sweep.md and sweep.png lay
the values side by side.

--dry-run prints the commands.
"""

import pathlib
import shlex
import sys
import time

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from photochat_jax import compare
from photochat_jax import config as config_lib
from photochat_jax.ablation import arms as arms_lib
from photochat_jax.ablation import plot, runs, table

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
_ARMS = flags.DEFINE_list(
  "arms", ["core"], f"core, all, or of {', '.join(arms_lib.ARMS)}."
)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds 0, 1, ...", lower_bound=1)
_OUT = flags.DEFINE_string("out", "runs/ablation", "Folder of all runs.")
_SWEEP = flags.DEFINE_string(
  "sweep", None, "FIELD=NUMBER,NUMBER,...: all of it for each value."
)
_PARALLEL = flags.DEFINE_integer(
  "parallel", 1, "Seeds worked on at a time.", lower_bound=1
)
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "Only print the commands.")


def main(argv: list[str]) -> None:
  """Plans, runs, and writes the tables."""
  del argv
  logging.set_verbosity(logging.WARNING)  # Libraries tell much.
  given = [a for a in sys.argv[1:] if a.startswith("--config")]
  files = [a for a in given if a.startswith("--config=")]
  try:
    if len(files) != 1:
      raise ValueError("Give --config=FILE, one of configs/.")
    arms, folders = arms_lib.choose(_ARMS.value), _folders()
    run = config_lib.build(_CONFIG.value)
    what = {runs.BASE: "before the joint stage"}
    what |= {arm.name: arm.what for arm in arms}
    jobs = {
      folder: runs.plan(
        files[0].partition("=")[2],
        run,
        arms,
        range(_SEEDS.value),
        folder,
        [*(a for a in given if a not in files), *extra],
        str(pathlib.Path(__file__).with_name("caption_photos.py")),
      )
      for folder, extra in folders.items()
    }
    every = [job for some in jobs.values() for job in some]
    if _DRY_RUN.value:
      print(*(shlex.join(job.command) for job in every), sep="\n")
      return
    started, before = time.monotonic(), _count_done(every)

    def tell(job, number, done):
      if done:
        print(f"{number + 1}/{len(every)} {job.workdir} is done", flush=True)
        return
      left = ""
      now = _count_done(every)
      if now > before:
        each = (time.monotonic() - started) / (now - before)
        rest = each * (len(every) - now)
        left = f", about {rest / 60:.0f} minutes left"
      print(f"{number + 1}/{len(every)} {job.workdir}{left}", flush=True)
      folder = job.workdir.parent.parent
      _write_folder(folder, jobs[folder], what)

    runs.run_all(every, tell, parallel=_PARALLEL.value)
    print(_write(jobs, what))
  except ValueError as error:
    sys.stderr.write(f"run_ablation: {error}\n")
    sys.exit(2)


def _count_done(jobs) -> int:
  return sum(job.result.exists() for job in jobs)


def _folders() -> dict[epath.Path, list[str]]:
  """Folder -> what the runs in it have on their command line."""
  out = epath.Path(_OUT.value)
  if not _SWEEP.value:
    return {out: []}
  field, _, values = _SWEEP.value.partition("=")
  try:
    config_lib.check_path(field)
    numbers = [float(value) for value in values.split(",")]
  except ValueError as error:
    raise ValueError(
      f"--sweep={_SWEEP.value} must be FIELD=NUMBER,NUMBER,...: {error}"
    ) from error
  return {
    out / f"{field}={number:g}": [f"--config.{field}={number:g}"]
    for number in sorted(numbers)
  }


def _write(jobs, what) -> str:
  """Writes everything; returns the tables."""
  texts = [_write_folder(folder, some, what) for folder, some in jobs.items()]
  if not _SWEEP.value:
    return texts[0]
  field = _SWEEP.value.partition("=")[0]
  found = {
    folder.name.rpartition("=")[2]: runs.read(some)
    for folder, some in jobs.items()
  }
  text = table.markdown(table.sweep(found, what, field))
  (epath.Path(_OUT.value) / "sweep.md").write_text(text)
  picture = plot.draw_sweep(found, what, field)
  (epath.Path(_OUT.value) / "sweep.png").write_bytes(picture)
  return text


def _write_folder(out, jobs, what) -> str:
  """Writes what there is so far of one value; returns the table."""
  results = runs.read(jobs)
  out.mkdir(parents=True, exist_ok=True)
  found = table.tables(results, what)
  text = table.markdown(found)
  (out / "table.md").write_text(text)
  done = [
    job for job in jobs if (job.name, job.seed) in results and job.name in what
  ]
  if done:
    (out / "figures.png").write_bytes(plot.draw(results, what))
    dialogues, evaluated = compare.read(
      {job.name: job.workdir for job in done if job.seed == done[0].seed}
    )
    page = compare.page("Arms side by side", found, dialogues, evaluated)
    (out / "report.html").write_text(page)
  return text


if __name__ == "__main__":
  app.run(main)
