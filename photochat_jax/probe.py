"""How the photo's loss reaches the caption's logits, against an oracle.

The oracle really swaps a token of the caption, tokenises the caption anew and
measures the photo's loss again, with the same noise at the same times. A way to
send the gradient back is good if, at each position, it ranks the candidates as
the oracle does: `top_1` (does it name the best candidate?) and `rank`
(Spearman's correlation over candidates). `sign` is the share of candidates of
which it says rightly whether they are better than the token that is there.
`cosine`, over all positions at once, is shown because others show it: that
nearly every change makes the loss larger dominates it, and it tells little.

What is compared is the gradient of a logit over its probability, less that of
the token there: for the straight-through estimator this is the first-order
guess of what the swap would cost. `static`, whose encoder reads the language
model's own tokens, is held against the same oracle, which reads CLIP's.

Axes: X photos, n caption positions, V vocabulary, m text-encoder slots, C
candidates, R draws of noise and time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from photochat_jax import captions, losses, objective
from photochat_jax.config import RunConfig
from photochat_jax.models.photochat import PhotoChat

# (name, matrix, estimator) of all gradients but RLOO's.
METHODS = tuple(
  (f"{matrix}, {estimator}", matrix, estimator)
  for estimator in ("straight_through", "reinmax")
  for matrix in ("all_pairs", "static", "aligned")
)


@dataclasses.dataclass(frozen=True, eq=False)
class World:
  """A model and a batch, as far as the probe needs them.

  Attributes:
    model: the composition.
    params: its parameters, averaged where there are averages.
    photos: from `objective.flatten_photos`, those there are: captions and the
      latents, `latents` [X, h, w, C].
    logits: float32[X, n, V] that predict the captions.
    keys: [X], each photo's.
    vocabulary_map: of the bridge.
    draws: R.
  """

  model: PhotoChat
  params: Any
  photos: dict[str, Any]
  logits: jax.Array
  keys: jax.Array
  vocabulary_map: Any
  draws: int

  @functools.cached_property
  def costs(self) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
    """(clip_tokens int32[Y, m], rows int[Y]) -> [Y], compiled once."""

    def of(tokens, rows):
      embedded = self.model.embed_caption(self.params, tokens)
      context = self.model.read_caption(self.params, embedded)
      return errors(self, context, rows)

    return jax.jit(of)


class Position(NamedTuple):
  """A caption's position and what may stand there.

  Attributes:
    photo: which of the X.
    place: which of the n.
    candidates: int[C] ids, the one that is there first.
    costs: float[C], the oracle's: the loss less that of the caption as it is.
  """

  photo: int
  place: int
  candidates: np.ndarray
  costs: np.ndarray


class Scores(NamedTuple):
  """How a gradient did on a photo's caption; means over its positions.

  `norm` is that of the gradient to a position's logits, `directions` how many
  there are in what the positions are told: 1 cannot speak to one word.
  """

  top_1: float
  rank: float
  sign: float
  cosine: float
  norm: float
  directions: int


def look(
  run: RunConfig,
  params: Any,
  latent_scale: jax.Array,
  batch: Mapping[str, np.ndarray],
  vocabulary_map: Any,
  draws: int,
) -> World:
  """Reads a batch of dialogues up to the captions' logits.

  Args:
    run: the run.
    params: the parameters.
    latent_scale: what latents are multiplied by.
    batch: of dialogues, captions as the data have them.
    vocabulary_map: of the bridge.
    draws: R.
  """
  model = PhotoChat(run.model)

  @jax.jit
  def read(params, batch):
    hidden = objective.converse(model, params, batch)
    logits = objective.caption_logits(
      model, params, hidden, batch["caption_index"]
    )
    photos = objective.flatten_photos(batch)
    mean, _ = objective.photo_moments(model, params, photos)
    keys = captions.photo_keys(run, 0, 0, photos["example_id"])
    return logits, mean * latent_scale, keys

  logits, latents, keys = read(params, dict(batch))
  photos = objective.flatten_photos(batch) | {"latents": latents}
  there = np.flatnonzero(
    np.asarray(photos["photos_out_mask"])
    & np.asarray(photos["caption_mask"]).any(-1)
  )
  return World(
    model,
    params,
    {name: np.asarray(array)[there] for name, array in photos.items()},
    logits[there],
    keys[there],
    vocabulary_map,
    draws,
  )


def errors(world: World, context: jax.Array, rows: jax.Array) -> jax.Array:
  """The photo's loss, the mean over R draws that all captions share.

  Args:
    world: the model and the batch.
    context: [Y, m, d], what the UNet attends to.
    rows: int[Y], which photo each of them is for.
  """
  model, latents = world.model, jnp.asarray(world.photos["latents"])[rows]
  keys = captions.keys_for(world.keys, captions.DIFFUSION)[rows]

  def once(draw):
    return losses.diffusion(
      model.config.schedule,
      lambda x, t: model.denoise(world.params, x, t, context),
      latents,
      captions.keys_for(keys, draw),
      None,
    )

  return jnp.mean(jax.lax.map(once, jnp.arange(world.draws)), axis=0)


def gradient(world: World, matrix: str, estimator: str) -> np.ndarray:
  """The gradient of the photo's loss to the logits, [X, n, V]."""
  config = world.model.config
  bridge = dataclasses.replace(
    config.bridge, draw="gold", matrix=matrix, estimator=estimator, tau=1.0
  )
  model = PhotoChat(dataclasses.replace(config, bridge=bridge))
  caption = {
    "tokens": world.photos["caption_tokens"],
    "mask": world.photos["caption_mask"],
    "clip_tokens": world.photos["clip_tokens"],
    "alignment": world.photos["alignment"],
    "final": world.photos["caption_final"],
  }

  @jax.jit
  def of(logits):
    context = model.read_caption(
      world.params,
      model.bridge(
        world.params, logits, caption, world.vocabulary_map, None, 1.0
      ),
    )
    return jnp.sum(errors(world, context, jnp.arange(len(logits))))

  return np.asarray(jax.grad(of)(world.logits))


