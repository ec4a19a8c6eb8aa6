"""The UNet's LoRA against diffusers' own, in every spelling of its files."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from photochat_jax.checkpoints import files, lora_diffusers, tables
from photochat_jax.models import lora, unet
from photochat_jax.ops import partition

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
import hf_compare  # noqa: E402
import hf_models  # noqa: E402

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERY = [
  *ATTENTION,
  "proj_in",
  "proj_out",
  "ff.net.0.proj",
  "ff.net.2",
  "time_emb_proj",
  "conv_shortcut",
  "linear_1",
  "linear_2",
]
MODELS = {
  "as SD 1.5": {"use_linear_projection": False},
  "as SD 2.1": {"use_linear_projection": True, "attention_head_dim": (1, 4)},
}
# What diffusers' adapters differ in.
ADAPTERS = {
  "attention": {"target_modules": ATTENTION},
  "every dense layer": {
    "target_modules": EVERY,
    "use_rslora": True,
    "rank_pattern": {"to_q": 5, "mid_block.attentions.0.proj_in": 1},
    "alpha_pattern": {"attn2.to_v": 2, "conv_shortcut": 11},
  },
}
NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """The models, each beside ours."""
  return {
    name: hf_models.denoiser(
      tmp_path_factory.mktemp("unet"), attention=(True, False), **changes
    )
    for name, changes in MODELS.items()
  }


def fresh(pair):
  """diffusers' model once more, without any adapter."""
  return diffusers.UNet2DConditionModel.from_pretrained(pair.folder).eval()


def adapter(pair, **changes):
  """diffusers' model with an adapter, each of its numbers drawn."""
  model = fresh(pair)
  model.add_adapter(peft.LoraConfig(r=3, lora_alpha=7, **changes))
  generator = torch.Generator().manual_seed(5)
  with torch.no_grad():
    for name, value in model.named_parameters():
      if ".lora_" in name:
        noise = torch.randn(value.shape, generator=generator)
        value.copy_(0.4 * noise * value[0].numel() ** -0.5)
  return model


RNG = np.random.default_rng(2)
LATENTS = RNG.standard_normal((2, 6, 4, 4)).astype(np.float32)
CONTEXT = RNG.standard_normal((2, 3, 12)).astype(np.float32)
TIMESTEPS = np.array([7, 900], np.int32)


def theirs(model):
  return model(
    hf_compare.channels_first(LATENTS),
    torch.from_numpy(TIMESTEPS),
    torch.from_numpy(CONTEXT),
  ).sample


def drawn(params, config):
  variables = {"params": params}
  return unet.UNet(config).apply(variables, LATENTS, TIMESTEPS, CONTEXT)


ours = jax.jit(drawn, static_argnums=1, compiler_options=hf_compare.FAST)


