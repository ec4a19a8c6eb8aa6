"""Beam search: the likeliest of several whole answers.

`search` knows no model: it asks a function for the logits that follow. It is
the search of transformers' `generate(num_beams=..., early_stopping="never")`:
of all continuations of K beams the 2 K best are looked at; those of the first
K that end are answers, and of the others the K best go on. An answer's score
is the sum of its tokens' log-probabilities, the end's too, over a power of its
length. A row stops once none of its beams can beat its best answer, however
they go on, so a row does not depend on the others of its batch.

`decode` runs it over the model and its cache, like `decoding.decode`.

Axis legend: B rows, K beams of a row, L prompt tokens, N tokens to write, V
vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from photochat_jax.decoding import Rules
from photochat_jax.models.photochat import PhotoChat

Write = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
Take = Callable[[Any, jax.Array], Any]


class _Beams(NamedTuple):
  """A search between two tokens.

  Attributes:
    step: int32, tokens written.
    tokens: int32[B, K, N] of the beams that go on.
    sums: float32[B, K], their log-probabilities, falling; -inf is no beam.
    best: int32[B, N], the best answer.
    score: float32[B], its score; -inf before there is one.
    state: the model's, of B * K rows.
  """

  step: jax.Array
  tokens: jax.Array
  sums: jax.Array
  best: jax.Array
  score: jax.Array
  state: Any


def search(
  logits: jax.Array,
  state: Any,
  write: Write,
  take: Take,
  ends: tuple[int, ...],
  num_beams: int,
  max_new_tokens: int,
  length_penalty: jax.Array | float = 1.0,
  fill: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Looks for the answer of the highest score.

  Args:
    logits: float32[B, V] of the first token; -inf is never written.
    state: what `write` needs to go on, of B rows.
    write: (state, tokens int32[B * K], step) -> logits [B * K, V] of what
      follows these tokens, the first being of step 0, and the new state. Rows
      b * K ... b * K + K - 1 are the beams of row b.
    take: (state, rows int32[R]) -> these rows of a state.
    ends: ids that end an answer.
    num_beams: K.
    max_new_tokens: N; an answer of N tokens is one without an end, too.
    length_penalty: power of the length in the score, 0 or above: 0 is the sum,
      1 the mean, more favours the long.
    fill: what follows an answer's end.

  Returns:
    int32[B, N] and float32[B], the best answer of each row and its score.

  Source: Wu et al. 2016 (arXiv:1609.08144), section 7, with the plain power
  of transformers' `_beam_search`.
  """
  rows, vocabulary = logits.shape
  length_penalty = jnp.asarray(length_penalty, jnp.float32)
  # With as many left over as there are beams, all may end and K still go on.
  wide = min(2 * num_beams, num_beams * vocabulary)

  def normalised(sums, length):
    return sums / jnp.float32(length) ** length_penalty

  def grow(beams: _Beams, logits: jax.Array):
    """One more token; also the parents int32[B, K] of the beams that go on."""
    step = beams.step
    chances = jax.nn.log_softmax(logits.reshape(rows, num_beams, -1))
    sums = (beams.sums[..., None] + chances).reshape(rows, -1)
    sums, places = jax.lax.top_k(sums, wide)
    parents, token = places // vocabulary, places % vocabulary
    tokens = jnp.take_along_axis(beams.tokens, parents[..., None], axis=1)
    tokens = jax.lax.dynamic_update_slice_in_dim(
      tokens, token[..., None], step, axis=2
    )
    over = step + 1 == max_new_tokens
    for end in ends:
      over |= token == end

    counts = over & (jnp.arange(wide) < num_beams)
    scores = jnp.where(counts, normalised(sums, step + 1), -jnp.inf)
    first = jnp.argmax(scores, axis=1)[:, None]
    score = jnp.take_along_axis(scores, first, axis=1)[:, 0]
    answer = jnp.take_along_axis(tokens, first[..., None], axis=1)[:, 0]
    better = score > beams.score

    sums, order = jax.lax.top_k(jnp.where(over, -jnp.inf, sums), num_beams)
    grown = beams._replace(
      step=step + 1,
      tokens=jnp.take_along_axis(tokens, order[..., None], axis=1),
      sums=sums,
      best=jnp.where(better[:, None], answer, beams.best),
      score=jnp.where(better, score, beams.score),
    )
    return grown, jnp.take_along_axis(parents, order, axis=1)

  def may_improve(beams: _Beams):
    # A sum only falls, and no answer is longer than N.
    bound = normalised(beams.sums[:, 0], max_new_tokens)
    return (beams.step < max_new_tokens) & jnp.any(bound > beams.score)

  def go_on(beams: _Beams):
    token = jax.lax.dynamic_index_in_dim(
      beams.tokens, beams.step - 1, axis=2, keepdims=False
    )
    logits, state = write(beams.state, token.reshape(-1), beams.step - 1)
    grown, parents = grow(beams, logits)
    chosen = jnp.arange(rows)[:, None] * num_beams + parents
    return grown._replace(state=take(state, chosen.reshape(-1)))

  start = _Beams(
    step=jnp.int32(0),
    tokens=jnp.full((rows, num_beams, max_new_tokens), fill, jnp.int32),
    # All beams begin with the same prompt: one of them counts.
    sums=jnp.full((rows, num_beams), -jnp.inf).at[:, 0].set(0.0),
    best=jnp.full((rows, max_new_tokens), fill, jnp.int32),
    score=jnp.full((rows,), -jnp.inf),
    state=take(state, jnp.repeat(jnp.arange(rows), num_beams)),
  )
  first, _ = grow(start, jnp.repeat(logits, num_beams, axis=0))
  last = jax.lax.while_loop(may_improve, go_on, first)
  return last.best, last.score


@functools.partial(
  jax.jit, static_argnames=("model", "rules", "max_new_tokens", "num_beams")
)
def decode(
  model: PhotoChat,
  params: dict[str, Any],
  rules: Rules,
  max_new_tokens: int,
  num_beams: int,
  logits: jax.Array,
  cache: dict[str, jax.Array],
  positions: jax.Array,
  length_penalty: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Writes the best answer to each prompt.

  Args:
    model: the composition.
    params: its parameters.
    rules: what may be written.
    max_new_tokens: N.
    num_beams: K.
    logits: float32[B, V] from `decoding.prefill`.
    cache: from `decoding.prefill`, L + N slots long.
    positions: int32[B] of the first token to write.
    length_penalty: see `search`.

  Returns:
    int32[B, N], as `decoding.decode`, and the scores float32[B].
  """
  rows = logits.shape[0]

  def write(state, token, step):
    cache, positions, inside, count = state
    inside, count, _ = rules.follow(token, inside, count)
    hidden, cache = model.converse(
      params,
      token[:, None],
      (positions + step)[:, None],
      jnp.ones((len(token), 1), jnp.int32),
      cache=cache,
    )
    logits = model.logits(params, hidden[:, 0])
    logits = rules.apply(logits, inside, count)
    return logits, (cache, positions, inside, count)

  def take(state, chosen):
    cache, *others = state
    taken = {
      "key": cache["key"][:, chosen],
      "value": cache["value"][:, chosen],
      "segments": cache["segments"][chosen],
      "index": cache["index"],
    }
    return (taken, *(x[chosen] for x in others))

  nothing = jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32)
  return search(
    rules.apply(logits, *nothing),
    (cache, jnp.asarray(positions), *nothing),
    write,
    take,
    (rules.eos, rules.end_img),
    num_beams,
    max_new_tokens,
    length_penalty,
    rules.never[0],
  )
