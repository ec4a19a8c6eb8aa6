"""Beam search against enumeration and transformers; nucleus against numpy."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_agent
from hypothesis import strategies as st
from toy_agent import END, EOS, IMG, A, B

from photochat_jax import beam, decoding
from photochat_jax.data import dialogue
from photochat_jax.data.schema import Turn
from photochat_jax.models import llama
from photochat_jax.models.photochat import PhotoChat

# A toy language: four tokens, the last ends, and every prefix has logits of
# its own. A prefix is a number to the base four.
V, N, STOP, FILL = 4, 4, 3, 9


def talk(rows, seed=0, scale=1.5):
  """Logits [rows, N, V**N, V] of what follows each prefix of each length."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=(rows, N, V**N, V)).astype(np.float32) * scale


@functools.partial(jax.jit, static_argnums=1)
def run(table, num_beams, penalty):
  rows = len(table)

  def write(state, tokens, step):
    row, prefix = state
    prefix = prefix * V + tokens
    return table[row, step + 1, prefix], (row, prefix)

  def take(state, chosen):
    return tuple(x[chosen] for x in state)

  state = jnp.arange(rows), jnp.zeros(rows, jnp.int32)
  return beam.search(
    table[:, 0, 0], state, write, take, (STOP,), num_beams, N, penalty, FILL
  )


def chances(table, prefix):
  """log p [V] of what follows a prefix of one row, in float64."""
  number = 0
  for token in prefix:
    number = number * V + token
  logits = np.float64(table[len(prefix), number])
  return logits - np.log(np.sum(np.exp(logits)))


def enumerate_answers(table, penalty):
  """(score, answer) of all there are."""
  for length in range(1, N + 1):
    for answer in itertools.product(range(V), repeat=length):
      ended = answer[-1] == STOP
      if STOP in answer[:-1] or not (ended or length == N):
        continue
      sums = sum(
        chances(table, answer[:i])[t] for i, t in enumerate(answer)
      )
      yield sums / length**penalty, answer


def plain_beams(table, num_beams, penalty):
  """The search in words: lists of (sum, answer), never stopping early."""
  beams, answers = [(0.0, ())], []
  for length in range(1, N + 1):
    grown = [
      (total + chance, (*answer, token))
      for total, answer in beams
      for token, chance in enumerate(chances(table, answer))
    ]
    grown = sorted(grown, reverse=True)[: 2 * num_beams]
    over = [a[-1] == STOP or length == N for _, a in grown]
    answers += [
      (total / length**penalty, answer)
      for (total, answer), ends in list(zip(grown, over, strict=True))[
        :num_beams
      ]
      if ends
    ]
    going = [g for g, ends in zip(grown, over, strict=True) if not ends]
    beams = going[:num_beams]
  return max(answers)