def assert_equal(params, pair, model):
  """The model with the adapter, which does something."""
  with torch.no_grad():
    want = hf_compare.channels_last(theirs(model))
  hf_compare.assert_outputs_equal(ours(params, pair.config), want)
  with torch.no_grad():
    base = hf_compare.channels_last(theirs(pair.oracle))
  assert np.abs(want - base).max() > 0.1


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_predictions_and_gradients_equal_diffusers(pairs, name, kind, tmp_path):
  pair = pairs[name]
  model = adapter(pair, **ADAPTERS[kind])
  model.save_lora_adapter(tmp_path)
  params = lora_diffusers.read(pair.config, pair.params, tmp_path)
  assert_equal(params, pair, model)

  weights = hf_compare.cotangent(LATENTS.shape, 3)
  (theirs(model) * hf_compare.channels_first(weights)).sum().backward()
  trainable, frozen = {}, {}
  for path, leaf in partition.flatten(params).items():
    chosen = trainable if path.endswith(("lora_a", "lora_b")) else frozen
    chosen[path] = leaf

  def loss(trainable):
    got = drawn(partition.unflatten({**frozen, **trainable}), pair.config)
    return jnp.vdot(got, weights)

  grads = jax.jit(jax.grad(loss), compiler_options=hf_compare.FAST)(trainable)
  compared = 0
  for key, value in model.named_parameters():
    if ".lora_" not in key:
      continue
    module, _, letter = key.removesuffix(".default.weight").rpartition(".lora_")
    # The one difference between their names and ours is punctuation.
    (path,) = [
      path
      for path in grads
      if path.replace("/", "_")
      == f"{module}_lora_{letter}".lower().replace(".", "_")
    ]
    want = value.grad.numpy()
    want = want.reshape(want.shape[:2]).T
    largest = np.abs(want).max()
    assert largest > 1e-5
    np.testing.assert_allclose(
      grads[path], want, rtol=0, atol=min(1e-4, 1e-3 * largest), err_msg=path
    )
    compared += 1
  assert compared == len(grads) >= 20


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_diffusers_opens_what_is_written(pairs, name, kind, tmp_path):
  pair = pairs[name]
  model = adapter(pair, **ADAPTERS[kind])
  model.save_lora_adapter(tmp_path / "theirs")
  params = lora_diffusers.read(pair.config, pair.params, tmp_path / "theirs")
  lora_diffusers.write(pair.config, params, tmp_path / "ours")
  want = safetensors_numpy.load_file(tmp_path / "theirs" / NAME)
  got = safetensors_numpy.load_file(tmp_path / "ours" / NAME)
  want = {f"unet.{key}": value for key, value in want.items()}
  hf_compare.assert_same(got, want)

  model = fresh(pair)
  model.load_lora_adapter(
    tmp_path / "ours", prefix="unet", use_safetensors=True
  )
  assert_equal(params, pair, model)
  assert_equal(params, pair, by_pipeline(pair, tmp_path / "ours"))
  again = lora_diffusers.read(pair.config, pair.params, tmp_path / "ours")
  hf_compare.assert_same(again, params)

  with pytest.raises(files.WeightsError, match="already holds"):
    lora_diffusers.write(pair.config, params, tmp_path / "ours")


def by_pipeline(pair, path):
  """The model after what a pipeline's `load_lora_weights` does."""
  loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
  state, alphas, metadata = loader.lora_state_dict(
    str(path), weight_name=None, return_lora_metadata=True
  )
  model = fresh(pair)
  loader.load_lora_into_unet(state, alphas, model, metadata=metadata)
  return model


def test_ours_opens_there(pairs, tmp_path):
  pair = pairs["as SD 1.5"]
  targets = (r"unet/.*/attn1/to_\w+", r"unet/.*/proj_out")
  config = lora.LoRAConfig(4, 9.0, targets)
  params = lora.init(config, {"unet": pair.params}, jax.random.key(0))["unet"]
  rng = np.random.default_rng(6)
  leaves = partition.flatten(params)
  for path, leaf in leaves.items():
    if path.endswith("lora_b"):
      leaves[path] = np.float32(rng.standard_normal(leaf.shape))
  params = partition.unflatten(leaves)
  lora_diffusers.write(pair.config, params, tmp_path)
  assert_equal(params, pair, by_pipeline(pair, tmp_path))


@pytest.mark.parametrize("name", MODELS)
def test_merging_is_that_of_diffusers(pairs, name, tmp_path):
  pair = pairs[name]
  model = adapter(pair, **ADAPTERS["every dense layer"])
  model.save_lora_adapter(tmp_path)
  params = lora_diffusers.read(pair.config, pair.params, tmp_path)
  model.fuse_lora()
  model.unload_lora()
  got = dict(tables.write(pair.table, lora.merge(params)))
  chex.assert_trees_all_close(got, hf_compare.arrays(model), atol=1e-5)


def flat(module):
  """kohya's name of a module."""
  return "lora_unet_" + module.replace(".", "_")


def old(module, kind):
  """As an attention's processor had it."""
  block, _, last = module.removesuffix(".0").rpartition(".")
  return f"{block}.processor.{last}_lora.{DIRECTION[kind]}.weight"


