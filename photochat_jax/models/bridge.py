"""The bridge from the language model's caption to the text encoder.

The one idea of the paper (arXiv 2408.08650, section 3.3): the language model
writes a caption in its own vocabulary, the generator's text encoder (CLIP)
reads it in another. Forward, the bridge hands on the CLIP embeddings of the
*exact* re-tokenisation of the caption. Backward, it carries the gradient of
the photo loss to the logits that predict the caption, across a map between
the vocabularies. Three choices are independent:

* draw: which caption the forward pass carries: `gold` (the data's), `argmax`
  or `gumbel` (a sample). The last two are drawn per position given the gold
  prefix (teacher forcing), as the paper does: they are not free samples.
* matrix: how the gradient crosses; see `CROSSINGS`.
* estimator: how a gradient gets past the draw. `straight_through` and
  `reinmax` (`ops/gumbel.py`) use what crosses. `rloo` needs no crossing: it
  draws several captions and reinforces those whose photo loss is below that of
  the others (`objective.py`).

Neither a matrix between the vocabularies nor a one-hot of tokens is built.

Axes: X photos, n caption positions, V padded vocabulary of the language
model, m CLIP slots, C CLIP's vocabulary, d its width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from photochat_jax.ops import gumbel

# {'static' | 'final' | 'internal': {'rows': int32[N] ascending,
#   'cols': int32[N], 'weights': float32[N]}, 'specials': int32[3]}: the
# non-zeros of three maps [V, C] and CLIP's BOS, EOS and padding ids.
VocabularyMap = dict


def _read(embedding, facts, vocab):
  """E[z]: the CLIP embeddings of the re-tokenised caption."""
  del vocab
  return jnp.take(embedding, facts['clip_tokens'], axis=0)


def _slots(mask, num_slots: int):
  """The slot 1.. of each caption token when every token takes one slot.

  Args:
    mask: bool[X, n].
    num_slots: m; slot 0 is BOS and one is left for EOS.

  Returns:
    int32[X, n]; `num_slots`, which no slot has, for tokens without one.
  """
  order = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
  return jnp.where(mask & (order <= num_slots - 2), order, num_slots)


def _static_read(embedding, facts, vocab):
  """BOS, U[y_i] of every language model token, EOS, padding."""
  num_slots = facts['clip_tokens'].shape[-1]
  slots = _slots(facts['mask'], num_slots)
  count = jnp.sum(slots < num_slots, axis=-1, keepdims=True)
  bos, eos, pad = facts['map']['specials']
  slot = jnp.arange(num_slots)
  frame = jnp.where(slot == 0, bos, jnp.where(slot == count + 1, eos, pad))
  table = gumbel.pool_rows(facts['map']['static'], embedding, vocab)
  rows = jnp.take(table, facts['tokens'], axis=0).astype(embedding.dtype)
  return jax.vmap(lambda out, at, row: out.at[at].set(row, mode='drop'))(
    jnp.take(embedding, frame, axis=0), slots, rows
  )


def _static_pull(embedding, facts, cotangent, vocab):
  """<ct at the slot of i, U[v]>."""
  slots = _slots(facts['mask'], cotangent.shape[-2])
  per_token = jax.vmap(
    lambda ct, at: ct.at[at].get(mode='fill', fill_value=0)
  )(cotangent, slots)
  return jnp.einsum('xnd,vd->xnv', per_token, _table(
    'static', embedding, facts, vocab))


def _all_pairs_pull(embedding, facts, cotangent, vocab):
  """One number G for every token that occurs in the caption, else 0."""
  ids, mask = facts['clip_tokens'], facts['mask']
  # BOS, EOS and padding are the slots that no token wrote.
  piece = facts['alignment'].sum(-1) > 0
  same = ids[:, :, None] == ids[:, None, :]
  earlier = jnp.tril(same & piece[:, None, :], k=-1).any(-1)
  distinct = piece & ~earlier
  pieces = jnp.take(embedding, ids, axis=0).astype(jnp.float32)
  total = jnp.sum(pieces * distinct[..., None], axis=-2)
  strength = jnp.einsum('xmd,xd->x', cotangent, total)
  used = jax.vmap(
    lambda at: jnp.zeros(vocab, bool).at[at].set(True, mode='drop')
  )(jnp.where(mask, facts['tokens'], vocab))
  return (strength[:, None] * used)[:, None, :]


def _aligned_pull(embedding, facts, cotangent, vocab):
  """sum_j A_ji <ct_j, U[v]>; E[z_j] stands in for U[y_i]."""
  per_token = jnp.einsum('xmn,xmd->xnd', facts['alignment'], cotangent)
  pieces = jnp.take(embedding, facts['clip_tokens'], axis=0)
  own = jnp.einsum(
    'xmn,xm->xn', facts['alignment'], jnp.sum(cotangent * pieces, axis=-1)
  )
  # One product over [U_final, U_internal], the unused half of its left side
  # 0, makes one array of the logits' size where selecting would make two.
  final = facts['final'][..., None]
  halves = jnp.concatenate(
    [jnp.where(final, per_token, 0), jnp.where(final, 0, per_token)], axis=-1
  )
  soft_bar = jnp.einsum(
    'xnd,vd->xnv', halves, _table('aligned', embedding, facts, vocab)
  )
  chosen = jnp.arange(vocab) == facts['tokens'][..., None]
  return jnp.where(chosen, own[..., None], soft_bar)


# none: nothing crosses (the pipeline). static: the encoder reads the language
# model's own tokens through exact string matches. all_pairs: the released
# code's matrix, one scalar an example. aligned: each token hears from the
# pieces that it wrote, in proportion to the bytes.
CROSSINGS = {
  'none': gumbel.Crossing(_read, None),
  'static': gumbel.Crossing(_static_read, _static_pull),
  'all_pairs': gumbel.Crossing(_read, _all_pairs_pull),
  'aligned': gumbel.Crossing(_read, _aligned_pull),
}

_CHOICES = {
  'draw': ('gold', 'argmax', 'gumbel'),
  'matrix': tuple(CROSSINGS),
  'estimator': (*gumbel.ESTIMATORS, 'rloo'),
  'retokenise': ('callback', 'two_pass'),
}


@dataclasses.dataclass(frozen=True)
class BridgeConfig:
  """The bridge's choices.

  Attributes:
    draw: 'gold', 'argmax' or 'gumbel'.
    matrix: 'none', 'static', 'all_pairs' or 'aligned'.
    estimator: 'straight_through', 'reinmax' or 'rloo', which is for the draw
      'gumbel', makes no use of the matrix, and draws at temperature 1.
    rloo_samples: K, the captions that `rloo` draws for each photo.
    tau: temperature of the softmax in the backward pass, or a schedule
      ((step, value), ...) whose value is handed to `cross`.
    max_tokens: n, the caption positions, a static size.
    retokenise: 'callback' or 'two_pass': where the drawn tokens of `argmax`
      and `gumbel` become CLIP's.
  """

  draw: str = 'gold'
  matrix: str = 'aligned'
  estimator: str = 'straight_through'
  rloo_samples: int = 4
  tau: float | tuple = 1.0
  max_tokens: int = 96
  retokenise: str = 'callback'

  def __post_init__(self):
    for field, choices in _CHOICES.items():
      if getattr(self, field) not in choices:
        raise ValueError(
          f'bridge.{field} is {getattr(self, field)!r}; use one of '
          f'{", ".join(choices)}.'
        )
    points = self.tau if isinstance(self.tau, tuple) else ((0, self.tau),)
    if not points or not all(
      math.isfinite(tau) and tau > 0 for _, tau in points
    ):
      raise ValueError(
        f'bridge.tau is {self.tau}; use positive temperatures.'
      )
    if self.estimator == 'rloo' and self.draw != 'gumbel':
      raise ValueError(
        f"bridge.estimator='rloo' learns from samples; set bridge.draw to "
        f"'gumbel', not {self.draw!r}."
      )
    if self.rloo_samples < 2:
      raise ValueError(
        f'bridge.rloo_samples is {self.rloo_samples}; use at least 2, to have '
        'others to compare with.'
      )
    if self.max_tokens < 1:
      raise ValueError(
        f'bridge.max_tokens is {self.max_tokens}; use at least 1.'
      )

  @property
  def num_samples(self) -> int:
    """Captions drawn for each photo."""
    return self.rloo_samples if self.estimator == 'rloo' else 1


gumbel_noise = gumbel.gumbel_noise


def draw_tokens(config: BridgeConfig, logits, keys=None) -> jax.Array:
  """The hard tokens of `argmax` and `gumbel`, per position.

  Each position is drawn given the *gold* prefix under which its logits were
  computed, so the result is no free sample of a caption.

  Args:
    config: the bridge's choices.
    logits: float[X, n, V]; -inf at padded entries, which are never drawn.
    keys: PRNG keys [X], one a photo; only `gumbel` reads them.

  Returns:
    int32[X, n].

  Raises:
    ValueError: the draw is `gold`, whose tokens are the data's, or `gumbel`
      came without keys.
  """
  if config.draw == 'gold':
    raise ValueError(
      "bridge.draw='gold' draws nothing; take the caption from the batch."
    )
  scores = logits.astype(jnp.float32)
  keys = _noise_keys(config, keys)
  if keys is not None:
    scores += gumbel_noise(keys, *logits.shape[-2:])
  return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def vocabulary_table(
  config: BridgeConfig, embedding, vocab_map: VocabularyMap, vocab: int
) -> jax.Array | None:
  """U = T E, which `cross` takes as `table` while the embedding is frozen.

  Args:
    config: the bridge's choices.
    embedding: float[C, d], CLIP's token embedding.
    vocab_map: the sparse maps.
    vocab: V.

  Returns:
    float32[V, 2 d] for `aligned` (U_final beside U_internal), [V, d] for
    `static`, None for the matrices that use no map.
  """
  if config.matrix not in ('static', 'aligned'):
    return None
  return _table(config.matrix, embedding, {'map': vocab_map}, vocab)


def cross(
  config: BridgeConfig,
  logits,
  tokens,
  clip_tokens,
  alignment,
  final,
  caption_mask,
  clip_embedding,
  vocab_map: VocabularyMap,
  keys=None,
  tau=None,
  table=None,
) -> jax.Array:
  """CLIP embeddings of the captions, differentiable in the logits.

  Args:
    config: the bridge's choices.
    logits: float[X, n, V] that predict the caption tokens; padded entries of
      the vocabulary are -inf.
    tokens: y, int32[X, n], gold or drawn.
    clip_tokens: z, int32[X, m]: CLIP's tokens of the text that y decodes to.
    alignment: A, float32[X, m, n]: the share of piece j that token i wrote.
    final: bool[X, n]: a word ends after token i.
    caption_mask: bool[X, n]: positions that hold a caption token.
    clip_embedding: E, float[C, d]. Its cotangent is that of the forward read.
    vocab_map: from data/vocabulary.py.
    keys: PRNG keys [X] given to `draw_tokens`; only the draw `gumbel` has
      noise, and only it reads them.
    tau: temperature; None takes the config's, which must then be a number,
      no schedule.
    table: `vocabulary_table`'s result if computed before; None computes it.

  Returns:
    [X, m, d] in the embedding's dtype.

  Raises:
    ValueError: `gumbel` came without keys.
  """
  facts = {
    'tokens': tokens,
    'clip_tokens': clip_tokens,
    'alignment': alignment,
    'final': final,
    'mask': caption_mask,
    'map': vocab_map,
    'table': table,
  }
  return gumbel.cross(
    CROSSINGS[config.matrix],
    config.estimator,
    logits,
    clip_embedding,
    tokens,
    caption_mask,
    facts,
    _noise_keys(config, keys),
    config.tau if tau is None else tau,
  )


def _noise_keys(config, keys):
  if config.draw != 'gumbel':
    return None
  if keys is None:
    raise ValueError(
      "bridge.draw='gumbel' needs one key for every photo; pass keys."
    )
  return keys


def _table(matrix, embedding, facts, vocab):
  if facts.get('table') is not None:
    return facts['table']
  names = {'static': ('static',), 'aligned': ('final', 'internal')}[matrix]
  return jnp.concatenate(
    [gumbel.pool_rows(facts['map'][name], embedding, vocab) for name in names],
    axis=-1,
  )
