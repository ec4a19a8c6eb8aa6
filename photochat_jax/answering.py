"""A model's replies and photos at the data's own turns, batch by batch.

What is there already is not made again, and what is sampled is keyed by the
seed, the dialogue's id and the turn.
"""

import collections
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from photochat_jax import generate
from photochat_jax.data import bars, schema
from photochat_jax.data import dialogue as dialogue_lib
from photochat_jax.data.spec import LeftOut
from photochat_jax.decoding_options import GREEDY, Options
from photochat_jax.runtime import cluster
from photochat_jax.said import ModelTurn
from photochat_jax.transcript import Prompt, Transcript

# Prompt lengths are rounded up to it: fewer programs, little padding.
LENGTH_STEP = 64


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
    for length, group in by_length(contexts, generator.spec.length):
      # The same batches whenever it goes on, so the same replies to a bit.
      for chunk in chunks(group, generator.settings.batch_size):
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
    for chunk in chunks(wanted, generator.settings.batch_size):
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


def by_length(
  contexts: Sequence[dialogue_lib.Context], limit: int
) -> Iterator[tuple[int, list[int]]]:
  """(padded length, indices of contexts) pairs that cover all contexts."""

  def padded(index):
    steps = -(-len(contexts[index].tokens) // LENGTH_STEP)
    return min(steps * LENGTH_STEP, limit)

  order = sorted(range(len(contexts)), key=padded)
  for length, group in itertools.groupby(order, padded):
    yield length, list(group)


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
  """The items, `size` at a time."""
  return [items[i : i + size] for i in range(0, len(items), size)]
