"""What a model said of dialogues, beside what the data say there."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from photochat_jax import chat, generate
from photochat_jax.data import dialogue as dialogue_lib
from photochat_jax.data import schema, synthetic
from photochat_jax.metrics import image as image_metrics
from photochat_jax.transcript import Prompt, Transcript


@dataclasses.dataclass
class ModelTurn:
  """A merged turn of the model's side.

  Attributes:
    prompt: what it answers.
    spoken: the turn in the data.
    gold: the first photo the data share in it, or None.
    reply: what the model wrote.
    drawn: uint8[H, W, 3] from the reply's caption, or None.
    scene: the attributes of `gold`, or None where the data do not say.
    seen: the attributes measured in `drawn`, or None.
  """

  prompt: Prompt
  spoken: dialogue_lib.Spoken
  gold: schema.Photo | None
  reply: generate.Reply
  drawn: np.ndarray | None = None
  scene: Mapping[str, str] | None = None
  seen: Mapping[str, str] | None = None

  @property
  def number(self) -> int:
    """Of its dialogue."""
    return self.prompt.number


class Answer(NamedTuple):
  """A question about a photo, answered by the model.

  Attributes:
    number: of its dialogue.
    turn: index of the answering turn.
    attribute: what is asked for.
    answer: the right value.
    reply: the model's words.
  """

  number: int
  turn: int
  attribute: str
  answer: str
  reply: str

  @property
  def right(self) -> bool:
    values = synthetic.ATTRIBUTES[self.attribute]
    return image_metrics.answers(self.reply, self.answer, values)


class Said(NamedTuple):
  """What a model said.

  Attributes:
    turns: every merged turn of its side.
    answers: every question.
  """

  turns: list[ModelTurn]
  answers: list[Answer]


def sides(speakers: str) -> tuple[int, ...]:
  """The sides that the model plays where `eval.speakers` says so."""
  return (0, 1) if speakers == "both" else (chat.MODEL,)


def read(
  dialogues: Sequence[schema.Dialogue],
  sides: Sequence[int],
  transcript: Transcript,
) -> Said:
  """What a transcript holds of dialogues, beside what the data say.

  Args:
    dialogues: those that were answered.
    sides: those that the model plays.
    transcript: the replies, and the photos drawn so far.
  """
  replies, scenes = transcript.replies, _scenes(dialogues)
  turns = [
    ModelTurn(prompt, spoken, first_photo(spoken), replies[prompt])
    for prompt, spoken in model_turns(dialogues, sides).items()
    if prompt in replies
  ]
  for turn in turns:
    turn.drawn = transcript.photos.get(turn.prompt)
    turn.scene = scenes[turn.number].get(turn.gold.id) if turn.gold else None
    if turn.scene and turn.drawn is not None:
      turn.seen = synthetic.measure(turn.drawn)
  answers = [
    Answer(
      prompt.number, prompt.upto, asked["attribute"], asked["answer"],
      replies[prompt].text,
    )
    for prompt, asked in questions(dialogues).items()
    if prompt in replies
  ]  # fmt: skip
  return Said(turns, answers)


def model_turns(
  dialogues: Sequence[schema.Dialogue], sides: Sequence[int]
) -> dict[Prompt, dialogue_lib.Spoken]:
  """The merged turns of these sides, by the prompts that lead to them."""
  return {
    Prompt(number, spoken.speaker, spoken.start): spoken
    for number, dialogue in enumerate(dialogues)
    for spoken in dialogue_lib.merge_turns(dialogue.turns)
    if spoken.speaker in sides
  }


def questions(
  dialogues: Sequence[schema.Dialogue],
) -> dict[Prompt, Mapping[str, Any]]:
  """Those only pixels answer, where the photo's file is there."""
  found = {}
  for number, dialogue in enumerate(dialogues):
    seen = {t.photo.id for t in dialogue.turns if t.photo and t.photo.path}
    for asked in (dialogue.facts or {}).get("questions", ()):
      if asked["kind"] == "unsaid" and asked["photo_id"] in seen:
        side = dialogue.turns[asked["turn"]].speaker
        found[Prompt(number, side, asked["turn"])] = asked
  return found


def _scenes(dialogues) -> list[dict[str, Mapping[str, str]]]:
  """Of each dialogue: photo id -> its attributes."""
  return [
    {
      photo_id: facts["attributes"]
      for photo_id, facts in (d.facts or {}).get("photos", {}).items()
    }
    for d in dialogues
  ]


def first_photo(spoken: dialogue_lib.Spoken) -> schema.Photo | None:
  """The first photo of a turn."""
  photos = (p for p in spoken.parts if isinstance(p, schema.Photo))
  return next(photos, None)
