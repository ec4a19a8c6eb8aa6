"""models/llama.py against transformers' LlamaForCausalLM."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import llama

torch = pytest.importorskip('torch')
import torch_weights  # noqa: E402
import transformers  # noqa: E402

LLAMA3 = {
    'rope_type': 'llama3',
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 16,
}
BASE = llama.LlamaConfig(
    vocab_size=150,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=100.0,
    max_position_embeddings=64,
)
# Every feature of the architecture, alone or together.
CONFIGS = {
    'grouped heads': BASE,
    'one head each, tied': dataclasses.replace(
        BASE, num_key_value_heads=4, tie_word_embeddings=True, scan_unroll=2
    ),
    'wide heads, full vocabulary': dataclasses.replace(
        BASE, head_dim=12, vocab_size=256
    ),
    'linear, recomputed': dataclasses.replace(
        BASE,
        rope_scaling={'rope_type': 'linear', 'factor': 3.0},
        remat=True,
    ),
    'llama3, tied': dataclasses.replace(
        BASE, rope_scaling=LLAMA3, tie_word_embeddings=True
    ),
}


def hf_config(config):
  return transformers.LlamaConfig(
      **{
          name: getattr(config, name)
          for name in (
              'vocab_size',
              'hidden_size',
              'intermediate_size',
              'num_hidden_layers',
              'num_attention_heads',
              'num_key_value_heads',
              'rms_norm_eps',
              'tie_word_embeddings',
              'max_position_embeddings',
          )
      },
      head_dim=config.size_per_head,
      rope_parameters={
          'rope_type': 'default',
          'rope_theta': config.rope_theta,
          **dict(config.rope_scaling or ()),
      },
      attn_implementation='eager',
  )


@functools.cache
def build(config, seed=0):
  """(torch model, our module, our params), with the same weights."""
  model = transformers.LlamaForCausalLM(hf_config(config))
  model = torch_weights.randomise(model, seed)
  return model, llama.Llama(config), torch_weights.llama_params(model)


@functools.cache
def compiled(module):
  """(embeddings -> hidden, cache), jitted once per module."""
  return jax.jit(lambda params, *args: module.apply({'params': params}, *args))


def embed(module, params, tokens):
  return module.apply({'params': params}, tokens, method='embed')


def scores(module, params, hidden):
  return module.apply({'params': params}, hidden, method='logits')


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def init_shapes(config):
  return jax.eval_shape(
      llama.Llama(config).init,
      jax.random.key(0),
      jnp.zeros((1, 2, config.hidden_size)),
      jnp.zeros((1, 2), jnp.int32),
      jnp.ones((1, 2), jnp.int32),
  )['params']


def draw_tokens(config, shape, seed=0):
  return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


def plain(tokens):
  """(positions, segments) of rows with one sequence each."""
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return positions, np.ones_like(tokens)


@pytest.mark.parametrize('name', CONFIGS)
def test_scores_and_all_gradients_equal_transformers(name):
  config = CONFIGS[name]
  model, module, params = build(config)
  tokens = draw_tokens(config, (2, 9))
  weights = np.random.default_rng(1).standard_normal((2, 9, config.vocab_size))
  weights = (weights / weights.size).astype(np.float32)

  model.zero_grad()
  want = model(torch.from_numpy(tokens)).logits
  (want * torch.from_numpy(weights)).sum().backward()

  def loss(params):
    hidden, _ = module.apply(
        {'params': params}, embed(module, params, tokens), *plain(tokens)
    )
    got = scores(module, params, hidden)[..., : config.vocab_size]
    return jnp.sum(got * weights), got

  grads, got = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert got.dtype == jnp.float32
  assert np.std(want.detach().numpy()) > 0.3
  chex.assert_trees_all_close(got, want.detach().numpy(), atol=1e-4)
  want = torch_weights.llama_params(model, grad=True)
  assert all(np.abs(x).max() > 1e-5 for x in jax.tree.leaves(want))
  largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
  chex.assert_trees_all_close(grads, want, atol=1e-4 * largest, rtol=1e-4)


def test_padded_vocabulary_is_minus_infinity():
  _, module, params = build(BASE)
  hidden = np.ones((3, BASE.hidden_size), np.float32)
  got = scores(module, params, hidden)
  chex.assert_shape(got, (3, 256))
  assert np.isfinite(got[:, :150]).all()
  assert np.all(got[:, 150:] == -np.inf)
  grads = jax.grad(
      lambda p: jax.nn.logsumexp(scores(module, p, hidden)).sum()
  )(params)
  chex.assert_tree_all_finite(grads)


def test_left_padding_equals_transformers_without_padding():
  model, module, params = build(BASE)
  tokens = draw_tokens(BASE, (2, 8))
  lengths = [8, 5]
  segments = np.zeros((2, 8), np.int32)
  positions = np.zeros((2, 8), np.int32)
  for row, length in enumerate(lengths):
    segments[row, 8 - length :] = 1
    positions[row, 8 - length :] = np.arange(length)
  hidden, _ = compiled(module)(
      params, embed(module, params, tokens), positions, segments
  )
  chex.assert_tree_all_finite(hidden)
  for row, length in enumerate(lengths):
    with torch.no_grad():
      want = model.model(torch.from_numpy(tokens[row : row + 1, 8 - length :]))
    chex.assert_trees_all_close(
        hidden[row, 8 - length :], want[0][0].numpy(), atol=1e-4
    )


def test_two_packed_sequences_equal_the_two_alone():
  model, module, params = build(BASE)
  tokens = draw_tokens(BASE, (1, 11))
  parts = [slice(0, 4), slice(4, 9)]
  segments = np.array([[1] * 4 + [2] * 5 + [0] * 2])
  positions = np.array([[*range(4), *range(5), 0, 0]])
  embeds = embed(module, params, tokens)

  def loss(embeds, part):
    hidden, _ = compiled(module)(params, embeds, positions, segments)
    return jnp.sum(hidden[:, part] ** 3), hidden

  for part in parts:
    grads, hidden = jax.grad(loss, has_aux=True)(embeds, part)
    with torch.no_grad():
      want = model.model(torch.from_numpy(tokens[:, part]))[0].numpy()
    chex.assert_trees_all_close(hidden[:, part], want, atol=1e-4)
    # Nothing leaks: the other sequence and the padding get no gradient.
    inside = np.zeros(11, bool)
    inside[part] = True
    assert np.abs(grads[:, inside]).min() > 0
    assert not np.any(grads[:, ~inside])


@pytest.mark.parametrize('steps', [(1, 1, 1, 1), (3, 1)])
def test_cached_decoding_equals_transformers(steps):
  model, module, params = build(CONFIGS['llama3, tied'])
  config = module.config
  tokens = draw_tokens(config, (2, 10))
  starts = np.array([[0], [2]])  # row 1 has two places of left padding
  segments = (np.arange(10) >= starts).astype(np.int32)
  positions = np.maximum(np.arange(10) - starts, 0)
  embeds = embed(module, params, tokens)
  # Slots beyond the answer must stay without effect.
  cache = llama.init_cache(config, batch=2, length=13)
  pieces, at = [], 0
  for length in (6, *steps):
    span = slice(at, at + length)
    hidden, cache = compiled(module)(
        params, embeds[:, span], positions[:, span], segments[:, span], cache
    )
    pieces.append(hidden)
    at += length
  assert int(cache['index']) == 10
  got = np.concatenate(pieces, axis=1)
  for row, start in enumerate(starts[:, 0]):
    with torch.no_grad():
      want = model.model(torch.from_numpy(tokens[row : row + 1, start:]))
    chex.assert_trees_all_close(
        got[row, start:], want[0][0].numpy(), atol=1e-4
    )


def test_cache_of_a_lower_precision_is_kept_and_close():
  _, module, params = build(BASE)
  tokens = draw_tokens(BASE, (1, 6))
  embeds = embed(module, params, tokens)
  want, _ = compiled(module)(params, embeds, *plain(tokens))
  cache = llama.init_cache(BASE, 1, 6, dtype='bfloat16')
  got, cache = compiled(module)(params, embeds, *plain(tokens), cache)
  assert cache['key'].dtype == jnp.bfloat16
  assert got.dtype == jnp.float32
  chex.assert_trees_all_close(got, want, atol=0.1)
  assert np.abs(got - want).max() > 0


def test_a_cache_which_is_too_short_is_refused():
  _, module, params = build(BASE)
  tokens = draw_tokens(BASE, (1, 6))
  cache = llama.init_cache(BASE, batch=1, length=5)
  with pytest.raises(ValueError, match='5 slots for 6 vectors'):
    compiled(module)(
        params, embed(module, params, tokens), *plain(tokens), cache
    )


def test_rematerialisation_keeps_less_for_the_backward_pass():
  _, module, params = build(BASE)
  tokens = draw_tokens(BASE, (1, 16))

  def kept(config):
    module = llama.Llama(config)

    def backward(params):
      return jax.vjp(
          lambda embeds: module.apply(
              {'params': params}, embeds, *plain(tokens)
          )[0],
          embed(module, params, tokens),
      )[1]

    # What the backward pass holds besides the parameters.
    return count(jax.eval_shape(backward, params)) - count(params)

  assert kept(dataclasses.replace(BASE, remat=True)) < kept(BASE) / 3


def test_bfloat16_activations_stay_near_float32():
  _, module, params = build(BASE)
  tokens = draw_tokens(BASE, (2, 7))
  want, _ = compiled(module)(
      params, embed(module, params, tokens), *plain(tokens)
  )
  module = llama.Llama(dataclasses.replace(BASE, dtype='bfloat16'))
  got, _ = compiled(module)(
      params, embed(module, params, tokens), *plain(tokens)
  )
  assert got.dtype == jnp.bfloat16
  assert scores(module, params, got).dtype == jnp.float32
  chex.assert_trees_all_close(got.astype(jnp.float32), want, atol=0.2)


@pytest.mark.parametrize('name', CONFIGS)
def test_init_makes_every_parameter_with_the_expected_shape(name):
  _, _, params = build(CONFIGS[name])
  shapes = init_shapes(CONFIGS[name])
  chex.assert_trees_all_equal_shapes_and_dtypes(shapes, params)


@pytest.mark.parametrize(
    ('name', 'parameters'),
    [
        ('llama2_7b', 6_738_415_616),
        ('llama2_13b', 13_015_864_320),
        ('llama32_1b', 1_235_814_400),
        ('smollm2_135m', 134_515_008),
    ],
)
def test_named_sizes_have_the_published_parameter_counts(name, parameters):
  config = getattr(llama.LlamaConfig, name)()
  assert count(init_shapes(config)) == parameters
  with torch.device('meta'):
    model = transformers.LlamaForCausalLM(hf_config(config))
  assert sum(p.numel() for p in model.parameters()) == parameters


def test_tiny_reads_overrides_and_starts_with_finite_scores():
  config = llama.LlamaConfig.tiny(vocab_size=130, num_hidden_layers=2)
  module = llama.Llama(config)
  tokens = draw_tokens(config, (1, 4))
  embeds = jnp.ones((1, 4, config.hidden_size))
  params = jax.jit(module.init)(jax.random.key(0), embeds, *plain(tokens))
  params = params['params']
  kernel = params['layers']['mlp']['up_proj']['kernel']
  chex.assert_shape(kernel, (2, 128, 384))
  assert not np.array_equal(kernel[0], kernel[1])
  hidden, _ = compiled(module)(
      params, embed(module, params, tokens), *plain(tokens)
  )
  assert np.isfinite(scores(module, params, hidden)[..., :130]).all()


def test_configs_are_hashable_and_check_themselves():
  scaled = llama.LlamaConfig.llama32_1b()
  assert hash(scaled) == hash(llama.LlamaConfig.llama32_1b())
  assert dict(scaled.rope_scaling)['factor'] == 32.0
  pairs = [list(pair) for pair in scaled.rope_scaling]  # as JSON has them
  assert dataclasses.replace(scaled, rope_scaling=pairs) == scaled
  with pytest.raises(ValueError, match='num_key_value_heads=3'):
    dataclasses.replace(BASE, num_key_value_heads=3)
  with pytest.raises(ValueError, match='Give head_dim'):
    dataclasses.replace(BASE, hidden_size=33)
