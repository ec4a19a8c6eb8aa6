"""models/lora.py against dense float64 arithmetic."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from photochat_jax import optim, sharding
from photochat_jax.models import llama, lora, unet
from photochat_jax.ops import partition

LANGUAGE = llama.LlamaConfig(
  vocab_size=100,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
)
UNET = unet.UNetConfig.tiny(
  block_out_channels=(8, 16),
  attention=(True, False),
  num_attention_heads=2,
  cross_attention_dim=6,
  norm_num_groups=4,
)
LINEAR = r"language_model/(layers/(self_attn|mlp)/\w+_proj|lm_head)"
DRAWN = (
  r"unet/.*/(to_\w+|proj\w*|net_2|time_emb_proj|conv_shortcut)",
  r"unet/time_embedding/linear_\d",
)


# Compiling is nearly all the time of these tests: do it half as well.
FAST = {"xla_backend_optimization_level": 0}


def scores(params, config=LANGUAGE):
  """Scores [2, 5, V] of two rows of vectors."""
  x = np.random.default_rng(1).standard_normal((2, 5, config.hidden_size))
  tokens = np.broadcast_to(np.arange(5), (2, 5)), np.ones((2, 5), np.int32)
  module = llama.Llama(config)
  variables = {"params": params["language_model"]}
  hidden, _ = module.apply(variables, jnp.float32(x), *tokens)
  return module.apply(variables, hidden, method="logits")[..., :100]


language = jax.jit(scores, static_argnums=1, compiler_options=FAST)


@functools.partial(jax.jit, static_argnums=1, compiler_options=FAST)
def drawn(params, config=UNET):
  """Noise [2, 4, 4, 4]."""
  rng = np.random.default_rng(2)
  latents = rng.standard_normal((2, 4, 4, 4)).astype(np.float32)
  context = rng.standard_normal((2, 3, 6)).astype(np.float32)
  variables = {"params": params["unet"]}
  return unet.UNet(config).apply(variables, latents, np.arange(2), context)


@pytest.fixture(scope="module")
def params():
  """Language model and UNet, every number drawn."""
  tokens = np.zeros((1, 2), np.int32)
  vectors = np.zeros((1, 2, 16), np.float32)
  latents = np.zeros((1, 4, 4, 4), np.float32)
  context = np.zeros((1, 2, 6), np.float32)
  key = jax.random.key(0)
  shapes = {
    "language_model": jax.eval_shape(
      llama.Llama(LANGUAGE).init, key, vectors, tokens, tokens
    )["params"],
    "unet": jax.eval_shape(
      unet.UNet(UNET).init, key, latents, np.zeros(1), context
    )["params"],
  }
  rng = np.random.default_rng(3)

  def draw(leaf):
    width = leaf.shape[-2] if len(leaf.shape) > 1 else 9
    return np.float32(rng.standard_normal(leaf.shape) / np.sqrt(width))

  return jax.tree.map(draw, shapes)


def with_lora(params, *targets, rank=3, alpha=7.0):
  """LoRA in which no number is zero, and no two layers' scales are equal."""
  config = lora.LoRAConfig(rank, alpha, targets)
  leaves = partition.flatten(lora.init(config, params, jax.random.key(4)))
  rng = np.random.default_rng(5)
  for path, leaf in leaves.items():
    if path.endswith("lora_b"):
      leaves[path] = np.float32(0.2 * rng.standard_normal(leaf.shape))
    elif path.endswith("lora_scale"):
      leaves[path] = np.float32(rng.uniform(0.5, 2, leaf.shape))
  return partition.unflatten(leaves)


def merged(params):
  """The same model without LoRA, by float64 arithmetic."""
  leaves = partition.flatten(params)
  for path in [path for path in leaves if path.endswith("/lora_a")]:
    start = path.removesuffix("lora_a")
    a, b, scale = (
      np.float64(leaves.pop(start + name))
      for name in ("lora_a", "lora_b", "lora_scale")
    )
    kernel = np.float64(leaves[f"{start}kernel"])
    change = np.einsum("...ir,...ro,...->...io", a, b, scale)
    assert np.std(change) > 0.05 * np.std(kernel)
    leaves[f"{start}kernel"] = np.float32(kernel + change)
  return partition.unflatten(leaves)


