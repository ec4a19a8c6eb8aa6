"""The language model against transformers' `LlamaForCausalLM`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.checkpoints import files
from photochat_jax.checkpoints import llama as checkpoint
from photochat_jax.models import llama

torch = pytest.importorskip("torch")
import hf_compare  # noqa: E402
import hf_models  # noqa: E402

LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
# Name: (differences of config.json, fields of ours). Rope in the ways of
# transformers 5, of 4, and of those before 4.43.
CASES = {
  "odd sizes, one key head": (
    {
      "vocab_size": 131,
      "hidden_size": 27,
      "intermediate_size": 41,
      "num_attention_heads": 3,
      "num_key_value_heads": 1,
      "head_dim": 10,
      "rope_theta": 100.0,
      "rope_scaling": None,
      "tie_word_embeddings": False,
    },
    {},
  ),
  "linear, tied, no padding": (
    {
      "vocab_size": 256,
      "rope_scaling": {"type": "linear", "factor": 3.0},
      "tie_word_embeddings": True,
      "rms_norm_eps": 1e-2,
    },
    {"scan_unroll": 2},
  ),
  "llama3, tied": (
    {
      "hidden_size": 40,
      "num_attention_heads": 5,
      "num_key_value_heads": 5,
      "rope_theta": 500.0,
      "rope_scaling": LLAMA3,
      "tie_word_embeddings": True,
    },
    {},
  ),
  "llama3 of transformers 5": (
    {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    {"remat": "full"},
  ),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """A function from a case's name to its pair, each made once."""
  made = {}

  def get(name):
    if name not in made:
      changes, ours = CASES[name]
      folder = tmp_path_factory.mktemp("language")
      made[name] = hf_models.language(folder, ours, **changes)
    return made[name]

  return get


def draw(config, *shape):
  return np.random.default_rng(2).integers(0, config.vocab_size, shape)


def plain(tokens):
  """(positions, segments) of rows with one sequence each."""
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return positions, np.ones_like(tokens)


def embed(pair, tokens):
  return pair.params["embed_tokens"]["embedding"][tokens]


@pytest.mark.parametrize("name", CASES)
def test_scores_and_all_gradients_equal_the_originals(pairs, name):
  pair = pairs(name)
  module, vocabulary = llama.Llama(pair.config), pair.config.vocab_size
  tokens = draw(pair.config, 2, 9)
  weights = hf_compare.cotangent((2, 9, vocabulary), 3)

  vectors = pair.oracle.model.embed_tokens(torch.from_numpy(tokens))
  vectors.retain_grad()
  want = pair.oracle(inputs_embeds=vectors).logits
  (want * torch.from_numpy(weights)).sum().backward()

  def loss(params, shift):
    def apply(*args, **kwargs):
      return module.apply({"params": params}, *args, **kwargs)

    hidden, _ = apply(apply(tokens, method="embed") + shift, *plain(tokens))
    got = apply(hidden, method="logits")
    return jnp.sum(got[..., :vocabulary] * weights), got

  zeros = np.zeros(vectors.shape, np.float32)
  (by_params, by_vectors), got = jax.jit(
    jax.grad(loss, (0, 1), has_aux=True)
  )(pair.params, zeros)
  assert got.dtype == jnp.float32
  assert np.all(got[..., vocabulary:] == -np.inf)
  hf_compare.assert_outputs_equal(
    got[..., :vocabulary], want.detach().numpy()
  )
  hf_compare.assert_gradients_equal(by_params, hf_compare.gradients(pair))
  hf_compare.assert_gradients_equal(
    {"vectors": by_vectors}, {"vectors": vectors.grad.numpy()}
  )


@pytest.mark.parametrize("name", CASES)
def test_every_spelling_of_rope_is_the_same_config(pairs, name):
  changes, ours = CASES[name]
  # The pair's config is of the file that transformers 5 wrote.
  written = files.read_json(pairs(name).folder / "config.json")
  assert "rope_scaling" not in written and "rope_theta" not in written
  given = checkpoint.read_config(hf_models.LANGUAGE | changes, **ours)
  for field in ("rope_theta", "rope_scaling", "size_per_head"):
    assert getattr(given, field) == getattr(pairs(name).config, field)


@pytest.fixture(scope="module")
def grouped(pairs):
  """(pair, its compiled forward pass) of a model with grouped heads."""
  pair = pairs("linear, tied, no padding")
  module = llama.Llama(pair.config)
  return pair, jax.jit(
    lambda *args: module.apply({"params": pair.params}, *args)
  )


def alone(pair, tokens):
  """The original's hidden states of one sequence without padding."""
  with torch.no_grad():
    return pair.oracle.model(torch.from_numpy(tokens[None]))[0][0].numpy()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_it_were_not_there(grouped, side):
  pair, forward = grouped
  tokens, lengths = draw(pair.config, 2, 10), [10, 6]
  segments = np.zeros((2, 10), np.int32)
  positions = np.zeros((2, 10), np.int32)
  spans = [
    slice(0, length) if side == "right" else slice(10 - length, 10)
    for length in lengths
  ]
  for row, span in enumerate(spans):
    segments[row, span] = 1
    positions[row, span] = np.arange(lengths[row])
  got, _ = forward(embed(pair, tokens), positions, segments)
  assert np.isfinite(got).all()
  for row, span in enumerate(spans):
    hf_compare.assert_outputs_equal(
      got[row, span], alone(pair, tokens[row, span])
    )


def test_packed_sequences_are_as_if_alone(grouped):
  pair, forward = grouped
  tokens = draw(pair.config, 2, 10)
  segments = np.array([[1] * 4 + [2] * 5 + [0], [2] * 7 + [5] * 3])
  positions = np.array([[*range(4), *range(5), 0], [*range(7), *range(3)]])
  got, _ = forward(embed(pair, tokens), positions, segments)
  for row, span in [
    (0, slice(0, 4)),
    (0, slice(4, 9)),
    (1, slice(0, 7)),
    (1, slice(7, 10)),
  ]:
    hf_compare.assert_outputs_equal(
      got[row, span], alone(pair, tokens[row, span])
    )


@pytest.mark.parametrize("steps", [(1,) * 10, (6, 3, 1)])
def test_cached_decoding_equals_the_original_without_a_cache(grouped, steps):
  pair, forward = grouped
  tokens = draw(pair.config, 2, 10)
  starts = np.array([[0], [2]])  # Row 1 has two places of left padding.
  segments = (np.arange(10) >= starts).astype(np.int32)
  positions = np.maximum(np.arange(10) - starts, 0)
  embeds = embed(pair, tokens)
  # Slots beyond the answer must stay without effect.
  cache = llama.init_cache(pair.config, batch=2, length=13)
  pieces, at = [], 0
  for length in steps:
    span = slice(at, at + length)
    hidden, cache = forward(
      embeds[:, span], positions[:, span], segments[:, span], cache
    )
    pieces.append(hidden)
    at += length
  assert int(cache["index"]) == 10
  got = np.concatenate(pieces, axis=1)
  for row, start in enumerate(starts[:, 0]):
    hf_compare.assert_outputs_equal(
      got[row, start:], alone(pair, tokens[row, start:])
    )
