"""What the evaluation's report shows: whole dialogues, the data's and drawn."""

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
  """The report as HTML.

  Args:
    found: what was measured, `assess.Found`.
    metrics: all of `metrics.json`.
    rows: the table.
    photo_size: side in pixels at which the data's photos are shown.
  """
  examples = [
    example(found, number, photo_size)
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


def example(found: Any, number: int, photo_size: int) -> report.Example:
  """One dialogue as bubbles, with what the model said at each turn."""
  dialogue = found.dialogues[number]
  turns = {t.spoken.start: t for t in found.turns if t.number == number}
  answers = {a.turn: a for a in found.answers if a.number == number}
  bubbles = []
  for spoken in dialogue_lib.merge_turns(dialogue.turns):
    turn = turns.get(spoken.start)
    parts, reply, marks = [], None, []
    for part in spoken.parts:
      if isinstance(part, str):
        parts.append(part)
        continue
      pictures = [_picture(part, dialogue.facts, photo_size)]
      if turn is not None and part is turn.gold:
        pictures.append(_drawn(turn))
      parts.append(tuple(pictures))
    if turn is not None:
      reply = turn.reply.text
      shares = turn.reply.caption is not None
      if turn.gold or shares:
        words = "shares a photo" if shares else "shares no photo"
        marks.append(report.Mark(words, shares == bool(turn.gold)))
      if shares and not turn.gold:
        reply = f"{reply} [{turn.reply.caption}]"
    for index in range(spoken.start, spoken.stop):
      if index in answers:
        answer = answers[index]
        reply = answer.reply if reply is None else reply
        marks.append(
          report.Mark(f"{answer.attribute}: {answer.answer}", answer.right)
        )
    bubbles.append(
      report.Bubble(
        spoken.speaker == chat.MODEL, tuple(parts), reply, tuple(marks)
      )
    )
  return report.Example(f"Dialogue {dialogue.id}", tuple(bubbles))


def _listed(values: Mapping[str, Any]) -> str:
  return ", ".join(f"{name} {value}" for name, value in values.items())


def _picture(photo, facts, size) -> report.Picture:
  """A photo of the data."""
  scene = (facts or {}).get("photos", {}).get(photo.id, {})
  marks = [report.Mark(v) for v in scene.get("attributes", {}).values()]
  pixels = None
  if photo.path is not None:
    pixels = images.load_photo(photo.path, size)
  words = photo.caption or photo.description
  return report.Picture("in the data", pixels, words, tuple(marks))


def _drawn(turn) -> report.Picture:
  """What the model shared where the data share a photo."""
  marks = [
    report.Mark(value, value == turn.scene.get(name))
    for name, value in (turn.seen or {}).items()
  ]
  return report.Picture(
    "by the model", turn.drawn, turn.reply.caption or "", tuple(marks)
  )
