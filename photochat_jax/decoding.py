"""Decoding: one prefill, one loop over a key-value cache, and its rules.

Both programs have fixed shapes, so each is compiled once per prompt length.
The rules keep what is written well-formed: padding and `<s>` are never chosen,
`[/img]` only closes an open block, nothing but a caption, and never an empty
one, stands inside a block, and a caption which reaches its longest is closed.

A row stops at `</s>`, at the limit, or at `[/img]`: at chat time the photo has
to be drawn, and seen, before the turn goes on. `beam` is the second loop, for
the likeliest of several whole answers.

Axis legend: B rows, L prompt tokens, N tokens to write, V padded vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from photochat_jax.models import llama
from photochat_jax.models.photochat import PhotoChat


class Rules(NamedTuple):
  """The ids that decide how a turn may go on.

  Attributes:
    img: `[img]`, opens a block.
    end_img: `[/img]`, closes it.
    eos: `</s>`, ends the turn.
    never: ids which are never written.
    caption_tokens: longest caption, n.
  """

  img: int
  end_img: int
  eos: int
  never: tuple[int, ...]
  caption_tokens: int

  @classmethod
  def of(cls, tokenizer: Any, caption_tokens: int) -> "Rules":
    """The rules of a language model's tokenizer."""
    # In some vocabularies (GPT-2's) one id opens, ends and pads.
    never = {tokenizer.pad_id, tokenizer.bos_id} - {tokenizer.eos_id}
    return cls(
      tokenizer.img_id,
      tokenizer.end_img_id,
      tokenizer.eos_id,
      tuple(sorted(never)),
      caption_tokens,
    )

  @classmethod
  def of_text(cls, tokenizer: Any) -> "Rules":
    """The rules of plain text: of all that writes nothing, only `</s>`."""
    silent = (
      i for i in range(tokenizer.vocab_size) if not tokenizer.token_bytes(i)
    )
    never = {*silent, tokenizer.img_id, tokenizer.end_img_id}
    return cls(
      tokenizer.img_id,
      tokenizer.end_img_id,
      tokenizer.eos_id,
      tuple(sorted(never - {tokenizer.eos_id})),
      0,
    )

  def apply(
    self, logits: jax.Array, inside: jax.Array, count: jax.Array
  ) -> jax.Array:
    """Sets what may not be written to -inf.

    Args:
      logits: [B, V].
      inside: bool[B], whether a block is open.
      count: int32[B], caption tokens written in it.
    """
    ids = jnp.arange(logits.shape[-1])
    inside, count = inside[:, None], count[:, None]
    end = ids == self.end_img
    within = (ids == self.img) | (ids == self.eos) | (end & (count == 0))
    banned = jnp.where(
      inside, jnp.where(count < self.caption_tokens, within, ~end), end
    )
    # A constant of the program: control ids may be hundreds.
    banned |= np.isin(np.arange(logits.shape[-1]), self.never)
    return jnp.where(banned, -jnp.inf, logits)

  def follow(
    self, token: jax.Array, inside: jax.Array, count: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `token` makes of `inside` and `count`, and whether it is the last.

    Args:
      token: int32[B].
      inside: as in `apply`.
      count: as in `apply`.
    """
    opens, closes = token == self.img, token == self.end_img
    inside = (inside | opens) & ~closes
    count = jnp.where(inside & ~opens, count + 1, 0)
    return inside, count, closes | (token == self.eos)


def nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
  """Keeps the fewest likeliest tokens that reach `top_p`, the rest at -inf.

  Tokens as likely as the last one kept are kept too, so that the order of the
  vocabulary means nothing. The likeliest always stays.

  Args:
    logits: [..., V].
    top_p: probability that is kept, 1 for all.

  Source: Holtzman et al. 2020 (arXiv:1904.09751), section 3.1.
  """
  ranked = jnp.sort(logits, axis=-1, descending=True)
  chances = jax.nn.softmax(ranked, axis=-1)
  before = jnp.cumsum(chances, axis=-1) - chances
  # The sum of all is not quite 1.
  kept = (before < top_p) | jnp.asarray(top_p >= 1)
  last = jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True) - 1, 0)
  least = jnp.take_along_axis(ranked, last, axis=-1)
  return jnp.where(logits >= least, logits, -jnp.inf)


def _nearer(
  rules: Rules, allowed: jax.Array, passed: jax.Array, nearest: jax.Array
) -> jax.Array:
  """The highest probability of `[img]` so far, of rows that are not past it."""
  near = jax.nn.softmax(allowed)[:, rules.img]
  return jnp.where(passed, nearest, jnp.maximum(nearest, near))


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(
  model: PhotoChat,
  params: dict[str, Any],
  batch: dict[str, jax.Array],
  slots: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Reads the prompts.

  Args:
    model: the composition.
    params: its parameters.
    batch: from `dialogue.left_pad`.
    slots: length of the cache: L plus all tokens to come.

  Returns:
    float32[B, V] logits of the first token to write, and the filled cache.
  """
  rows = batch["tokens"].shape[0]
  hidden, cache = model.converse(
    params,
    batch["tokens"],
    batch["positions"],
    batch["segments"],
    model.perceive(params, batch["photos_in"]),
    batch["visual_index"],
    llama.init_cache(model.config.language, rows, slots),
  )
  return model.logits(params, hidden[:, -1]), cache


@functools.partial(
  jax.jit, static_argnames=("model", "rules", "max_new_tokens")
)
def decode(
  model: PhotoChat,
  params: dict[str, Any],
  rules: Rules,
  max_new_tokens: int,
  logits: jax.Array,
  cache: dict[str, jax.Array],
  positions: jax.Array,
  done: jax.Array,
  temperature: jax.Array,
  seed: jax.Array,
  first_row: jax.Array,
  top_p: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Writes until every row has ended, or `max_new_tokens`.

  Args:
    model: the composition.
    params: its parameters.
    rules: what may be written.
    max_new_tokens: N.
    logits: float32[B, V] from `prefill`.
    cache: from `prefill`.
    positions: int32[B] of the first token to write.
    done: bool[B], rows to leave empty.
    temperature: float32, 0 for the likeliest token.
    seed: uint32, of the sampling.
    first_row: uint32, number of row 0 among all that share the seed, by which
      its draws are keyed; or uint32[B], the number of each row.
    top_p: samples come from the `nucleus` of this probability.

  Returns:
    int32[B, N]; a row ends with `</s>` or `[/img]` and goes on with padding.
    And float32[B], how near a photo was: the highest probability of `[img]`
    among what may be written, over the steps up to where one was opened.
  """
  rows = logits.shape[0]
  key = jax.random.key(seed)
  numbers = jnp.asarray(first_row, jnp.uint32)
  if not numbers.ndim:
    numbers += jnp.arange(rows, dtype=jnp.uint32)
  keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
  fill = rules.never[0]

  def choose(logits, step):
    def sample(logits):
      # Gumbel's trick: the arg max of noisy logits is a sample.
      noise = jax.vmap(
        lambda k: jax.random.gumbel(
          jax.random.fold_in(k, step), logits.shape[1:]
        )
      )(keys)
      kept = jax.lax.cond(
        jnp.asarray(top_p < 1),
        lambda x: nucleus(x / temperature, top_p) > -jnp.inf,
        lambda x: jnp.ones_like(x, bool),
        logits,
      )
      return jnp.where(kept, logits + temperature * noise, -jnp.inf)

    return jnp.argmax(
      jax.lax.cond(temperature > 0, sample, lambda x: x, logits), axis=-1
    ).astype(jnp.int32)

  def go_on(state):
    step, _, _, _, _, done, *_ = state
    return (step < max_new_tokens) & ~jnp.all(done)

  def write(state):
    step, logits, cache, inside, count, done, out, nearest = state
    allowed = rules.apply(logits, inside, count)
    nearest = _nearer(rules, allowed, inside | done, nearest)
    token = choose(allowed, step)
    token = jnp.where(done, fill, token)
    out = jax.lax.dynamic_update_slice(out, token[:, None], (0, step))
    inside, count, last = rules.follow(token, inside, count)
    done = done | last
    hidden, cache = model.converse(
      params,
      token[:, None],
      (positions + step)[:, None],
      jnp.ones((rows, 1), jnp.int32),
      cache=cache,
    )
    logits = model.logits(params, hidden[:, 0])
    return step + 1, logits, cache, inside, count, done, out, nearest

  start = (
    jnp.int32(0),
    logits,
    cache,
    jnp.zeros(rows, bool),
    jnp.zeros(rows, jnp.int32),
    jnp.asarray(done),
    jnp.full((rows, max_new_tokens), fill, jnp.int32),
    jnp.zeros(rows),
  )
  *_, out, nearest = jax.lax.while_loop(go_on, write, start)
  return out, nearest


@functools.partial(jax.jit, static_argnames=("model", "rules"))
def photo_score(
  model: PhotoChat,
  params: dict[str, Any],
  rules: Rules,
  logits: jax.Array,
  cache: dict[str, jax.Array],
  positions: jax.Array,
  tokens: jax.Array,
) -> jax.Array:
  """How near a photo was in answers that have been written.

  Args:
    model: the composition.
    params: its parameters.
    rules: what might be written.
    logits: float32[B, V] from `prefill`.
    cache: from `prefill`, L + N slots long.
    positions: int32[B] of the first token.
    tokens: int32[B, N], each row up to `</s>` or `[/img]`.

  Returns:
    float32[B], what `decode` returns of the same tokens.
  """
  rows, new = tokens.shape
  hidden, _ = model.converse(
    params,
    tokens,
    positions[:, None] + jnp.arange(new),
    jnp.ones((rows, new), jnp.int32),
    cache=cache,
  )

  def follow(state, step):
    logits, inside, count, done, nearest = state
    token, hidden = step
    allowed = rules.apply(logits, inside, count)
    nearest = _nearer(rules, allowed, inside | done, nearest)
    inside, count, last = rules.follow(token, inside, count)
    logits = model.logits(params, hidden)
    return (logits, inside, count, done | last, nearest), None

  nothing = jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32)
  start = (logits, *nothing, jnp.zeros(rows, bool), jnp.zeros(rows))
  (*_, nearest), _ = jax.lax.scan(
    follow, start, (tokens.T, hidden.swapaxes(0, 1))
  )
  return nearest
