"""Several runs' evaluations on one page, dialogue by dialogue."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from photochat_jax import (
  inputs,
  record,
  scores,
  showcase,
  transcript,
)
from photochat_jax import said as said_lib
from photochat_jax.data import schema, synthetic
from photochat_jax.metrics import comparison, report, words

MAX_DIALOGUES = 80
PHOTO_SIZE = 256
"""Longest side in pixels of a photo on the page."""

SCORES = {
  "photo": "the share of a photo's details, captioned and told, that the photo "
  "drawn has",
  "told": "whether it has those that were only told",
  "answers": "the share of questions about photos that are answered right",
  "caption": "ROUGE-L of the caption against the data's",
  "sharing": "the share of turns at which a photo is shared just where data"
  " share one",
  "words": "ROUGE-L of the words against the data's",
}
"""Of a dialogue; a photo that is not shared has nothing right."""


class Evaluated(NamedTuple):
  """A run that has been evaluated.

  Attributes:
    metrics: its `metrics.json`.
    said: what it said, beside the data.
  """

  metrics: Mapping[str, Any]
  said: said_lib.Said


def read(
  workdirs: Mapping[str, epath.PathLike], folder: str = "eval"
) -> tuple[list[schema.Dialogue], dict[str, Evaluated]]:
  """Reads what runs said of the same dialogues.

  Args:
    workdirs: name -> a run's.
    folder: of each, where its evaluation is.

  Returns:
    The dialogues, and name -> run.

  Raises:
    ValueError: a run has not been evaluated, or on other dialogues.
  """
  dialogues, runs, first = None, {}, ""
  for name, workdir in workdirs.items():
    place = epath.Path(workdir) / folder
    kept = transcript.read(place)
    metrics = json.loads((place / "metrics.json").read_text())
    if dialogues is None:
      run, first = record.read(workdir), name
      dialogues, _ = inputs.read_split(run, workdir, metrics["split"])
      dialogues = dialogues[: metrics["counts"]["dialogues"]]
      digest = schema.digest(dialogues)
    if metrics["data"] != digest:
      raise ValueError(
        f"{workdir} was not evaluated on the dialogues of {workdirs[first]} as "
        "they are now; evaluate both with the same data and split."
      )
    sides = said_lib.sides(metrics["config"]["eval"]["speakers"])
    runs[name] = Evaluated(metrics, said_lib.read(dialogues, sides, kept))
  return dialogues, runs


def cases(
  dialogues: Sequence[schema.Dialogue],
  runs: Mapping[str, Evaluated],
  limit: int = MAX_DIALOGUES,
) -> tuple[list[comparison.Case], dict[str, str]]:
  """Dialogues for the page, those first where the runs did worst.

  Args:
    dialogues: from `read`.
    runs: from `read`.
    limit: most dialogues; of the others only scores were looked at.

  Returns:
    The dialogues, and what each score that the data allow is.
  """
  said = {
    name: _by_dialogue(run.said, len(dialogues)) for name, run in runs.items()
  }
  found = [
    {name: _scores(of[number]) for name, of in said.items()}
    for number in range(len(dialogues))
  ]
  told = {
    score: what
    for score, what in SCORES.items()
    if any(of[score] is not None for one in found for of in one.values())
  }
  found = [
    {score: {n: of[score] for n, of in one.items()} for score in told}
    for one in found
  ]
  size = _photo_size(runs)
  chosen = []
  for number in comparison.order(found, next(iter(told)))[:limit]:
    here = {name: of[number] for name, of in said.items()}
    example = showcase.example(dialogues[number], number, here, size)
    chosen.append(comparison.Case(example, found[number]))
  return chosen, told


def page(
  title: str,
  tables: Sequence[comparison.Table],
  dialogues: Sequence[schema.Dialogue],
  runs: Mapping[str, Evaluated],
  limit: int = MAX_DIALOGUES,
) -> str:
  """The page as HTML.

  Args:
    title: its heading.
    tables: of the runs.
    dialogues: from `read`.
    runs: from `read`.
    limit: most dialogues on it.
  """
  chosen, told = cases(dialogues, runs, limit)
  details = {
    name: ", ".join(
      f"{field} {run.metrics[field]}"
      for field in ("git_commit", "seed", "step", "weights", "devices")
    )
    for name, run in runs.items()
  }
  return comparison.render(
    title, tables, chosen, len(dialogues), told, details
  )


def figures_table(runs: Mapping[str, Evaluated]) -> comparison.Table:
  """Every figure that a run has, the runs in columns."""
  flat = {name: dict(_flat(run.metrics)) for name, run in runs.items()}
  names = dict.fromkeys(n for figures in flat.values() for n in figures)
  return comparison.Table(
    ["", *runs],
    [
      [name, *(report.number(figures.get(name)) for figures in flat.values())]
      for name in names
    ],
  )


def _flat(metrics):
  for name in metrics["sizes"]:
    value = metrics[name]
    if isinstance(value, dict):
      yield from ((f"{name}/{part}", share) for part, share in value.items())
    elif value is not None:
      yield name, value


def _by_dialogue(said: said_lib.Said, count: int) -> list[said_lib.Said]:
  """What a run said in each of `count` dialogues."""
  found = [said_lib.Said([], []) for _ in range(count)]
  for turn in said.turns:
    found[turn.number].turns.append(turn)
  for answer in said.answers:
    found[answer.number].answers.append(answer)
  return found


def _photo_size(runs) -> int:
  drawn = (t.drawn for run in runs.values() for t in run.said.turns)
  sizes = [len(pixels) for pixels in drawn if pixels is not None]
  return min([PHOTO_SIZE, *sizes])


def _scores(said: said_lib.Said) -> dict[str, float | None]:
  """The `SCORES` of one run in one dialogue."""
  turns, answers = said
  kinds = synthetic.KIND
  details = {"photo": ("captioned", "told"), "told": ("told",)}
  found = {
    score: _mean(
      (turn.seen or {}).get(name) == value
      for turn in turns
      for name, value in (turn.scene or {}).items()
      if kinds[name] in of
    )
    for score, of in details.items()
  }
  return found | {
    "answers": _mean(answer.right for answer in answers),
    "caption": _overlap(scores.captions(turns)),
    "sharing": _mean(
      bool(turn.gold) == (turn.reply.caption is not None) for turn in turns
    ),
    "words": _overlap(scores.said(turns)),
  }


def _overlap(pairs) -> float | None:
  if not pairs:
    return None
  try:
    return words.rouge_l(*zip(*pairs, strict=True)) / 100
  except words.NotInstalled:
    return None


def _mean(values) -> float | None:
  values = list(values)
  return sum(values) / len(values) if values else None
