"""The text encoder against transformers' `CLIPTextModel` on torch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import clip_text

TINY = dict(
  vocab_size=50,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  max_position_embeddings=9,
  bos_token_id=48,
  eos_token_id=49,
  pad_token_id=49,
)
CASES = {
  "quick_gelu": dict(),
  "gelu": dict(hidden_act="gelu", num_attention_heads=3),
  "one_layer": dict(num_hidden_layers=1, layer_norm_eps=1e-2),
  "remat": dict(remat=True),
}


def torch_config(config):
  transformers = pytest.importorskip("transformers")
  return transformers.CLIPTextConfig(
    vocab_size=config.vocab_size,
    hidden_size=config.hidden_size,
    intermediate_size=config.intermediate_size,
    num_hidden_layers=config.num_hidden_layers,
    num_attention_heads=config.num_attention_heads,
    max_position_embeddings=config.max_position_embeddings,
    hidden_act=config.hidden_act,
    layer_norm_eps=config.layer_norm_eps,
    bos_token_id=config.bos_token_id,
    eos_token_id=config.eos_token_id,
    pad_token_id=config.pad_token_id,
  )


@pytest.mark.parametrize("length", [9, 5])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_transformers(case, length):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  import torch_weights_diffusion as weights

  config = clip_text.CLIPTextConfig(**(TINY | CASES[case]))
  oracle = transformers.CLIPTextModel(torch_config(config))
  weights.randomise(oracle, seed=1)
  params = weights.clip_text_params(oracle.state_dict())
  rng = np.random.default_rng(2)
  ids = rng.integers(0, config.vocab_size, (3, length)).astype(np.int32)
  weight = rng.normal(size=(3, length, config.hidden_size))
  weight = weight.astype(np.float32)

  want = oracle(torch.tensor(ids)).last_hidden_state
  (want * torch.tensor(weight)).mean().backward()
  gradients = weights.clip_text_params(
    {key: parameter.grad for key, parameter in oracle.named_parameters()}
  )
  model = clip_text.CLIPText(config)

  @jax.jit
  def run(params):
    def loss(params):
      embeds = model.apply(
        {"params": params}, ids, method=clip_text.CLIPText.embed
      )
      out = model.apply({"params": params}, embeds)
      return (out * weight).mean(), out

    return jax.value_and_grad(loss, has_aux=True)(params)

  (_, got), by_params = run(params)
  np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-4)
  chex.assert_trees_all_close(by_params, gradients, atol=1e-4)


def test_one_init_makes_every_parameter():
  config = clip_text.CLIPTextConfig(**TINY)
  model = clip_text.CLIPText(config)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 24)))[
    "params"
  ]
  assert params["token_embedding"]["embedding"].shape == (50, 24)
  assert params["position_embedding"]["embedding"].shape == (9, 24)
  assert params["layers"]["self_attn"]["q_proj"]["kernel"].shape == (3, 24, 24)
  assert set(params) == {
    "token_embedding",
    "position_embedding",
    "layers",
    "final_layer_norm",
  }


def test_new_layers_differ_from_each_other():
  config = clip_text.CLIPTextConfig(**TINY)
  init = jax.jit(clip_text.CLIPText(config).init)
  params = init(jax.random.key(0), jnp.zeros((1, 4, 24)))["params"]
  kernel = params["layers"]["mlp"]["fc1"]["kernel"]
  assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_a_position_sees_nothing_after_it():
  config = clip_text.CLIPTextConfig(**TINY)
  model = clip_text.CLIPText(config)
  embeds = jax.random.normal(jax.random.key(1), (1, 6, 24))
  params = jax.jit(model.init)(jax.random.key(0), embeds)
  gradient = jax.jit(
    jax.grad(lambda e: jnp.square(model.apply(params, e)[0, 3, 0]))
  )(embeds)[0]
  assert np.abs(gradient[:4]).max(1).min() > 0
  np.testing.assert_array_equal(gradient[4:], 0.0)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
  config = clip_text.CLIPTextConfig(**TINY, dtype="bfloat16")
  model = clip_text.CLIPText(config)
  embeds = jnp.zeros((1, 4, 24))
  out, params = jax.eval_shape(
    model.init_with_output, jax.random.key(0), embeds
  )
  chex.assert_type(out, jnp.bfloat16)
  chex.assert_type(jax.tree.leaves(params), jnp.float32)


@pytest.mark.parametrize(
  "config,count",
  [
    (clip_text.CLIPTextConfig.sd15(), 123_060_480),
    (clip_text.CLIPTextConfig.sd21(), 340_387_840),
  ],
)
def test_real_sizes_have_their_published_parameter_counts(config, count):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  shapes = jax.eval_shape(
    clip_text.CLIPText(config).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 77, config.hidden_size), jnp.float32),
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
  with torch.device("meta"):
    oracle = transformers.CLIPTextModel(torch_config(config))
  assert sum(p.numel() for p in oracle.parameters()) == count


def test_impossible_numbers_are_refused():
  with pytest.raises(ValueError, match="hidden_act"):
    clip_text.CLIPTextConfig(hidden_act="relu")
  with pytest.raises(ValueError, match="num_attention_heads"):
    clip_text.CLIPTextConfig(num_attention_heads=5)
  config = clip_text.CLIPTextConfig(**TINY)
  with pytest.raises(ValueError, match="max_position_embeddings"):
    jax.eval_shape(
      clip_text.CLIPText(config).init,
      jax.random.key(0),
      jnp.zeros((1, 10, 24)),
    )
