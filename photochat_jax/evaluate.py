"""A split in, a table and a report out; `assess` says what is measured."""

import json
import time
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.table
from etils import epath

from photochat_jax import generate, inputs, judges, record, showcase
from photochat_jax.assess import assess
from photochat_jax.config import ConfigError, RunConfig
from photochat_jax.data import schema, synthetic
from photochat_jax.metrics import report
from photochat_jax.metrics.figures import Figures
from photochat_jax.runtime import cluster
from photochat_jax.transcript import Transcript

_REMARKS = {
  "captioned": "captioned",
  "told": "told",
  "unsaid": "unsaid: a guess",
}


def evaluate(
  run: RunConfig,
  workdir: epath.PathLike,
  started: float | None = None,
  folder: str = "eval",
) -> dict[str, Any]:
  """Measures the newest checkpoint; prints a table and writes what it found.

  Several processes measure together, and process 0 prints and writes. Stopped
  at any moment, it goes on where it was.

  Args:
    run: the run's settings.
    workdir: its folder.
    started: `time.time()` at the start of the job that `seconds` measures;
      now by default.
    folder: of the workdir, where `metrics.json`, `report.html` and the
      `transcript` go.

  Returns:
    What `metrics.json` holds.

  Raises:
    CheckpointError: there is no checkpoint, or it is of another config.
    WeightsError: `eval.clip` or `eval.inception` cannot be used.
    ConfigError: there is no such split.
  """
  started = time.time() if started is None else started
  generator, step = generate.open_generator(run, workdir)
  try:
    dialogues, _ = inputs.read_split(run, workdir, run.eval.split)
  except ValueError as error:
    raise ConfigError(
      f"{error} Or choose another with --config.eval.split."
    ) from error
  dialogues = dialogues[: run.eval.max_dialogues or None]
  place = epath.Path(workdir) / folder
  made_of = {
    "config": run.as_dict(),
    "git_commit": record.commit(),
    "weights": record.weights_digest(run, workdir, step),
    "data": schema.digest(dialogues),
    "captions_read": schema.captions_digest(dialogues),
  }
  transcript = Transcript(place, made_of)
  found = assess(
    generator,
    dialogues,
    run.seed,
    judges.CLIPJudge(run.eval.clip) if run.eval.clip else None,
    judges.InceptionJudge(run.eval.inception) if run.eval.inception else None,
    transcript,
  )
  figures = found.figures
  metrics = {
    **figures.metrics,
    "seconds": round(time.time() - started, 1),
    "chance": figures.chance,
    "reasons": figures.reasons,
    "sizes": figures.sizes,
    "thresholds": [
      {
        "threshold": threshold,
        "precision": counts.precision,
        "recall": counts.recall,
        "f1": counts.f1,
      }
      for threshold, counts in found.thresholds
    ],
    "counts": found.counts,
    "split": run.eval.split,
    "step": step,
    **made_of,
    "seed": run.seed,
    "versions": record.versions(),
    "devices": record.devices(),
  }
  if cluster.is_first():
    rows = rows_of(figures)
    _print(rows, run.eval.split, found.counts["dialogues"])
    (place / "metrics.json").write_text(
      json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    )
    size = generator.model.photo_shape[0]
    html = showcase.page(found, metrics, rows, size)
    (place / "report.html").write_text(html)
    print(f"Report: {place / 'report.html'}")
  transcript.finish()
  return metrics


def rows_of(figures: Figures) -> list[report.Figure]:
  """The table's rows."""
  rows = []
  for name, value in figures.metrics.items():
    note = figures.reasons.get(name, "")
    chance, size = figures.chance[name], figures.sizes[name]
    if not isinstance(value, dict):
      rows.append(report.Figure(name, value, chance, size, note))
      continue
    for part, share in value.items():
      note = _REMARKS.get(synthetic.KIND.get(part), "")
      rows.append(
        report.Figure(f"{name}/{part}", share, chance[part], size, note)
      )
  return rows


def _print(rows: Sequence[report.Figure], split: str, dialogues: int) -> None:
  table = rich.table.Table(title=f"{dialogues} dialogues of {split}")
  table.add_column("metric")
  for column in ("value", "chance", "of"):
    table.add_column(column, justify="right")
  table.add_column("remark", style="dim")
  absent: dict[str, list[str]] = {}
  for row in rows:
    if row.value is None:
      absent.setdefault(row.note, []).append(row.name)
      continue
    table.add_row(
      row.name,
      report.number(row.value),
      report.number(row.chance),
      f"{row.size:,}",
      row.note,
    )
  console = rich.console.Console()
  console.print(table)
  for reason, names in absent.items():
    line = f"{', '.join(names)}: {reason}"
    console.print(line, markup=False, style="dim", soft_wrap=True)
