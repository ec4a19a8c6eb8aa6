"""What reports show: whole dialogues, the data's turns and models' own."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from photochat_jax import chat
from photochat_jax.data import dialogue as dialogue_lib
from photochat_jax.data import images
from photochat_jax.metrics import report

# Dialogues on the page.
MAX_DIALOGUES = 24


def page(
  found: Any,
  metrics: Mapping[str, Any],
  rows: Sequence[report.Figure],
  photo_size: int,
) -> str:
  """The report of a run as HTML.

  Args:
    found: what was measured, `assess.Found`.
    metrics: all of `metrics.json`.
    rows: the table.
    photo_size: side in pixels at which the data's photos are shown.
  """
  examples = [
    example(found.dialogues[number], number, {"": found}, photo_size)
    for number in range(min(len(found.dialogues), MAX_DIALOGUES))
  ]
  details = {
    "split": f"{metrics['split']}, {len(found.dialogues)} dialogues",
    "step": metrics["step"],
    "seed": metrics["seed"],
    "seconds": metrics["seconds"],
    "counts": _listed(metrics["counts"]),
    "versions": _listed(metrics["versions"]),
    "git commit": metrics["git_commit"] or "unknown",
    "config": metrics["config"],
  }
  return report.render(
    "Photo-sharing dialogue: evaluation", rows, examples, details
  )


def example(
  dialogue: Any,
  number: int,
  models: Mapping[str, Any],
  photo_size: int,
) -> report.Example:
  """One dialogue as bubbles, with what models said at each turn.

  Args:
    dialogue: the data's.
    number: of it, among the dialogues measured.
    models: name, '' where there is but one -> what has its `turns` and
      `answers`, as `said.Said`.
    photo_size: side in pixels at which the data's photos are shown.
  """
  turns = {
    name: {t.spoken.start: t for t in said.turns if t.number == number}
    for name, said in models.items()
  }
  answers = {
    name: {a.turn: a for a in said.answers if a.number == number}
    for name, said in models.items()
  }
  bubbles = []
  for spoken in dialogue_lib.merge_turns(dialogue.turns):
    here = {
      name: of[spoken.start] for name, of in turns.items() if spoken.start in of
    }
    parts: list[Any] = []
    for part in spoken.parts:
      if isinstance(part, str):
        parts.append(part)
        continue
      pictures = [_picture(part, dialogue.facts, photo_size)]
      pictures += [
        _drawn(turn, name)
        for name, turn in here.items()
        if part is turn.gold
      ]
      parts.append(tuple(pictures))
    said = [
      _said(
        name,
        here.get(name),
        [a for i, a in of.items() if spoken.start <= i < spoken.stop],
      )
      for name, of in answers.items()
    ]
    bubbles.append(
      report.Bubble(
        spoken.speaker == chat.MODEL,
        tuple(parts),
        tuple(one for one in said if one is not None),
      )
    )
  return report.Example(f"Dialogue {dialogue.id}", tuple(bubbles))


def _said(name, turn, answers) -> report.Said | None:
  """A model's words at a turn with their verdicts; None if it was not asked."""
  if turn is None and not answers:
    return None
  text, marks = answers[0].reply if answers else "", []
  if turn is not None:
    text, shares = turn.reply.text, turn.reply.caption is not None
    if turn.gold or shares:
      words = "shares a photo" if shares else "shares no photo"
      marks.append(report.Mark(words, shares == bool(turn.gold)))
    if shares and not turn.gold:
      text = f"{text} [{turn.reply.caption}]"
  marks += [report.Mark(f"{a.attribute}: {a.answer}", a.right) for a in answers]
  return report.Said(text, tuple(marks), name)


def _listed(values: Mapping[str, Any]) -> str:
  return ", ".join(f"{name} {value}" for name, value in values.items())


def _picture(photo, facts, size) -> report.Picture:
  """A photo of the data."""
  scene = (facts or {}).get("photos", {}).get(photo.id, {})
  marks = [report.Mark(v) for v in scene.get("attributes", {}).values()]
  pixels = None
  if photo.path is not None:
    with contextlib.suppress(images.ImageError):  # An empty frame.
      pixels = images.load_photo(photo.path, size)
  words = photo.caption or photo.description
  return report.Picture("in the data", pixels, words, tuple(marks))


def _drawn(turn, name) -> report.Picture:
  """What a model shared where the data share a photo."""
  marks = [
    report.Mark(value, value == turn.scene.get(key))
    for key, value in (turn.seen or {}).items()
  ]
  return report.Picture(
    name or "by the model", turn.drawn, turn.reply.caption or "", tuple(marks)
  )
