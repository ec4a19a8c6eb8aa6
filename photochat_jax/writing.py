"""One answer to each prompt, decoded as the options say.

Axis legend: B rows, L prompt tokens, N tokens to write.
"""

from typing import Any

import jax
import numpy as np

from photochat_jax import beam, decoding
from photochat_jax.decoding_options import Options
from photochat_jax.models.photochat import PhotoChat


def write(
  model: PhotoChat,
  params: dict[str, Any],
  rules: decoding.Rules,
  options: Options,
  max_new_tokens: int,
  batch: dict[str, jax.Array],
  done: jax.Array,
  numbers: jax.Array,
  slots: int,
) -> tuple[jax.Array, jax.Array]:
  """Reads prompts and answers them.

  Args:
    model: the composition.
    params: its parameters.
    rules: what may be written.
    options: how to decode; `max_tokens` is not looked at.
    max_new_tokens: N.
    batch: from `dialogue.left_pad`, L long.
    done: bool[B], rows whose answers are of no use.
    numbers: uint32[B], by which each row's samples are keyed.
    slots: length of the cache, L + N or more; one length for all prompts
      compiles the loop once.

  Returns:
    int32[B, N] and float32[B], as `decoding.decode`.
  """
  logits, cache = decoding.prefill(model, params, batch, slots)
  positions = batch["positions"][:, -1] + 1
  if options.beams > 1:
    tokens, _ = beam.decode(
      model,
      params,
      rules,
      max_new_tokens,
      options.beams,
      logits,
      cache,
      positions,
      np.float32(options.length_penalty),
    )
    if rules.img in rules.never:  # A caption's words: no photo is near.
      return tokens, np.zeros(len(tokens), np.float32)
    return tokens, decoding.photo_score(
      model, params, rules, logits, cache, positions, tokens
    )
  sampled = options.method == "nucleus"
  return decoding.decode(
    model,
    params,
    rules,
    max_new_tokens,
    logits,
    cache,
    positions,
    done,
    np.float32(options.temperature if sampled else 0),
    np.uint32(options.seed),
    numbers,
    np.float32(options.top_p if sampled else 1),
  )