def assert_same(found, wanted):
  tokens, scores = map(np.asarray, found)
  for row, (score, answer) in enumerate(wanted):
    assert tuple(tokens[row][: len(answer)]) == answer
    assert (tokens[row][len(answer) :] == FILL).all()
    np.testing.assert_allclose(scores[row], score, rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all_answers(penalty):
  table = talk(16)
  wanted = [max(enumerate_answers(row, penalty)) for row in table]
  assert_same(run(table, V**N, penalty), wanted)
  lengths = {len(answer) for _, answer in wanted}
  assert len(lengths) > 1


@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_few_beams_find_what_few_beams_can(num_beams):
  table, missed = talk(40, seed=1), 0
  for penalty in (0.0, 1.0):
    wanted = [plain_beams(row, num_beams, penalty) for row in table]
    best = [max(enumerate_answers(row, penalty)) for row in table]
    missed += sum(w != b for w, b in zip(wanted, best, strict=True))
    assert_same(run(table, num_beams, penalty), wanted)
  assert missed  # They do overlook answers, or this test shows little.


def test_a_row_does_not_depend_on_the_others():
  table = talk(5, seed=2)
  tokens, scores = run(table, 3, 1.0)
  for row in range(5):
    alone = run(np.repeat(table[row : row + 1], 5, 0), 3, 1.0)
    np.testing.assert_array_equal(alone[0][0], tokens[row])
    np.testing.assert_array_equal(alone[1][0], scores[row])


def test_what_is_forbidden_is_never_written():
  table = talk(6, seed=3)
  table[..., 1] = -np.inf
  table[:, 0, :, STOP] = -np.inf
  wanted = [
    max(a for a in enumerate_answers(row, 1.0) if not np.isinf(a[0]))
    for row in table
  ]
  assert_same(run(table, V**N, 1.0), wanted)
  assert not (np.asarray(run(table, 2, 1.0)[0]) == 1).any()
  # Fewer answers than beams: one word, thrice, and no end before.
  table[:, :, :, 2:] = -np.inf
  tokens, scores = run(table, 3, 1.0)
  assert (np.asarray(tokens) == 0).all() and not np.asarray(scores).any()


@pytest.fixture(scope="module")
def model():
  return PhotoChat(toy_agent.config())


def start(model, params, prompts, limit):
  """`decoding.prefill` of prompts of different lengths, without photos."""
  spec = toy_agent.spec(model)
  contexts = [
    dialogue.encode_context(
      [Turn(1, text)], 0, toy_agent.WordTokenizer(), spec
    )
    for text in prompts
  ]
  batch = dialogue.left_pad(
    contexts, 12, toy_agent.WordTokenizer(), spec, lambda photo: None
  )
  logits, cache = decoding.prefill(model, params, batch, 12 + limit)
  return contexts, logits, cache, batch["positions"][:, -1] + 1


@functools.partial(jax.jit, static_argnums=0)
def reread(model, params, tokens):
  """Logits [L, V] of tokens [1, L] without a cache."""
  places = jnp.arange(tokens.shape[1])[None]
  hidden, _ = model.converse(params, tokens, places, jnp.ones_like(tokens))
  return model.logits(params, hidden)[0]


def test_scores_are_those_of_the_whole_text(model):
  # The cache goes with its beam: else the scores are of other texts.
  rules = decoding.Rules.of(toy_agent.WordTokenizer(), 2)
  opened = 0
  for seed in range(3):
    params = toy_agent.random_params(model, seed)
    contexts, logits, cache, places = start(
      model, params, ["a", "b c d e", "h g"], 6
    )
    tokens, scores = beam.decode(
      model, params, rules, 6, 4, logits, cache, places, np.float32(1)
    )
    for context, answer, score in zip(contexts, tokens, scores, strict=True):
      answer = np.asarray(answer).tolist()
      ends = [i for i, t in enumerate(answer) if t in (EOS, END)]
      length = ends[0] + 1 if ends else 6
      whole = np.zeros((1, 20), np.int32)  # What follows changes nothing.
      read = [*context.tokens, *answer[:length]]
      whole[0, : len(read)] = read
      after = np.asarray(reread(model, params, whole))
      after = after[len(context.tokens) - 1 :][:6]
      # In a block from its `[img]` on, with so many caption tokens before.
      inside = np.cumsum([0, *(t == IMG for t in answer)])[:6] > 0
      count = np.maximum(np.cumsum(inside) - 1, 0)
      allowed = rules.apply(after, inside, count)
      chance = np.asarray(jax.nn.log_softmax(allowed))
      total = chance[np.arange(length), answer[:length]].sum()
      np.testing.assert_allclose(total / length, score, rtol=1e-4)
      opened += IMG in answer[:length]
  assert opened  # The rules of a block were met.


@pytest.mark.parametrize("num_beams, penalty", [(3, 1.0), (4, 0.0), (2, 0.5)])
def test_it_is_the_search_of_transformers(
  tmp_path, model, num_beams, penalty
):
  torch = pytest.importorskip("torch")
  import hf_models

  pair = hf_models.language(
    tmp_path, draw={"kernel_scale": 0.4}, vocab_size=10, eos_token_id=3
  )
  config = toy_agent.config()
  ours = PhotoChat(
    type(config)(**vars(config) | {"language": pair.config})
  )
  params = {"language_model": pair.params}
  prompt = np.random.default_rng(0).integers(3, 10, (6, 5)).astype(np.int32)
  with torch.inference_mode():
    theirs = pair.oracle.generate(
      torch.from_numpy(prompt).long(),
      attention_mask=torch.ones(prompt.shape, dtype=torch.long),
      max_new_tokens=8,
      num_beams=num_beams,
      length_penalty=penalty,
      early_stopping="never",
      do_sample=False,
      pad_token_id=0,
      return_dict_in_generate=True,
      output_scores=True,
    )
  places = np.broadcast_to(np.arange(5, dtype=np.int32), prompt.shape)
  cache = llama.init_cache(pair.config, 6, 5 + 8)
  hidden, cache = jax.jit(ours.converse)(
    params, prompt, places, np.ones_like(prompt), cache=cache
  )
  rules = decoding.Rules(-1, -1, 3, (-1,), 0)
  tokens, scores = beam.decode(
    ours,
    params,
    rules,
    8,
    num_beams,
    ours.logits(params, hidden[:, -1]),
    cache,
    places[:, -1] + 1,
    np.float32(penalty),
  )
  wanted = theirs.sequences[:, 5:].numpy()
  over = np.cumsum(wanted == 3, axis=1) - (wanted == 3) > 0
  tokens = np.asarray(tokens)[:, : wanted.shape[1]]
  np.testing.assert_array_equal(tokens, np.where(over, -1, wanted))
  np.testing.assert_allclose(scores, theirs.sequences_scores, rtol=1e-4)
  lengths = set((~over).sum(axis=1).tolist())
  assert len(lengths) > 1, lengths


def smallest_set(logits, top_p):
  """Ids of the fewest likeliest tokens that reach `top_p`, and its edge."""
  chance = np.exp(np.float64(logits) - np.max(logits))
  chance /= chance.sum()
  order = np.argsort(-chance, kind="stable")
  reached = np.cumsum(chance[order])
  count = int(np.argmax(reached >= top_p - 1e-12)) + 1
  least = logits[order[count - 1]]
  return set(np.flatnonzero(logits >= least)), np.abs(reached - top_p).min()


@hypothesis.given(
  st.integers(0, 2**20),
  st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99]),
  st.integers(1, 30),
  st.booleans(),
)
def test_nucleus_is_the_smallest_set(seed, top_p, count, coarse):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=count).astype(np.float32) * 3
  if coarse:  # Many tokens of one chance: they stay together.
    logits = np.round(logits)
  padded = np.full(32, -np.inf, np.float32)
  padded[:count] = logits
  kept, edge = smallest_set(logits, top_p)
  hypothesis.assume(edge > 1e-5)
  found = np.asarray(decoding.nucleus(padded[None], top_p))[0]
  assert set(np.flatnonzero(found > -np.inf)) == kept
  np.testing.assert_array_equal(found[list(kept)], padded[list(kept)])


