"""Measures a model on dialogues: every figure, with what chance scores.

The model plays user 0, the one who shares photos in PhotoChat, or each of the
two in turn (`eval.speakers`), and every prompt is the data's own talk up to the
turn in question:

  perplexity        of the text of its turns and their ends, captions and
                    visual slots left out, given the data before it
  photo_*           one decision per merged turn of its side, photo-less
                    dialogues included: yes is a reply that opens a photo block.
                    The average precision is over all thresholds on the
                    probability of `[img]` (`thresholds` has each of them)
  bleu_..., rouge_l the reply's words up to its photo against the data's up to
                    theirs, in percent; turns without such words are left out.
                    Two definitions of BLEU, see `metrics.words`
  distinct_*        of all replies together, in percent
  caption_...       likewise, captions where the data share a photo; one that
                    was not shared is an empty one
  attribute_...     the first photo of each of those turns against the photo
                    drawn from the model's own caption; not shared is wrong
  pixel_accuracy    questions about what only the pixels show, the photo in the
                    context; here the model plays whoever answers

What data do not tell (scenes' attributes, questions), or needs a library that
is not there, is None, with a reason. What is sampled, words or noise, is keyed
by the seed, the dialogue's id and the turn: it depends on nothing beside it.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from photochat_jax import (
  answering,
  chat,
  generate,
  judges,
  losses,
  objective,
  said,
  scores,
)
from photochat_jax.data import dialogue as dialogue_lib
from photochat_jax.data import images, schema
from photochat_jax.data.spec import LeftOut
from photochat_jax.decoding_options import Options
from photochat_jax.metrics import intent, text
from photochat_jax.metrics.figures import Figures
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.transcript import Transcript


@dataclasses.dataclass
class Found:
  """All that was measured.

  Attributes:
    figures: by name; `attribute_accuracy` is a dict of figures.
    thresholds: rows of a threshold on the probability of `[img]` and the
      `IntentCounts` that it gives, the highest first.
    counts: how much it was measured on.
    dialogues: what it was measured on, unreadable photos as missing ones.
    turns: every merged turn of the model's side.
    answers: every question.
  """

  figures: Figures
  thresholds: list[tuple[float, intent.IntentCounts]]
  counts: dict[str, int]
  dialogues: list[schema.Dialogue]
  turns: list[said.ModelTurn]
  answers: list[said.Answer]


def assess(
  generator: generate.Generator,
  dialogues: Sequence[schema.Dialogue],
  seed: int = 0,
  clip: judges.CLIPJudge | None = None,
  inception: judges.InceptionJudge | None = None,
  transcript: Transcript | None = None,
) -> Found:
  """Measures a model on dialogues.

  Args:
    generator: the model; its settings say how it decodes and whose turns it
      says.
    dialogues: of one split.
    seed: of the photos' noise, and of sampled words.
    clip: scores photos and turns, if it is there.
    inception: scores photos, if it is there.
    transcript: has what was written and drawn before, and gets the rest.
  """
  transcript = Transcript() if transcript is None else transcript
  settings = generator.settings
  sides = said.sides(settings.speakers)
  counts = collections.Counter(dialogues=len(dialogues))
  dialogues = [_with_sound_photos(generator, d, counts) for d in dialogues]
  figures = Figures()

  loss = text_loss(generator, dialogues, sides)
  counts["text_tokens"] = loss.tokens
  perplexity, why = loss.perplexity, "its side says nothing in these dialogues"
  if perplexity is not None and not math.isfinite(perplexity):
    # JSON has no such numbers.
    perplexity, why = None, f"it is {perplexity}: training has diverged"
  figures.add(
    "perplexity",
    perplexity,
    loss.tokens,
    text.chance_perplexity(generator.model.config.language.vocab_size),
    why,
  )

  answering.respond(
    generator,
    dialogues,
    [*said.model_turns(dialogues, sides), *said.questions(dialogues)],
    counts,
    Options.of(settings, seed),
    transcript,
  )
  answering.draw(
    generator,
    dialogues,
    said.read(dialogues, sides, transcript).turns,
    seed,
    transcript,
    everywhere=clip is not None,
  )
  turns, answers = said.read(dialogues, sides, transcript)
  table, thresholds = scores.add_intent(figures, turns)
  counts |= {"model_turns": table.total, "questions": len(answers)}
  counts["photo_turns"] = table.true_yes + table.false_no
  scores.add_words(figures, turns)
  scores.add_clip(figures, turns, clip)
  scores.add_inception(figures, turns, inception)
  scores.add_synthetic(figures, turns, answers)
  return Found(figures, thresholds, dict(counts), dialogues, turns, answers)


def text_loss(
  generator: generate.Generator,
  dialogues: Sequence[schema.Dialogue],
  sides: Sequence[int] = (chat.MODEL,),
) -> text.TokenLoss:
  """The loss of what these sides say, given the data before each token."""
  # Whatever it was trained on, what it says itself is measured.
  spec = dataclasses.replace(generator.spec, text_on="model")
  tokenizer = generator.tokenizer
  examples = []
  for dialogue, side in itertools.product(dialogues, sides):
    try:
      examples.append(
        dialogue_lib.encode_example(dialogue.turns, side, tokenizer, spec)
      )
    except LeftOut as error:
      logging.info("Dialogue %s has no perplexity: %s", dialogue.id, error)
  total = text.TokenLoss()
  score = functools.partial(_score, generator.model, generator.params)
  for length, group in answering.by_length(examples, spec.length):
    for chunk in answering.chunks(
      [examples[i] for i in group], generator.settings.batch_size
    ):
      batch = dialogue_lib.left_pad(
        chunk, length, tokenizer, spec, generator.see
      )
      kinds = np.zeros_like(batch["tokens"])
      for row, example in enumerate(chunk):
        kinds[row, length - len(example.tokens) :] = example.loss_kind
      spare = generator.settings.batch_size - len(chunk)
      batch = {
        name: np.pad(a, [(0, spare)] + [(0, 0)] * (a.ndim - 1))
        for name, a in (batch | {"loss_kind": kinds}).items()
      }
      nats, tokens = generator.run(score, batch)
      total += text.TokenLoss(float(nats), int(tokens))
  return total


@functools.partial(jax.jit, static_argnames="model")
def _score(
  model: PhotoChat, params: Any, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Summed loss of a batch's text tokens, and how many they are."""
  _, sums = losses.next_token(
    lambda h: model.logits(params, h),
    objective.converse(model, params, batch),
    batch["tokens"],
    batch["loss_kind"],
    {losses.TEXT: 1.0, losses.CAPTION: 0.0},
    losses.count_tokens(batch["loss_kind"]),
  )
  return sums["text_nats"], sums["text_tokens"]


def _with_sound_photos(generator, dialogue, counts):
  """The dialogue with photos whose files cannot be read as missing ones."""

  def check(turn):
    if turn.photo is None or turn.photo.path is None:
      return turn
    try:
      generator.see(turn.photo)
    except images.ImageError as error:
      logging.warning("%s", error)
      counts["photos_unreadable"] += 1
      photo = dataclasses.replace(turn.photo, path=None)
      return dataclasses.replace(turn, photo=photo)
    return turn

  return dataclasses.replace(dialogue, turns=tuple(map(check, dialogue.turns)))