def test_a_dense_layer_by_hand():
  variables = {
    "params": {
      "kernel": np.float32([[1, 0, 2], [0, 1, -1]]),
      "bias": np.float32([0.5, 0, 0]),
      "lora_a": np.float32([[1], [2]]),
      "lora_b": np.float32([[3, 0, -1]]),
      "lora_scale": np.float32(0.5),
    }
  }
  got = lora.Dense(3).apply(variables, np.float32([[1, 10]]))
  # x W + bias = (1.5, 10, -8); x A = 21; half of 21 B = (31.5, 0, -10.5).
  np.testing.assert_array_equal(got, [[33, 10, -18.5]])
  got = lora.Dense(3).apply(
    {"params": lora.strip(variables["params"])}, np.float32([[1, 10]])
  )
  np.testing.assert_array_equal(got, [[1.5, 10, -8]])


def test_a_dense_layer_has_no_lora_of_its_own():
  made = lora.Dense(3).init(jax.random.key(0), np.zeros((1, 2), np.float32))
  assert made["params"].keys() == {"kernel", "bias"}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_every_dense_layer_of_the_language_model_takes_it(params, remat):
  adapted = with_lora(params, LINEAR)
  count = sum(p.endswith("lora_a") for p in partition.flatten(adapted))
  assert count == 8  # Four and three projections in one stack, and the head.
  config = dataclasses.replace(LANGUAGE, remat=remat, scan_unroll=2)
  got, base = language(adapted, config), language(params, config)
  np.testing.assert_allclose(got, language(merged(adapted)), atol=1e-5)
  assert np.abs(got - base).max() > 0.1


def test_every_dense_layer_of_the_denoiser_takes_it(params):
  adapted = with_lora(params, *DRAWN)
  wanted = [
    path
    for path, leaf in partition.flatten(params["unet"]).items()
    if path.endswith("/kernel") and leaf.ndim == 2
  ]
  found = partition.flatten(adapted)
  assert sum(path.endswith("lora_a") for path in found) == len(wanted)
  config = dataclasses.replace(UNET, remat="full")
  got = drawn(adapted, config)
  np.testing.assert_allclose(got, drawn(merged(adapted)), atol=1e-5)
  assert np.abs(got - drawn(params)).max() > 0.1


def test_merging_is_the_sum_in_float64(params):
  adapted = with_lora(params, LINEAR, *DRAWN)
  got, want = lora.merge(adapted), merged(adapted)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  chex.assert_trees_all_close(got, want, atol=1e-6)
  chex.assert_trees_all_equal(lora.merge(params), params)


def test_merging_into_bfloat16_rounds_once():
  rng = np.random.default_rng(6)
  kernel = rng.standard_normal((2, 40, 30)).astype(ml_dtypes.bfloat16)
  layer = {
    "kernel": kernel,
    "lora_a": rng.standard_normal((2, 40, 4)).astype(ml_dtypes.bfloat16),
    "lora_b": rng.standard_normal((2, 4, 30)).astype(np.float32),
    "lora_scale": np.float32([0.3, 0.7]),
  }
  got = lora.merge({"layer": layer})["layer"]["kernel"]
  exact = np.float64(kernel) + np.einsum(
    "lir,lro,l->lio", *(np.float64(layer[name]) for name in lora.LEAVES)
  )
  assert got.dtype == jnp.bfloat16
  # Half of the last of 8 bits, and what float32 leaves.
  off = np.abs(np.float64(got) - exact)
  assert np.all(off <= 2.0**-8 * np.abs(exact) + 1e-5)


def test_fresh_lora_changes_nothing(params):
  config = lora.LoRAConfig(5, 8.0, (LINEAR, *DRAWN))
  fresh = lora.init(config, params, jax.random.key(7))
  np.testing.assert_array_equal(language(fresh), language(params))
  np.testing.assert_array_equal(drawn(fresh), drawn(params))
  chex.assert_trees_all_equal(lora.strip(fresh), params)
  chex.assert_trees_all_equal(lora.merge(fresh), params)