def test_nucleus_of_all_and_of_almost_nothing():
  logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32) * 9
  np.testing.assert_array_equal(decoding.nucleus(logits, 1.0), logits)
  found = np.asarray(decoding.nucleus(logits, 1e-9))
  np.testing.assert_array_equal(
    found > -np.inf, logits == logits.max(axis=1, keepdims=True)
  )


def test_samples_come_from_the_nucleus_as_often_as_they_should(
  model, monkeypatch
):
  draws = 400
  jax.clear_caches()
  # Logits 10, 9 and eight times 0: at temperature 2 chances of about 0.57,
  # 0.35 and 0.0095 each.
  toy_agent.script(monkeypatch, 3, [[[A, B]]] * draws)
  rules = decoding.Rules.of(toy_agent.WordTokenizer(), 3)
  numbers = np.arange(draws, dtype=np.uint32) * 7

  def sample(top_p, numbers):
    tokens, _ = decoding.decode(
      model,
      {},
      rules,
      1,
      model.logits({}, np.full((draws, 1), 2)),
      {},
      np.full(draws, 3),
      np.zeros(draws, bool),
      np.float32(2),
      np.uint32(5),
      numbers,
      np.float32(top_p),
    )
    return np.asarray(tokens)[:, 0]

  found = sample(0.9, numbers)
  wanted = np.exp(5) / (np.exp(5) + np.exp(4.5))
  assert set(found) == {A, B}
  share = np.mean(found == A)
  assert abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / draws)
  assert len(set(sample(1.0, numbers))) > 2
  # A draw belongs to its number, not to its place.
  np.testing.assert_array_equal(sample(0.9, numbers[::-1].copy()), found[::-1])
  jax.clear_caches()
