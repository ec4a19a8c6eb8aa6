"""models/qformer.py against transformers' Blip2QFormerModel."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import qformer, vit

torch = pytest.importorskip('torch')
import torch_weights  # noqa: E402
import transformers  # noqa: E402

BASE = qformer.QFormerConfig(
    num_query_tokens=5,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=40,
    cross_attention_frequency=2,
    encoder_hidden_size=20,
)


def hf_model(config):
  fields = dataclasses.asdict(config)
  for name in ('dtype', 'remat', 'num_query_tokens'):
    del fields[name]
  return transformers.Blip2QFormerModel(
      transformers.Blip2QFormerConfig(**fields, attn_implementation='eager')
  )


def build(config, seed=0):
  """(torch model, its query tokens), which live in `Blip2Model`."""
  model = torch_weights.randomise(hf_model(config), seed)
  rng = np.random.default_rng(seed)
  queries = rng.standard_normal(
      (1, config.num_query_tokens, config.hidden_size)
  )
  return model, torch.nn.Parameter(torch.from_numpy(queries).float())


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def init_shapes(config):
  return jax.eval_shape(
      qformer.QFormer(config).init,
      jax.random.key(0),
      jnp.zeros((1, 2, config.encoder_hidden_size)),
  )['params']


@pytest.fixture(scope='module')
def features():
  rng = np.random.default_rng(1)
  return rng.standard_normal((2, 7, 20)).astype(np.float32)


@pytest.mark.parametrize(
    'change', [{}, {'cross_attention_frequency': 1, 'remat': True}]
)
def test_visual_tokens_and_all_gradients_equal_transformers(features, change):
  config = dataclasses.replace(BASE, **change)
  model, queries = build(config)
  params = torch_weights.qformer_params(model, queries)
  chex.assert_trees_all_equal_shapes_and_dtypes(init_shapes(config), params)
  weights = np.random.default_rng(2).standard_normal((2, 5, 24))
  weights = (weights / weights.size).astype(np.float32)

  want = model(
      query_embeds=queries.expand(2, -1, -1),
      encoder_hidden_states=torch.from_numpy(features),
  ).last_hidden_state
  (want * torch.from_numpy(weights)).sum().backward()

  def loss(params):
    got = qformer.QFormer(config).apply({'params': params}, features)
    return jnp.sum(got * weights), got

  grads, got = jax.jit(jax.grad(loss, has_aux=True))(params)
  chex.assert_trees_all_close(got, want.detach().numpy(), atol=1e-4)
  want = torch_weights.qformer_params(model, queries, grad=True)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
  chex.assert_trees_all_close(grads, want, atol=1e-4 * largest, rtol=1e-4)


def test_rematerialisation_keeps_less_for_the_backward_pass():
  def kept(config):
    module = qformer.QFormer(config)

    def backward(params):
      return jax.vjp(
          lambda x: module.apply({'params': params}, x), jnp.zeros((4, 7, 20))
      )[1]

    # What the backward pass holds besides the parameters.
    params = init_shapes(config)
    return count(jax.eval_shape(backward, params)) - count(params)

  assert kept(dataclasses.replace(BASE, remat=True)) < kept(BASE) / 2


def test_bfloat16_activations_stay_near_float32(features):
  params = torch_weights.qformer_params(*build(BASE, seed=3))
  want = qformer.QFormer(BASE).apply({'params': params}, features)
  config = dataclasses.replace(BASE, dtype='bfloat16')
  got = qformer.QFormer(config).apply({'params': params}, features)
  assert got.dtype == jnp.bfloat16
  chex.assert_trees_all_close(got.astype(jnp.float32), want, atol=0.2)


def test_blip2_has_the_parameter_count_of_transformers():
  config = qformer.QFormerConfig.blip2()
  with torch.device('meta'):
    model = sum(p.numel() for p in hf_model(config).parameters())
  # The 32 query tokens of width 768 belong to `Blip2Model` there.
  want = model + 32 * 768
  assert want == 105_162_240
  assert count(init_shapes(config)) == want


def test_fresh_queries_differ_and_have_finite_gradients(features):
  module = qformer.QFormer(BASE)
  params = jax.jit(module.init)(jax.random.key(0), features)['params']

  @jax.jit
  def run(params):
    out, pull = jax.vjp(
        lambda p: module.apply({'params': p}, features), params
    )
    return out, pull(out**2)

  out, grads = run(params)
  chex.assert_tree_all_finite(grads)
  assert np.abs(out[:, 0] - out[:, 1]).max() > 0.1


def test_tiny_reads_the_tiny_vision_transformer():
  config = qformer.QFormerConfig.tiny(num_query_tokens=3)
  assert config.encoder_hidden_size == vit.ViTConfig.tiny().hidden_size
  shape = jax.eval_shape(
      qformer.QFormer(config).init_with_output,
      jax.random.key(0),
      jnp.zeros((2, 17, config.encoder_hidden_size)),
  )[0]
  chex.assert_shape(shape, (2, 3, config.hidden_size))


def test_projection_equals_a_torch_linear_layer(features):
  layer = torch.nn.Linear(20, 6)
  params = {
      'kernel': layer.weight.detach().numpy().T,
      'bias': layer.bias.detach().numpy(),
  }
  got = qformer.Projection(6).apply({'params': params}, features)
  want = layer(torch.from_numpy(features)).detach().numpy()
  chex.assert_trees_all_close(got, want, atol=1e-5)


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='cross_attention_frequency=3'):
    dataclasses.replace(BASE, cross_attention_frequency=3)
  with pytest.raises(ValueError, match='num_attention_heads=5'):
    dataclasses.replace(BASE, num_attention_heads=5)
  with pytest.raises(ValueError, match='Set encoder_hidden_size=21'):
    jax.eval_shape(
        qformer.QFormer(BASE).init, jax.random.key(0), jnp.zeros((1, 7, 21))
    )