def test_fresh_numbers_are_those_of_peft(params):
  config = lora.LoRAConfig(64, 32.0, (LINEAR,))
  leaves = partition.flatten(lora.init(config, params, jax.random.key(8)))
  start = "language_model/layers/mlp/down_proj/"
  a = np.asarray(leaves[f"{start}lora_a"])
  assert a.shape == (3, 24, 64) and a.dtype == np.float32
  # Kaiming, uniform, with a = sqrt(5): within 1 / sqrt(in) of zero.
  assert np.abs(a).max() <= 24**-0.5
  np.testing.assert_allclose(a.std((1, 2)), (3 * 24) ** -0.5, rtol=0.05)
  np.testing.assert_allclose(a.mean(), 0, atol=0.01)
  np.testing.assert_array_equal(leaves[f"{start}lora_b"], np.zeros((3, 64, 16)))
  np.testing.assert_array_equal(leaves[f"{start}lora_scale"], [0.5, 0.5, 0.5])
  # No two layers begin alike.
  ups = leaves["language_model/layers/mlp/up_proj/lora_a"]
  gates = leaves["language_model/layers/mlp/gate_proj/lora_a"]
  assert len(np.unique([*ups[..., 0], *gates[..., 0]])) == 6 * 16


def test_shapes_need_no_numbers(params):
  config = lora.LoRAConfig(2, 4.0)
  shapes = jax.eval_shape(
    lambda params, key: lora.init(config, params, key),
    params,
    jax.random.key(0),
  )
  attention = shapes["language_model"]["layers"]["self_attn"]
  assert attention["q_proj"]["lora_a"].shape == (3, 16, 2)
  assert attention["v_proj"]["lora_b"].shape == (3, 2, 8)
  assert attention["k_proj"]["lora_scale"].shape == (3,)
  assert attention["o_proj"].keys() == {"kernel"}  # The paper's are q, k, v.
  chex.assert_trees_all_equal_structs(lora.strip(shapes), params)
  assert lora.init(lora.LoRAConfig(), params, jax.random.key(0)) == params


@functools.partial(jax.jit, compiler_options=FAST)
def gradient(trainable, frozen):
  def loss(trainable):
    return jnp.sum(scores(optim.merge(trainable, frozen)) ** 2)

  return jax.grad(loss)(trainable)


def test_only_the_two_matrices_learn(params):
  adapted = with_lora(params, LINEAR)
  chosen = ("language_model/.*/lora_(a|b)",)
  found = partition.flatten(gradient(*optim.split(adapted, chosen)))
  assert len(found) == 16
  for path, leaf in found.items():
    leaf = leaf[..., :100] if "lm_head" in path else leaf  # Less the padding.
    assert np.abs(leaf).min() > 0, path


def test_first_gradients(params):
  fresh = lora.init(lora.LoRAConfig(3), params, jax.random.key(9))
  for path, leaf in partition.flatten(gradient(fresh, {})).items():
    if path.endswith("lora_b"):
      assert np.abs(leaf).min() > 0, path
    elif path.endswith("lora_a"):  # B = 0 holds it back.
      np.testing.assert_array_equal(leaf, np.zeros(leaf.shape), path)


def test_a_scale_never_learns(params):
  found = partition.flatten(gradient(with_lora(params, LINEAR), {}))
  scales = [leaf for path, leaf in found.items() if path.endswith("lora_scale")]
  assert len(scales) == 8
  for leaf in scales:
    np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_a_layer_whose_scale_is_zero_has_none(params):
  adapted = partition.flatten(with_lora(params, LINEAR))
  for path in adapted:
    if path.endswith("lora_scale") and "/layers/" in path:
      adapted[path] = np.float32([0, 1, 0])
  changed = partition.flatten(merged(partition.unflatten(dict(adapted))))
  for path, leaf in partition.flatten(params).items():
    if "/layers/" in path:
      np.testing.assert_array_equal(leaf[[0, 2]], changed[path][[0, 2]])
  want = language(partition.unflatten(changed))
  got = language(partition.unflatten(adapted))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_bfloat16_and_the_scores_sums_in_float32():
  rng = np.random.default_rng(10)
  half = {
    name: rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    for name, shape in {
      "x": (4, 256),
      "kernel": (256, 64),
      "lora_a": (256, 8),
      "lora_b": (8, 64),
    }.items()
  }
  exact = {name: np.float64(array) for name, array in half.items()}
  scale = np.float32(0.3)  # Not a bfloat16.
  variables = {"params": half | {"lora_scale": scale}}
  x = jnp.asarray(variables["params"].pop("x"))

  def layer(**kwargs):
    dense = lora.Dense(64, use_bias=False, dtype=jnp.bfloat16, **kwargs)
    return dense.apply(variables, x)

  low = np.float64(jnp.float32(scale)) * (exact["x"] @ exact["lora_a"])
  want = exact["x"] @ exact["kernel"] + low @ exact["lora_b"]
  size = np.abs(want).max()
  got = layer()
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(got), want, atol=0.02 * size)

  # As in the language model's head: only x A is rounded.
  got = layer(dot_general=llama._scores)
  assert got.dtype == jnp.float32
  low = np.float64(x @ jnp.asarray(half["lora_a"])) * np.float64(scale)
  low = np.float64(low.astype(np.float32).astype(ml_dtypes.bfloat16))
  want = exact["x"] @ exact["kernel"] + low @ exact["lora_b"]
  np.testing.assert_allclose(got, want, atol=1e-5 * size)


