"""The language model's LoRA against peft's on transformers' Llama."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from photochat_jax.checkpoints import files, lora_peft, lora_settings, tables
from photochat_jax.checkpoints import llama as llama_files
from photochat_jax.models import llama, lora
from photochat_jax.ops import partition

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
import hf_compare  # noqa: E402
import hf_models  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
  "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
  # peft looks for the base model's vocabulary on the hub.
  "ignore:Could not find a config file in:UserWarning",
  # And saves the table under a head with LoRA.
  "ignore:Setting `save_embedding_layers`:UserWarning",
)

PAPER = {
  "task_type": "CAUSAL_LM",
  "r": 3,
  "lora_alpha": 7,
  "target_modules": ["q_proj", "v_proj"],
}
# Name: (differences of the model, of the adapter).
CASES = {
  "the paper's, and both tables": (
    {},
    {
      "target_modules": ["q_proj", "k_proj", "v_proj"],
      "modules_to_save": ["embed_tokens", "lm_head"],
    },
  ),
  "every layer, stabilised, tied": (
    {"tie_word_embeddings": True, "num_key_value_heads": 1},
    {
      "r": 5,
      "lora_alpha": 3,
      "use_rslora": True,
      "target_modules": "all-linear",
    },
  ),
  "tied and trained": (
    {"tie_word_embeddings": True},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
  ),
  "some layers, other ranks": (
    {},
    {
      "target_modules": ["o_proj", "up_proj", "down_proj"],
      "exclude_modules": ["layers.2.mlp.up_proj"],
      "layers_to_transform": [0, 2],
      "rank_pattern": {"down_proj": 1, r"layers\.0\.\w+\.o_proj": 4},
      "alpha_pattern": {"layers.2.self_attn.o_proj": 11},
    },
  ),
  "the head and the norms": (
    {"vocab_size": 131},
    {
      "target_modules": r"lm_head|.*\.1\..*gate_proj",
      "modules_to_save": ["norm"],
    },
  ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A function from a case's name to its model and adapter, made once."""
  cases = {}

  def get(name):
    if name not in cases:
      model, changes = CASES[name]
      folder = tmp_path_factory.mktemp("adapter")
      pair = hf_models.language(folder / "base", **model)
      adapted = adapter(pair.oracle, **changes)
      adapted.save_pretrained(folder / "adapter")
      params = lora_peft.read(pair.config, pair.params, folder / "adapter")
      cases[name] = pair, adapted, folder / "adapter", params
    return cases[name]

  return get


def adapter(model, seed=5, **changes):
  """peft's adapter around a model, each of its numbers drawn."""
  settings = peft.LoraConfig(**PAPER | changes)
  adapted = peft.get_peft_model(model, settings)
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, value in adapted.named_parameters():
      if value.requires_grad:
        noise = torch.randn(value.shape, generator=generator)
        std = 0.2 if value.ndim < 2 else value[0].numel() ** -0.5
        value.copy_(std * noise + (value.ndim < 2 and "norm" in name))
  return adapted.eval()


def base(pair):
  """The original once more, without any adapter."""
  return transformers.LlamaForCausalLM.from_pretrained(pair.folder).eval()


TOKENS = np.random.default_rng(2).integers(0, 131, (2, 9))
PLAIN = np.broadcast_to(np.arange(9), (2, 9)), np.ones((2, 9), np.int32)


def theirs(model):
  with torch.no_grad():
    return model(input_ids=torch.from_numpy(TOKENS)).logits.numpy()


def scores(params, config):
  module = llama.Llama(config)
  apply = lambda *args, **kwargs: module.apply(  # noqa: E731
    {"params": params}, *args, **kwargs
  )
  hidden, _ = apply(apply(TOKENS, method="embed"), *PLAIN)
  return apply(hidden, method="logits")[..., : config.vocab_size]


ours = jax.jit(scores, static_argnums=1, compiler_options=hf_compare.FAST)


def parameter(name):
  """Our (path, layer) of a name in peft's model, spelled out once more."""
  name = name.removeprefix("base_model.model.")
  match = re.fullmatch(
    r"(?:model\.layers\.(\d+)\.(\w+)\.)?(\w+)\.lora_(A|B)\.default\.weight",
    name,
  )
  layer, block, module, letter = match.groups()
  start = module if layer is None else f"layers/{block}/{module}"
  return f"{start}/lora_{letter.lower()}", layer