def measure(
  world: World, clip_tokens: np.ndarray, rows: np.ndarray, batch: int = 64
) -> np.ndarray:
  """The photo's loss with other captions.

  Args:
    world: the model and the batch.
    clip_tokens: int32[Y, m].
    rows: int[Y], which photo each of them is for.
    batch: captions at a time.

  Returns:
    float64[Y].
  """
  found = []
  for start in range(0, len(rows), batch):
    some = clip_tokens[start : start + batch], rows[start : start + batch]
    spare = batch - len(some[1])
    padded = np.pad(some[0], ((0, spare), (0, 0))), np.pad(some[1], (0, spare))
    costs = np.asarray(world.costs(*padded), np.float64)
    found.append(costs[: len(some[1])])
  return np.concatenate(found)


def oracle(
  world: World,
  retokenise: captions.Retokenise,
  candidates: int,
  writable: np.ndarray,
) -> list[Position]:
  """What swapping each token for each candidate really costs.

  Args:
    world: the model and the batch.
    retokenise: of the tokenizers.
    candidates: C: the token there, and the likeliest others.
    writable: bool[V], ids which may stand in a caption.
  """
  mask = world.photos["caption_mask"]
  tokens = world.photos["caption_tokens"]
  likely = np.where(writable, np.asarray(world.logits), -np.inf)
  swapped, places = [], []
  for x, i in zip(*np.nonzero(mask), strict=True):
    order = np.argsort(-likely[x, i], kind="stable")
    others = order[order != tokens[x, i]][: candidates - 1]
    ids = np.concatenate([[tokens[x, i]], others])
    rows = np.repeat(tokens[x][None], len(ids), axis=0)
    rows[:, i] = ids
    swapped.append(rows)
    places.append((x, i, ids))
  rows = np.repeat([x for x, *_ in places], [len(i) for *_, i in places])
  clip_tokens, _, _ = retokenise(np.concatenate(swapped), mask[rows])
  costs = iter(measure(world, clip_tokens, rows))
  found = []
  for x, i, ids in places:
    some = np.array([next(costs) for _ in ids])
    found.append(Position(int(x), int(i), ids, some - some[0]))
  return found


