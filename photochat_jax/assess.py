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
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from photochat_jax import chat, generate, judges, losses, objective, scores
from photochat_jax.data import bars, images, schema, synthetic
from photochat_jax.data import dialogue as dialogue_lib
from photochat_jax.data.spec import LeftOut
from photochat_jax.decoding_options import GREEDY, Options
from photochat_jax.metrics import image as image_metrics
from photochat_jax.metrics import intent, text
from photochat_jax.metrics.figures import Figures
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.runtime import cluster
from photochat_jax.transcript import Prompt, Transcript

# Prompt lengths are rounded up to it: fewer programs, little padding.
LENGTH_STEP = 64


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
  turns: list[ModelTurn]
  answers: list[Answer]


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
  sides = (0, 1) if settings.speakers == "both" else (chat.MODEL,)
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

  respond(
    generator,
    dialogues,
    [*_model_turns(dialogues, sides), *_questions(dialogues)],
    counts,
    Options.of(settings, seed),
    transcript,
  )
  draw(
    generator,
    dialogues,
    said_in(dialogues, sides, transcript).turns,
    seed,
    transcript,
    everywhere=clip is not None,
  )
  turns, answers = said_in(dialogues, sides, transcript)
  table, thresholds = scores.add_intent(figures, turns)
  counts |= {"model_turns": table.total, "questions": len(answers)}
  counts["photo_turns"] = table.true_yes + table.false_no
  scores.add_words(figures, turns)
  scores.add_clip(figures, turns, clip)
  scores.add_inception(figures, turns, inception)
  scores.add_synthetic(figures, turns, answers)
  return Found(figures, thresholds, dict(counts), dialogues, turns, answers)


def said_in(
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
    ModelTurn(prompt, spoken, _first_photo(spoken), replies[prompt])
    for prompt, spoken in _model_turns(dialogues, sides).items()
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
    for prompt, asked in _questions(dialogues).items()
    if prompt in replies
  ]  # fmt: skip
  return Said(turns, answers)


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
  for length, group in _by_length(examples, spec.length):
    for chunk in _chunks(
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


def respond(
  generator: generate.Generator,
  dialogues: Sequence[schema.Dialogue],
  prompts: Sequence[Prompt],
  counts: collections.Counter,
  options: Options = GREEDY,
  transcript: Transcript | None = None,
) -> dict[Prompt, generate.Reply]:
  """The model's reply to every prompt.

  Args:
    generator: the model.
    dialogues: that the prompts are of.
    prompts: to answer.
    counts: gets those left out.
    options: how to decode.
    transcript: has the replies that are there already, and gets the others.
  """
  transcript = Transcript() if transcript is None else transcript
  contexts = {}
  for prompt in dict.fromkeys(prompts):
    try:
      contexts[prompt] = dialogue_lib.encode_context(
        dialogues[prompt.number].turns,
        prompt.side,
        generator.tokenizer,
        generator.spec,
        upto=prompt.upto,
      )
    except LeftOut as error:
      counts[f"left_out/{error.reason}"] += 1
    else:
      counts["prompts_cut"] += contexts[prompt].cut_turns > 0
  names, contexts = list(contexts), list(contexts.values())
  with _bar("Writing", len(names)) as bar:
    for length, group in _by_length(contexts, generator.spec.length):
      # The same batches whenever it goes on, so the same replies to a bit.
      for chunk in _chunks(group, generator.settings.batch_size):
        asked = [names[i] for i in chunk]
        if not all(prompt in transcript.replies for prompt in asked):
          written = generator.respond(
            [contexts[i] for i in chunk],
            length,
            options,
            [_number(dialogues, prompt) for prompt in asked],
          )
          transcript.add_replies(dict(zip(asked, written, strict=True)))
        bar.advance(len(chunk))
  return {name: transcript.replies[name] for name in names}


def draw(
  generator: generate.Generator,
  dialogues: Sequence[schema.Dialogue],
  turns: Sequence[ModelTurn],
  seed: int,
  transcript: Transcript,
  everywhere: bool = False,
) -> None:
  """Draws the photos shared where the data share one, into the transcript.

  Args:
    generator: the model.
    dialogues: that the turns are of.
    turns: of the model's side.
    seed: of the noise.
    transcript: has the photos that are there already, and gets the others.
    everywhere: also where the data share none.
  """
  wanted = [t for t in turns if t.reply.caption and (t.gold or everywhere)]
  with _bar("Drawing", len(wanted)) as bar:
    for chunk in _chunks(wanted, generator.settings.batch_size):
      if not all(turn.prompt in transcript.photos for turn in chunk):
        photos = generator.draw(
          [turn.reply.caption for turn in chunk],
          [
            np.random.SeedSequence(
              (seed, _number(dialogues, turn.prompt))
            ).generate_state(1)[0]
            for turn in chunk
          ],
        )
        prompts = (turn.prompt for turn in chunk)
        transcript.add_photos(dict(zip(prompts, photos, strict=True)))
      bar.advance(len(chunk))


def _bar(what, total):
  return bars.Bar(what, total, shown=cluster.is_first() and sys.stdout.isatty())


def _number(dialogues, prompt: Prompt) -> int:
  """Keys what is sampled at a prompt."""
  return schema.number(f"{dialogues[prompt.number].id} {prompt.upto}")


def _by_length(contexts, limit):
  """(padded length, indices of contexts) pairs that cover all contexts."""

  def padded(index):
    steps = -(-len(contexts[index].tokens) // LENGTH_STEP)
    return min(steps * LENGTH_STEP, limit)

  order = sorted(range(len(contexts)), key=padded)
  for length, group in itertools.groupby(order, padded):
    yield length, list(group)


def _chunks(items, size):
  return [items[i : i + size] for i in range(0, len(items), size)]


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


def _model_turns(dialogues, sides) -> dict[Prompt, dialogue_lib.Spoken]:
  return {
    Prompt(number, spoken.speaker, spoken.start): spoken
    for number, dialogue in enumerate(dialogues)
    for spoken in dialogue_lib.merge_turns(dialogue.turns)
    if spoken.speaker in sides
  }


def _questions(dialogues) -> dict[Prompt, Mapping[str, Any]]:
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


def _first_photo(spoken) -> schema.Photo | None:
  photos = (p for p in spoken.parts if isinstance(p, schema.Photo))
  return next(photos, None)
