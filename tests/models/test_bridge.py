"""The bridge against dense float64 references and its closed forms."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from photochat_jax.models import bridge

BOS, EOS, PAD = 0, 1, 2
# X photos, n positions, m slots, V real and padded, C, d: n < m, n > m, and
# the smallest. Few, because each is compiled for every matrix.
SHAPES = [
  (2, 3, 6, (7, 10), 9, 4),
  (3, 7, 4, (12, 16), 6, 5),
  (1, 1, 3, (2, 2), 5, 2),
]
MATRICES = ['none', 'static', 'all_pairs', 'aligned']


def _sparse(dense):
  rows, cols = np.nonzero(dense)
  return {
    'rows': rows.astype(np.int32),
    'cols': cols.astype(np.int32),
    'weights': dense[rows, cols].astype(np.float32),
  }


def _dense_map(rng, real, vocab, num_clip):
  """A random row-stochastic map [V, C] some of whose rows are empty."""
  dense = rng.random((vocab, num_clip)) * (rng.random((vocab, num_clip)) < 0.4)
  dense[rng.random(vocab) < 0.2] = 0
  dense[real:] = 0
  total = dense.sum(-1, keepdims=True)
  # Weights as the program holds them, so that 1e-5 measures the program.
  return (dense / np.where(total, total, 1)).astype(np.float32).astype(float)


def _example(shape, seed):
  """Random inputs; lengths run from no token to more than there are slots."""
  num_photos, n, m, (real, vocab), num_clip, d = shape
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 2, (num_photos, n, vocab)).astype(np.float32)
  logits[..., real:] = -np.inf
  maps = {
    name: _dense_map(rng, real, vocab, num_clip)
    for name in ('static', 'final', 'internal')
  }
  clip_tokens = np.full((num_photos, m), PAD, np.int32)
  alignment = np.zeros((num_photos, m, n), np.float32)
  mask = np.zeros((num_photos, n), bool)
  for x in range(num_photos):
    length = rng.integers(0, n + 1)
    mask[x, :length] = True
    # Fewer writers than tokens: some write nothing or fall past the last slot.
    writers = rng.integers(1, length + 1) if length else 0
    pieces = rng.integers(1, m - 1) if length else 0
    share = rng.random((pieces, writers)) * (
      rng.random((pieces, writers)) < 0.6
    )
    share[:, :1] += 0.1
    alignment[x, 1 : 1 + pieces, :writers] = share / share.sum(
      -1, keepdims=True
    )
    clip_tokens[x, 0] = BOS
    clip_tokens[x, 1 : 1 + pieces] = rng.integers(3, num_clip, pieces)
    clip_tokens[x, 1 + pieces] = EOS
  return {
    'logits': logits,
    'tokens': rng.integers(0, real, (num_photos, n)).astype(np.int32),
    'clip_tokens': clip_tokens,
    'alignment': alignment,
    'final': rng.random((num_photos, n)) < 0.5,
    'caption_mask': mask,
    'clip_embedding': rng.normal(size=(num_clip, d)).astype(np.float32),
    'maps': maps,
    'weights': rng.normal(size=(num_photos, m, d)).astype(np.float32),
  }


def _vocab_map(maps):
  specials = np.array([BOS, EOS, PAD], np.int32)
  sparse = {name: _sparse(dense) for name, dense in maps.items()}
  return {**sparse, 'specials': specials}


def _keys(num_photos):
  return jax.random.split(jax.random.key(11), num_photos)


@functools.partial(
  jax.jit,
  static_argnums=0,
  # Tiny arrays, many programs: compiling is what takes the time.
  compiler_options={'xla_backend_optimization_level': 0},
)
def _run(config, inputs, weights, keys, tau):
  def loss(logits, embedding):
    out = bridge.cross(
      config, **{**inputs, 'logits': logits, 'clip_embedding': embedding},
      keys=keys, tau=tau,
    )
    return jnp.sum(jnp.tanh(out) * weights), out

  (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
    inputs['logits'], inputs['clip_embedding']
  )
  return out, *grads


def _ours(
  example, matrix, draw='gold', tau=1.0, estimator='straight_through'
):
  inputs = {
    key: value
    for key, value in example.items()
    if key not in ('maps', 'weights')
  }
  inputs['vocab_map'] = _vocab_map(example['maps'])
  keys = _keys(len(example['tokens'])) if draw == 'gumbel' else None
  config = bridge.BridgeConfig(draw=draw, matrix=matrix, estimator=estimator)
  return _run(config, inputs, example['weights'], keys, tau)


def _dense_embeddings(torch, matrix, soft, example, x, embedding):
  """One photo's embeddings [m, d] with the matrix built, from soft tokens.

  `soft[n, V]` has one-hot values and the softmax's gradient.
  """
  ids = torch.tensor(example['clip_tokens'][x]).long()
  tokens = example['tokens'][x]
  count = int(example['caption_mask'][x].sum())
  share = torch.tensor(example['alignment'][x]).double()
  maps = {
    name: torch.tensor(dense) for name, dense in example['maps'].items()
  }
  m, num_clip = len(ids), len(embedding)
  read = torch.nn.functional.one_hot(ids, num_clip).double() @ embedding
  if matrix == 'none':
    return read
  if matrix == 'static':
    kept = min(count, m - 2)
    tail = [EOS] + [PAD] * (m - kept - 2)
    return torch.cat([
      embedding[[BOS]], soft[:kept] @ maps['static'] @ embedding,
      embedding[tail],
    ])
  if matrix == 'all_pairs':
    pairs = torch.zeros(soft.shape[1], num_clip, dtype=torch.float64)
    for v in set(tokens[:count].tolist()):
      for c in set(ids.tolist()) - {BOS, EOS, PAD}:
        pairs[v, c] = 1
    moved = (soft - soft.detach())[:count] @ pairs @ embedding
    return read + moved.sum(0)
  rows = []
  for j in range(m):
    row = (1 - share[j].sum()) * read[j]
    for i in range(count):
      table = maps['final' if example['final'][x][i] else 'internal'].clone()
      table[tokens[i]] = torch.nn.functional.one_hot(ids[j], num_clip).double()
      row = row + share[j, i] * (soft[i] @ table @ embedding)
    rows.append(row)
  return torch.stack(rows)


def _reference(torch, example, matrix, draw, tau, estimator):
  """Embeddings and the gradients to logits and embedding, in float64."""
  logits = torch.tensor(example['logits']).double().requires_grad_()
  embedding = torch.tensor(example['clip_embedding']).double().requires_grad_()
  weights = torch.tensor(example['weights']).double()
  num_photos, n, vocab = logits.shape
  noise = np.zeros(logits.shape)
  if draw == 'gumbel':
    noise = np.stack(
      [jax.random.gumbel(key, (n, vocab)) for key in _keys(num_photos)]
    )
  soft = torch.softmax((logits + torch.tensor(noise)) / tau, -1)
  hard = torch.nn.functional.one_hot(
    torch.tensor(example['tokens']).long(), vocab
  ).double()
  if estimator == 'reinmax':
    # Algorithm 2 of Liu et al. 2023, line by line.
    finite = logits.clamp(min=-1e9)
    pi0 = torch.softmax(finite, -1)
    pi1 = (hard + torch.softmax(finite / tau, -1)) / 2
    pi1 = torch.softmax((pi1.log() - finite).detach() + finite, -1)
    soft = 2 * pi1 - pi0 / 2
  through = hard + soft - soft.detach()

  def embeddings(tokens, table):
    return torch.stack([
      _dense_embeddings(torch, matrix, tokens[x], example, x, table)
      for x in range(num_photos)
    ])

  # The embedding is a constant in the way to the logits, and the tokens are
  # one in the way to the embedding.
  out = embeddings(through, embedding.detach())
  logits_bar = torch.zeros_like(logits)
  if out.requires_grad:
    (logits_bar,) = torch.autograd.grad(
      (out.tanh() * weights).sum(), logits
    )
  name = 'static' if matrix == 'static' else 'none'
  read = torch.stack([
    _dense_embeddings(torch, name, hard[x], example, x, embedding)
    for x in range(num_photos)
  ])
  (embedding_bar,) = torch.autograd.grad(
    (read.tanh() * weights).sum(), embedding
  )
  return [t.detach().numpy() for t in (out, logits_bar, embedding_bar)]


@pytest.fixture(scope='module')
def torch():
  torch = pytest.importorskip('torch')
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield torch
  torch.set_num_threads(threads)


@pytest.mark.parametrize('draw, estimator', [
  ('gold', 'straight_through'),
  ('gumbel', 'straight_through'),
  ('gold', 'reinmax'),
])
@pytest.mark.parametrize('matrix', MATRICES)
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
  shape=st.integers(0, len(SHAPES) - 1),
  seed=st.integers(0, 2**32 - 1),
  tau=st.floats(0.1, 5.0),
)
def test_equals_the_dense_float64_reference(
  torch, matrix, draw, estimator, shape, seed, tau
):
  # Noise compiles slowly: one shape is enough for it.
  shape = SHAPES[0 if draw == 'gumbel' else shape]
  example = _example(shape, seed)
  actual = _ours(example, matrix, draw, tau, estimator)
  expected = _reference(torch, example, matrix, draw, tau, estimator)
  for ours, reference in zip(actual, expected, strict=True):
    # Gradients grow as 1 / tau: 1e-5 of the largest entry.
    scale = max(1.0, np.abs(reference).max())
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5 * scale)


def test_all_pairs_equals_its_closed_form():
  tau = 0.7
  example = _example(SHAPES[0], 3)
  example['caption_mask'][:] = [[True, True, True], [True, False, False]]
  example['tokens'][0] = [4, 4, 1]
  example['clip_tokens'][0] = [BOS, 5, 7, 5, EOS, PAD]
  example['alignment'][0] = 0
  example['alignment'][0, [1, 2, 3], [0, 1, 2]] = 1
  out, actual, _ = _ours(example, 'all_pairs', tau=tau)
  cotangent = example['weights'][0] * (1 - np.tanh(np.asarray(out[0])) ** 2)
  embedding = example['clip_embedding'].astype(float)
  strength = sum(
    float(ct @ embedding[c]) for ct in cotangent for c in (5, 7)
  )
  scores = np.exp(example['logits'][0].astype(float) / tau)
  soft = scores / scores.sum(-1, keepdims=True)
  inside = np.isin(np.arange(10), [1, 4])
  expected = strength / tau * soft * (
    inside - (soft * inside).sum(-1, keepdims=True)
  )
  np.testing.assert_allclose(actual[0], expected, rtol=1e-4, atol=1e-6)


def test_all_pairs_sends_one_direction_and_aligned_more():
  example = _example((1, 3, 6, (7, 7), 9, 4), 5)
  example['caption_mask'][:] = True
  example['tokens'][0] = [0, 3, 5]
  example['clip_tokens'][0] = [BOS, 4, 6, 8, EOS, PAD]
  example['alignment'][0] = np.eye(6, 3, -1)
  soft = np.asarray(jax.nn.softmax(example['logits'][0].astype(float)))
  ranks = {}
  for matrix in ('all_pairs', 'aligned'):
    _, logits_bar, _ = _ours(example, matrix)
    # What each position was told, up to a constant per position.
    told = np.asarray(logits_bar[0]) / soft
    told -= told[:, [1]]
    ranks[matrix] = np.linalg.matrix_rank(told, tol=1e-4 * np.abs(told).max())
  assert ranks == {'all_pairs': 1, 'aligned': 3}


def test_aligned_worked_out_by_hand():
  # One position wrote all of the one piece. E = (1, 0), (0, 1), (2, 1); token
  # 0 reads as piece 0, token 1 as piece 1; y = 1 was re-tokenised to piece 2.
  # Slot 1's cotangent (3, 5) tells (token 0: 3, y: 11), p = (1/2, 1/2), so
  # dl = 1/2 * ((3, 11) - 7) / tau.
  identity = _sparse(np.eye(2, 3))
  zero = {name: value[:0] for name, value in identity.items()}
  out, pull = jax.vjp(
    lambda logits: bridge.cross(
      bridge.BridgeConfig(tau=4.0), logits, jnp.array([[1]]),
      jnp.array([[0, 2, 1]]), jnp.array([[[0.0], [1.0], [0.0]]]),
      jnp.array([[True]]), jnp.array([[True]]),
      jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]),
      {'static': zero, 'final': identity, 'internal': zero,
       'specials': np.array([0, 1, 1], np.int32)},
    ),
    jnp.zeros((1, 1, 2)),
  )
  np.testing.assert_array_equal(out[0], [[1, 0], [2, 1], [0, 1]])
  (actual,) = pull(jnp.array([[[9.0, 9.0], [3.0, 5.0], [9.0, 9.0]]]))
  np.testing.assert_allclose(actual, [[[-0.5, 0.5]]], rtol=1e-6)


@pytest.mark.parametrize(
  'matrix, draw', [*((m, 'gold') for m in MATRICES), ('aligned', 'gumbel')]
)
def test_no_caption_means_no_gradient_and_no_nan_anywhere(matrix, draw):
  example = _example(SHAPES[0], 7)
  example['caption_mask'][0] = False
  example['caption_mask'][1] = True
  example['alignment'][:] = np.eye(6, 3, -1) * np.array([[[0]], [[1]]])
  example['clip_tokens'][1] = [BOS, 4, 6, 8, EOS, PAD]
  example['logits'][0] = -np.inf
  with jax.debug_nans(True), jax.disable_jit():
    out, logits_bar, embedding_bar = _ours(example, matrix, draw, tau=0.5)
  chex.assert_tree_all_finite((out, logits_bar, embedding_bar))
  np.testing.assert_array_equal(logits_bar[0], 0)
  np.testing.assert_array_equal(logits_bar[1][:, 7:], 0)
  assert np.any(logits_bar[1] != 0) == (matrix != 'none')


def test_masked_logits_are_never_read():
  example = _example(SHAPES[0], 7)
  example['caption_mask'][:] = [True, True, False]
  clean = _ours(example, 'aligned')
  example['logits'][:, 2] = np.nan
  chex.assert_trees_all_equal(_ours(example, 'aligned'), clean)


@pytest.mark.parametrize('matrix', ['static', 'aligned'])
def test_a_table_made_before_gives_the_same_gradient(matrix):
  example = _example(SHAPES[0], 9)
  config = bridge.BridgeConfig(matrix=matrix)
  vocab_map = _vocab_map(example['maps'])
  table = bridge.vocabulary_table(
    config, example['clip_embedding'], vocab_map, 10
  )

  @jax.jit
  def gradient(table):
    names = ('tokens', 'clip_tokens', 'alignment', 'final', 'caption_mask',
             'clip_embedding')
    return jax.grad(
      lambda logits: jnp.sum(example['weights'] * bridge.cross(
        config, logits, *(example[name] for name in names), vocab_map,
        table=table,
      ))
    )(example['logits'])

  expected = gradient(None)
  chex.assert_trees_all_close(
    gradient(table), expected, rtol=1e-5, atol=1e-6
  )
  assert np.any(gradient(0 * table) != expected)
  for other in ('none', 'all_pairs'):
    assert bridge.vocabulary_table(
      bridge.BridgeConfig(matrix=other), None, None, 10
    ) is None