@pytest.mark.parametrize("name", CASES)
def test_scores_and_gradients_equal_pefts(made, name):
  pair, adapted, _, params = made(name)
  weights = hf_compare.cotangent((*TOKENS.shape, pair.config.vocab_size), 3)
  adapted.zero_grad()
  want = adapted(input_ids=torch.from_numpy(TOKENS)).logits
  (want * torch.from_numpy(weights)).sum().backward()

  def loss(params):
    got = scores(params, pair.config)
    return jnp.vdot(got, weights), got

  grads, got = jax.jit(
    jax.grad(loss, has_aux=True), compiler_options=hf_compare.FAST
  )(params)
  hf_compare.assert_outputs_equal(got, want.detach().numpy())
  assert np.abs(got - ours(pair.params, pair.config)).max() > 0.1

  grads = partition.flatten(jax.tree.map(np.array, grads))
  compared = 0
  for key, value in adapted.named_parameters():
    if ".lora_" not in key:
      continue
    path, layer = parameter(key)
    got = grads[path] if layer is None else grads[path][int(layer)]
    wanted = value.grad.numpy().T
    # Beyond an adapter's rank, and beyond the vocabulary, nothing learns.
    rows, columns = wanted.shape
    within = got[:rows, :columns]
    largest = np.abs(wanted).max()
    assert largest > 1e-4
    np.testing.assert_allclose(
      within, wanted, rtol=0, atol=min(1e-4, 1e-3 * largest), err_msg=path
    )
    within[...] = 0
    compared += 1
  for path, leaf in grads.items():
    if path.endswith(("lora_a", "lora_b")):
      np.testing.assert_array_equal(leaf, np.zeros(leaf.shape), path)
  assert compared >= 4


@pytest.mark.parametrize("name", CASES)
def test_peft_opens_what_is_written(made, name, tmp_path):
  pair, adapted, folder, params = made(name)
  saved = CASES[name][1].get("modules_to_save", ())
  saved = ["lm_head", *saved] if name == "the head and the norms" else saved
  lora_peft.write(pair.config, params, tmp_path, saved)
  want, got = (
    safetensors_numpy.load_file(where / "adapter_model.safetensors")
    for where in (folder, tmp_path)
  )
  hf_compare.assert_same(got, want)
  again = peft.PeftModel.from_pretrained(base(pair), tmp_path)
  np.testing.assert_allclose(theirs(again), theirs(adapted), atol=1e-5)


def test_merging_is_that_of_peft(made):
  for name in CASES:
    pair, _, folder, params = made(name)
    adapted = peft.PeftModel.from_pretrained(base(pair), folder)
    state = adapted.merge_and_unload().state_dict()
    want = {
      key: value.numpy()
      for key, value in state.items()
      if key != "lm_head.weight" or not pair.config.tie_word_embeddings
    }
    got = dict(tables.write(pair.table, lora.merge(params)))
    chex.assert_trees_all_close(got, want, atol=1e-5)


def test_a_stack_of_other_ranks_is_filled_up(made):
  _, _, folder, params = made("some layers, other ranks")
  there = safetensors_numpy.load_file(folder / "adapter_model.safetensors")
  ranks = {
    key.removeprefix("base_model.model.model."): value.shape[0]
    for key, value in there.items()
    if "lora_A" in key
  }
  assert ranks == {
    "layers.0.self_attn.o_proj.lora_A.weight": 4,
    "layers.2.self_attn.o_proj.lora_A.weight": 3,
    "layers.0.mlp.up_proj.lora_A.weight": 3,
    "layers.0.mlp.down_proj.lora_A.weight": 1,
    "layers.2.mlp.down_proj.lora_A.weight": 1,
  }
  out = params["layers"]["self_attn"]["o_proj"]
  assert out["lora_a"].shape == (3, 32, 4)
  np.testing.assert_allclose(out["lora_scale"], [7 / 4, 0, 11 / 3], rtol=1e-7)
  for layer, rank in enumerate((4, 0, 3)):
    assert np.all(out["lora_a"][layer][:, :rank])
    assert not np.any(out["lora_a"][layer][:, rank:])
    assert not np.any(out["lora_b"][layer][rank:])


def test_ours_opens_there_with_a_grown_vocabulary(tmp_path):
  pair = hf_models.language(tmp_path / "base")
  language = dataclasses.replace(pair.config, vocab_size=152)
  params = tables.read(
    llama_files.table(language, 150, fresh=(150, 151)),
    hf_models.abstract(language),
    files.Tensors(tmp_path / "base"),
  )
  config = lora.LoRAConfig(
    4, 9.0, (r"language_model/layers/mlp/\w+_proj", "language_model/lm_head")
  )
  params = {"language_model": params}
  params = lora.init(config, params, jax.random.key(0))["language_model"]
  # As after training: the matrices, and both tables with their new rows.
  rng = np.random.default_rng(6)
  params = partition.flatten(params)
  for path, leaf in params.items():
    if re.fullmatch(r".*/lora_[ab]|embed_tokens/.*|lm_head/kernel", path):
      noise = rng.standard_normal(leaf.shape) / leaf.shape[-2] ** 0.5
      params[path] = leaf + np.float32(noise)
  params = partition.unflatten(params)
  folder = tmp_path / "adapter"
  lora_peft.write(language, params, folder, lora_peft.TABLES)

  model = base(pair)
  model.resize_token_embeddings(152)
  adapted = peft.PeftModel.from_pretrained(model, folder)
  want = theirs(adapted)
  hf_compare.assert_outputs_equal(ours(params, language), want)
  # Back again: of the padding's columns nothing came along.
  again = lora_peft.read(language, lora.strip(params), folder)
  hf_compare.assert_outputs_equal(ours(again, language), want)