DIRECTION = {"A": "down", "B": "up"}
# Name: (modules, the key of a matrix, whether diffusers wants a prefix).
SPELLINGS = {
  "diffusers, of a pipeline": (
    EVERY,
    lambda module, kind: f"unet.{module}.lora_{kind}.weight",
    True,
  ),
  "diffusers, of a UNet": (
    EVERY,
    lambda module, kind: f"{module}.lora_{kind}.weight",
    False,
  ),
  "before peft": (
    EVERY,
    lambda module, kind: f"unet.{module}.lora.{DIRECTION[kind]}.weight",
    True,
  ),
  "processors": (ATTENTION, lambda *name: f"unet.{old(*name)}", True),
  "a UNet's processors": (ATTENTION, old, False),
  "kohya": (
    EVERY,
    lambda module, kind: f"{flat(module)}.lora_{DIRECTION[kind]}.weight",
    True,
  ),
}


def matrices(pair, targets):
  """An adapter's matrices by (module, 'A' or 'B'), with two ranks."""
  model = adapter(pair, target_modules=targets, rank_pattern={"to_q": 5})
  found = {}
  for key, value in peft.get_peft_model_state_dict(model).items():
    module, _, kind = key.removesuffix(".weight").rpartition(".lora_")
    found[module, kind] = value.numpy()
  return found


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", MODELS)
def test_every_spelling(pairs, name, spelling, tmp_path):
  pair = pairs[name]
  targets, key_of, prefixed = SPELLINGS[spelling]
  there = matrices(pair, targets)
  found = {key_of(*name): value for name, value in there.items()}
  if spelling == "kohya":
    alpha = np.array(1.5, np.float32)
    found |= {f"{flat(module)}.alpha": alpha for module, _ in there}
  safetensors_numpy.save_file(found, tmp_path / NAME)
  params = lora_diffusers.read(pair.config, pair.params, tmp_path / NAME)
  if prefixed:
    model = by_pipeline(pair, tmp_path)
  else:
    model = fresh(pair)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
  assert_equal(params, pair, model)


@pytest.mark.parametrize(
  "start, down, up",
  [("lora_unet_", "lora_down", "lora_up"), ("unet.", "lora_A", "lora_B")],
)
def test_every_module_has_its_own_alpha(pairs, start, down, up, tmp_path):
  # diffusers loses alphas that differ: here the kernels are changed by hand.
  pair, model = pairs["as SD 1.5"], fresh(pairs["as SD 1.5"])
  there = matrices(pair, EVERY)
  kernels, found = dict(model.named_parameters()), {}
  for number, module in enumerate(sorted({module for module, _ in there})):
    a, b = there[module, "A"], there[module, "B"]
    alpha, rank = 0.5 + number % 7, len(a)
    change = b.reshape(-1, rank) @ a.reshape(rank, -1) * (alpha / rank)
    kernel = kernels[f"{module}.weight"].data
    kernel += torch.from_numpy(change).reshape(kernel.shape)
    key = flat(module) if start == "lora_unet_" else start + module
    found |= {
      f"{key}.{down}.weight": a,
      f"{key}.{up}.weight": b,
      f"{key}.alpha": np.array(alpha, np.float16),
    }
  safetensors_numpy.save_file(found, tmp_path / "photos.safetensors")
  # The only file of its folder needs no name.
  params = lora_diffusers.read(pair.config, pair.params, tmp_path)
  assert_equal(params, pair, model)


@pytest.mark.parametrize("name, axes", [("as SD 1.5", 4), ("as SD 2.1", 2)])
def test_either_shape_does_for_a_1x1_convolution(pairs, name, axes, tmp_path):
  pair, usual, odd = pairs[name], {}, {}
  for (module, kind), value in matrices(pair, EVERY).items():
    key = f"unet.{module}.lora_{kind}.weight"
    usual[key] = odd[key] = value
    if module.endswith(("proj_in", "proj_out")):
      assert value.ndim == axes
      shape = value.shape[:2] + (1, 1) * (axes == 2)
      odd[key] = value.reshape(shape)
  read = []
  for number, arrays in enumerate((usual, odd)):
    path = tmp_path / f"{number}.safetensors"
    safetensors_numpy.save_file(arrays, path)
    read.append(lora_diffusers.read(pair.config, pair.params, path))
  hf_compare.assert_same(*read)
