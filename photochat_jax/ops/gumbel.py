"""Hard tokens with a gradient: straight-through and ReinMax, one custom VJP.

Forward carries hard tokens. Backward, `straight_through` pretends that they
were the soft distribution `p = softmax((l + g) / tau)` (Jang et al. 2017;
arXiv 2408.08650, equation 4); `reinmax` (Liu et al. 2023, arXiv 2304.08612)
takes the slope half-way between the drawn token and the others, which is right
to the second order. The forward pass computes nothing soft and saves only the
logits, the key of the noise and the temperature: `p` is recomputed on the way
back.

Axes: X photos, n caption positions, V padded vocabulary of the language
model, m slots of the text encoder, C its vocabulary, d its width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Crossing(NamedTuple):
  """How embeddings are read from hard tokens and how a cotangent goes back.

  Attributes:
    forward: (embedding[C, d], facts, vocab) -> embeddings[X, m, d], linear in
      the embedding; `facts` is any pytree and gets no cotangent.
    pull: (embedding, facts, cotangent[X, m, d], vocab) -> the cotangent of the
      one-hot tokens, float32[X, n, vocab]; None where nothing crosses.
  """

  forward: Callable[..., jax.Array]
  pull: Callable[..., jax.Array] | None


def gumbel_noise(keys, length: int, vocab: int) -> jax.Array:
  """Standard Gumbel noise, one key a photo.

  A photo's noise depends on its key and on (length, vocab) alone, so it is the
  same whatever the batch and the mesh.

  Args:
    keys: PRNG keys [X].
    length: caption positions n.
    vocab: padded vocabulary V.

  Returns:
    float32[X, n, V].
  """
  return jax.vmap(
    lambda key: jax.random.gumbel(key, (length, vocab), jnp.float32)
  )(keys)


def soft_tokens(logits, mask, keys, tau) -> jax.Array:
  """`softmax((logits + g) / tau)`, safe for padded and for masked rows.

  Args:
    logits: float[X, n, V]; -inf at padded entries.
    mask: bool[X, n]; what the logits hold elsewhere is never read.
    keys: PRNG keys [X] of the noise, or None for g = 0.
    tau: temperature, a positive scalar.

  Returns:
    float32[X, n, V]: p, 0 in masked rows.
  """
  scores = jnp.where(mask[..., None], logits.astype(jnp.float32), -jnp.inf)
  if keys is not None:
    scores += gumbel_noise(keys, *logits.shape[-2:])
  scores /= tau
  top = scores.max(-1, keepdims=True)
  # A row of nothing but -inf would give -inf - -inf and then 0 / 0.
  weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
  total = weights.sum(-1, keepdims=True)
  return weights / jnp.where(total > 0, total, 1.0)


def pool_rows(table, embedding, vocab: int) -> jax.Array:
  """`T @ embedding` for a sparse T, without T.

  Args:
    table: dict of rows int32[N] (ascending), cols int32[N], weights
      float32[N]: the non-zeros of T[vocab, C].
    embedding: float[C, d].
    vocab: rows of the result; those without a non-zero are 0.

  Returns:
    float32[vocab, d].
  """
  picked = jnp.take(embedding, table['cols'], axis=0).astype(jnp.float32)
  return jax.ops.segment_sum(
    picked * table['weights'][:, None],
    table['rows'],
    num_segments=vocab,
    indices_are_sorted=True,
  )


def _pull_straight_through(bar, logits, tokens, mask, keys, tau):
  del tokens
  return _pull_softmax(soft_tokens(logits, mask, keys, tau), bar) / tau


def _pull_reinmax(bar, logits, tokens, mask, keys, tau):
  """Algorithm 2 of Liu et al.: 2 J((D + p_tau) / 2) - J(p) / 2, J softmax's."""
  del keys
  drawn = (jnp.arange(bar.shape[-1]) == tokens[..., None]) & mask[..., None]
  half = (drawn + soft_tokens(logits, mask, None, tau)) / 2
  soft = soft_tokens(logits, mask, None, 1.0)
  return 2 * _pull_softmax(half, bar) - _pull_softmax(soft, bar) / 2


def _pull_softmax(soft, bar):
  """softmax's Jacobian where it is `soft`, times a cotangent."""
  return soft * (bar - jnp.sum(soft * bar, -1, keepdims=True))


ESTIMATORS = {
  "straight_through": _pull_straight_through,
  "reinmax": _pull_reinmax,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def cross(
  crossing: Crossing,
  estimator: str,
  logits,
  embedding,
  tokens,
  mask,
  facts: Any,
  keys,
  tau,
) -> jax.Array:
  """Embeddings of hard tokens whose gradient reaches the logits.

  The cotangent of the embedding is that of the forward read alone. Integers,
  facts, keys and the temperature get none.

  Args:
    crossing: the forward read and its way back.
    estimator: of `ESTIMATORS`.
    logits: float[X, n, V] that predict the tokens; -inf at padded entries.
    embedding: float[C, d].
    tokens: int32[X, n], the hard tokens.
    mask: bool[X, n], true at caption tokens; elsewhere the gradient is 0.
    facts: pytree handed to both functions of `crossing`.
    keys: PRNG keys [X] with which the tokens were drawn, None without noise.
    tau: temperature, a positive scalar.

  Returns:
    [X, m, d] in the embedding's dtype.
  """
  del tokens, mask, keys, tau
  return crossing.forward(embedding, facts, logits.shape[-1])


def _forward(
  crossing, estimator, logits, embedding, tokens, mask, facts, keys, tau
):
  out = crossing.forward(embedding, facts, logits.shape[-1])
  return out, (logits, embedding, tokens, mask, facts, keys, tau)


def _backward(crossing, estimator, saved, cotangent):
  logits, embedding, tokens, mask, facts, keys, tau = saved
  vocab = logits.shape[-1]
  _, read_back = jax.vjp(
    lambda e: crossing.forward(e, facts, vocab), embedding
  )
  (embedding_bar,) = read_back(cotangent)
  if crossing.pull is None:
    return jnp.zeros_like(logits), embedding_bar, *(None,) * 5
  soft_bar = crossing.pull(
    embedding, facts, cotangent.astype(jnp.float32), vocab
  )
  logits_bar = ESTIMATORS[estimator](
    soft_bar, logits, tokens, mask, keys, tau
  )
  return logits_bar.astype(logits.dtype), embedding_bar, *(None,) * 5


cross.defvjp(_forward, _backward)