def test_rows_that_an_adapter_lacks_become_its_mean(made):
  pair, adapted, folder, _ = made("the paper's, and both tables")
  config = dataclasses.replace(pair.config, vocab_size=152)
  params = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype), hf_models.abstract(config)
  )
  got = lora_peft.read(config, params, folder, fresh=(3,))
  table = adapted.get_input_embeddings().modules_to_save["default"].weight
  table = table.detach().numpy()
  got = got["embed_tokens"]["embedding"]
  known = np.arange(150) != 3
  np.testing.assert_array_equal(got[:150][known], table[known])
  mean = table[known].mean(0, dtype=np.float64)
  np.testing.assert_allclose(got[[3, 150, 151]], [mean] * 3, atol=1e-6)
  assert not got[152:].any()


def test_an_adapter_of_a_model_without_a_head(tmp_path):
  pair = hf_models.language(tmp_path / "base")
  plain = transformers.LlamaModel.from_pretrained(tmp_path / "base")
  strengths = {"layers.1.self_attn.q_proj": 2}
  adapted = adapter(plain, task_type=None, alpha_pattern=strengths)
  adapted.save_pretrained(tmp_path / "adapter")
  params = lora_peft.read(pair.config, pair.params, tmp_path / "adapter")
  with torch.no_grad():
    want = adapted(input_ids=torch.from_numpy(TOKENS)).last_hidden_state
    want = pair.oracle.lm_head(want).numpy()
  hf_compare.assert_outputs_equal(ours(params, pair.config), want)


def test_numbers_keep_their_type_unless_told(made, tmp_path):
  pair, _, folder, params = made("the paper's, and both tables")
  there = safetensors_numpy.load_file(folder / "adapter_model.safetensors")
  there = {key: x.astype(ml_dtypes.bfloat16) for key, x in there.items()}
  safetensors_numpy.save_file(there, tmp_path / "adapter_model.safetensors")
  config = (folder / "adapter_config.json").read_text()
  (tmp_path / "adapter_config.json").write_text(config)
  q_proj = ("layers", "self_attn", "q_proj")
  for dtype, want in ((None, jnp.bfloat16), (np.float32, np.float32)):
    got = lora_peft.read(pair.config, pair.params, tmp_path, dtype=dtype)
    assert got["embed_tokens"]["embedding"].dtype == np.float32
    for key in q_proj:
      got = got[key]
    assert got["lora_a"].dtype == got["lora_b"].dtype == want
    assert got["lora_scale"].dtype == np.float32
    np.testing.assert_allclose(
      np.float32(got["lora_a"]),
      params["layers"]["self_attn"]["q_proj"]["lora_a"],
      rtol=2**-8,
    )


def test_shapes_are_enough_and_old_lora_gives_way(made, tmp_path):
  pair, _, folder, params = made("some layers, other ranks")
  got = lora_peft.read(pair.config, pair.shapes, folder)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, params)
  again = lora_peft.read(pair.config, params, folder)
  hf_compare.assert_same(again, params)
  # Nothing of another adapter is left.
  _, _, other, _ = made("the paper's, and both tables")
  got = lora_peft.read(pair.config, params, other)
  assert "lora_a" not in got["layers"]["mlp"]["up_proj"]


def test_nothing_to_write_and_nothing_overwritten(made, tmp_path):
  pair, _, folder, params = made("the paper's, and both tables")
  with pytest.raises(ValueError, match="has no LoRA to write"):
    lora_peft.write(pair.config, pair.params, tmp_path)
  assert not any(tmp_path.iterdir())
  with pytest.raises(ValueError, match="already holds adapter_model"):
    lora_peft.write(pair.config, params, folder)


def test_tables_trained_apart_do_not_fit_a_tied_model(tmp_path):
  pair = hf_models.language(tmp_path / "base", tie_word_embeddings=True)
  for number, saved in enumerate((["embed_tokens"], [*lora_peft.TABLES])):
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
      adapted = adapter(base(pair), modules_to_save=saved)
    folder = tmp_path / str(number)
    adapted.save_pretrained(folder)
    with pytest.raises(files.WeightsError, match="tie_word_embeddings=false"):
      lora_peft.read(pair.config, pair.params, folder)


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"layers_to_transform": [1]},
    {"layers_to_transform": 2, "layers_pattern": "layers"},
    {"target_modules": r".*\.(0|2)\..*_proj"},
    {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj"]},
    {"target_modules": ["0.self_attn.q_proj", "lm_head", "down_proj"]},
    {"target_modules": ["k_proj"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
  ],
)
def test_the_modules_that_settings_name_are_pefts(made, change):
  pair, _, _, _ = made("the paper's, and both tables")
  adapted = adapter(base(pair), **change)
  # In the file peft has put this layer's names for "all-linear".
  settings = lora_settings.read({"peft_type": "LORA", **PAPER, **change})
  want = {
    name.removeprefix("base_model.model.").partition(".lora_A")[0]
    for name, _ in adapted.named_parameters()
    if "lora_A" in name
  }
  modules = [
    name
    for name, module in base(pair).named_modules()
    if isinstance(module, torch.nn.Linear)
  ]
  assert {name for name in modules if settings.targets_module(name)} == want