def sampled(
  world: World, retokenise: captions.Retokenise, samples: int, rounds: int
) -> np.ndarray:
  """RLOO's gradient to the logits, the mean of several draws, [X, n, V].

  Args:
    world: the model and the batch.
    retokenise: of the tokenizers.
    samples: K.
    rounds: draws of K captions.
  """
  mask = np.asarray(world.photos["caption_mask"])
  x, n = mask.shape
  p = np.asarray(jax.nn.softmax(world.logits, axis=-1))
  total = np.zeros(p.shape)
  draw = jax.jit(
    lambda key: jax.random.categorical(key, world.logits, shape=(samples, x, n))
  )
  for number in range(rounds):
    y = np.asarray(draw(jax.random.key(number))).swapaxes(0, 1)
    y = np.where(mask[:, None], y, world.photos["caption_tokens"][:, None])
    rows = np.repeat(np.arange(x), samples)
    z, _, _ = retokenise(y.reshape(-1, n), mask[rows])
    costs = measure(world, z, rows).reshape(x, samples)
    others = (costs.sum(-1, keepdims=True) - costs) / (samples - 1)
    advantages = (costs - others) / samples
    for k in range(samples):
      weight = advantages[:, k, None, None] * mask[..., None]
      total -= weight * p
      np.add.at(
        total,
        (np.arange(x)[:, None], np.arange(n), y[:, k]),
        weight[..., 0],
      )
  return total / rounds


def score(
  world: World, positions: list[Position], found: np.ndarray
) -> list[Scores]:
  """Holds a gradient [X, n, V] against the oracle, photo by photo."""
  p = np.asarray(jax.nn.softmax(world.logits, axis=-1), np.float64)
  mask = np.asarray(world.photos["caption_mask"])
  by_photo: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
  for at in positions:
    ids = at.candidates
    guess = found[at.photo, at.place, ids] / p[at.photo, at.place, ids]
    by_photo.setdefault(at.photo, []).append((guess - guess[0], at.costs))
  scores = []
  for photo, pairs in by_photo.items():
    rows = found[photo][mask[photo]]
    guesses = np.concatenate([guess for guess, _ in pairs])
    costs = np.concatenate([cost for _, cost in pairs])
    size = np.linalg.norm(guesses) * np.linalg.norm(costs)
    scores.append(
      Scores(
        top_1=_mean(pairs, lambda g, c: np.argmin(g) == np.argmin(c)),
        rank=_mean(pairs, _spearman),
        sign=_mean(
          pairs, lambda g, c: np.mean(np.sign(g[1:]) == np.sign(c[1:]))
        ),
        cosine=float(guesses @ costs / size) if size else 0.0,
        norm=float(np.linalg.norm(rows, axis=-1).mean()),
        directions=_directions(rows, p[photo][mask[photo]]),
      )
    )
  return scores


def _mean(
  pairs: list[tuple[np.ndarray, np.ndarray]], of: Callable[..., Any]
) -> float:
  return float(np.mean([of(guess, cost) for guess, cost in pairs]))


def _spearman(guess: np.ndarray, cost: np.ndarray) -> float:
  """0 where one of the two ranks nothing."""
  if np.ptp(guess) == 0 or np.ptp(cost) == 0:
    return 0.0
  return float(scipy.stats.spearmanr(guess, cost).statistic)


def _directions(rows: np.ndarray, p: np.ndarray) -> int:
  """The rank, over a caption's positions, of what each word is told.

  Of the gradients over their probabilities, less what all words are told
  alike; directions a thousandth as large as the largest do not count.
  """
  real = (p > 0).all(0)  # Padded entries are told nothing.
  told = rows[:, real] / p[:, real]
  told -= told.mean(-1, keepdims=True)
  return int(
    np.linalg.matrix_rank(told, tol=1e-3 * np.linalg.norm(told, 2))
  )