def test_the_config_of_what_is_there(params):
  config = lora.LoRAConfig(3, 7.0, (LINEAR, DRAWN[1]))
  adapted = lora.init(config, params, jax.random.key(0))
  found = lora.config_of(adapted)
  assert (found.rank, found.alpha) == (3, 7.0)
  again = lora.init(found, params, jax.random.key(1))
  chex.assert_trees_all_equal_shapes_and_dtypes(again, adapted)
  for path, leaf in partition.flatten(again).items():
    if path.endswith("lora_scale"):
      np.testing.assert_array_equal(
        leaf, np.full(leaf.shape, np.float32(7 / 3))
      )
  assert lora.config_of(params) == lora.LoRAConfig()
  with pytest.raises(ValueError, match="differ in rank or scale"):
    lora.config_of(with_lora(params, LINEAR))


@pytest.mark.parametrize(
  "alpha, rank",
  [(7, 3), (1, 7), (16, 8), (0.1, 9), (32, 1), (12.5, 13), (1e-3, 6)],
)
def test_alpha_comes_back_from_its_scale(alpha, rank):
  assert lora.alpha_of(np.float32(alpha / rank), rank) == alpha


def test_every_scale_has_an_alpha():
  rng = np.random.default_rng(11)
  for rank in range(1, 40):
    scale = np.float32(np.exp(rng.uniform(-9, 9)))
    assert np.float32(lora.alpha_of(scale, rank) / rank) == scale


@pytest.mark.parametrize(
  "target, complaint",
  [
    ("language_model/layers/self_attn/w_proj", "matches no layer"),
    ("language_model/layers/self_attn", "matches no layer"),
    ("q_proj", "matches no layer"),
    ("language_model/embed_tokens", "takes no LoRA"),
    ("language_model/layers/input_layernorm", "takes no LoRA"),
    ("unet/conv_in", "takes no LoRA"),
    ("(vision_model|unet)/.*to_q|vision_model/.*", "takes no LoRA"),
  ],
)
def test_targets_that_take_no_lora(params, target, complaint):
  eyes = {"fc1": {"kernel": np.zeros((2, 3), np.float32)}}
  config = lora.LoRAConfig(2, 4.0, (target,))
  with pytest.raises(ValueError, match=complaint) as error:
    lora.init(config, params | {"vision_model": eyes}, jax.random.key(0))
  assert repr(target) in str(error.value)


@pytest.mark.parametrize("rank, alpha", [(-1, 1.0), (4, 0.0), (4, -1.0)])
def test_numbers_that_mean_nothing(rank, alpha):
  with pytest.raises(ValueError, match="must be 0"):
    lora.LoRAConfig(rank, alpha)


def test_it_lies_where_its_kernel_does(params):
  adapted = with_lora(params, LINEAR, *DRAWN)
  mesh = sharding.make_mesh()
  specs = {
    path: leaf.spec
    for path, leaf in partition.flatten(
      sharding.shardings(adapted, mesh)
    ).items()
  }
  attention = "language_model/layers/self_attn"
  assert specs[f"{attention}/q_proj/lora_a"] == P(None, "fsdp", None)
  assert specs[f"{attention}/q_proj/lora_b"] == P(None, None, "tensor")
  assert specs[f"{attention}/o_proj/lora_a"] == P(None, "tensor", None)
  assert specs[f"{attention}/o_proj/lora_b"] == P(None, None, "fsdp")
  assert specs[f"{attention}/o_proj/lora_scale"] == P(None)
  assert specs["language_model/lm_head/lora_b"] == P(None, "tensor")
