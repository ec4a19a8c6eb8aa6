"""The language model's LoRA against peft's on transformers' Llama."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from photochat_jax.checkpoints import lora_peft
from photochat_jax.models import llama
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

PAPER = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]}
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
  settings = peft.LoraConfig(task_type="CAUSAL_LM", **PAPER | changes)
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
  pair = hf_models.language(tmp_path / "base", ours={"vocab_size": 152})
  table = llama_files.table(pair.config, 150, fresh=(150, 151))
  tensors = files.Tensors(tmp_path / "base")
  params = tables.read(table, hf_models.abstract(pair.config), tensors)
  config = lora.LoRAConfig(4, 9.0, (r"layers/mlp/\w+_proj", "lm_head"))
  with pytest.raises(ValueError, match="takes no LoRA"):
    lora.init(config, params, jax.random.key(0))
  config = lora.LoRAConfig(
    4, 9.0, (r"language_model/layers/mlp/\w+_proj", "language_model/lm_head")
  )
  params = lora.init(config, {"language_model": params}, jax.random.key(0))
  rng = np.random.default_rng(6)
  params = jax.tree.map(
    lambda x: x + np.float32(0.1 * rng.standard_normal(x.shape)),
    params["language_model"],
  )
  # As every column of the padding is there, without a meaning.
  lora_peft.write(pair.config, params, tmp_path / "adapter", lora_peft.TABLES)
  model = base(pair)
  model.resize_token_embeddings(152)
  adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
  rest = lora.strip(params)
  for key, value in tables.write(llama_files.table(pair.config), rest):
    if "norm" in key or "self_attn" in key or "mlp" in key:
      owner = adapted.get_base_model()
      names = dict(owner.named_parameters())
      name = (
        key if key in names else key.replace(".weight", ".base_layer.weight")
      )
      names[name].data.copy_(torch.from_numpy(np.array(value)))
  hf_compare.assert_outputs_equal(ours(params, pair.config), theirs(adapted))

  # Back into ours, tables and all.
  again = lora_peft.read(pair.config, lora.strip(params), tmp_path / "adapter")
  np.testing.assert_allclose(
    ours(again, pair.config), ours(params, pair.config), atol=1e-5
  )


def test_rows_that_an_adapter_lacks_become_its_mean(made):
  pair, adapted, folder, _ = made("the paper's, and both tables")
  config = llama.LlamaConfig(
    **{**vars(pair.config), "vocab_size": pair.config.vocab_size + 2}
  )
  shapes = hf_models.abstract(config)
  params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
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
  adapted = adapter(plain, alpha_pattern={"layers.1.self_attn.q_proj": 2})
  adapted.peft_config["default"].task_type = None
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


Q, UP = (
  f"base_model.model.model.layers.{name}"
  for name in ("0.self_attn.q_proj", "1.self_attn.q_proj")
)


def without(*names):
  return lambda there: {k: v for k, v in there.items() if k not in names}


def plus(**arrays):
  return lambda there: (
    there | {key.replace("__", "."): value for key, value in arrays.items()}
  )


# (changes of the config, of the tensors, what is complained about).
FAULTS = {
  "another method": ({"peft_type": "LOHA"}, None, "peft_type='LOHA'"),
  "DoRA": ({"use_dora": True}, None, "use_dora=True"),
  "biases": ({"bias": "all"}, None, "bias='all'"),
  "changes the base": (
    {"init_lora_weights": "pissa_niter_4"},
    None,
    "path_initial_model_for_weight_conversion",
  ),
  "no alpha": ({"lora_alpha": "16"}, None, "must be a number"),
  "no rank": ({"r": 0}, None, "r=0"),
  "no regex": ({"rank_pattern": {"(": 3}}, None, "is no regex"),
  "odd names": ({"target_modules": [3]}, None, "a name or several"),
  "odd layers": ({"layers_to_transform": "1"}, None, "a number or several"),
  "odd alphas": ({"alpha_pattern": {"a": "b"}}, None, "numbers by name"),
  "another rank": ({"r": 4}, None, "rank 3 and not 4"),
  "a matrix missing": (
    {},
    without(f"{Q}.lora_A.weight"),
    r"1 missing: model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight",
  ),
  "a layer missing": (
    {},
    without(f"{UP}.lora_A.weight", f"{UP}.lora_B.weight"),
    r"2 missing: .*1\.self_attn\.q_proj\.lora_A.*lora_B",
  ),
  "a table missing": (
    {"modules_to_save": ["embed_tokens"]},
    None,
    r"1 missing: model\.embed_tokens\.weight",
  ),
  "unknown": (
    {},
    plus(base_model__model__model__layers__9__lora_A__weight=np.ones((3, 3))),
    "1 unknown: base_model.model.model.layers.9.lora_A.weight",
  ),
  "an embedding's": (
    {},
    plus(base_model__model__model__embed_tokens__lora_embedding_A=np.ones(3)),
    "1 unknown: .*lora_embedding_A",
  ),
  "another shape": (
    {},
    lambda there: there | {f"{Q}.lora_B.weight": np.ones((31, 3), np.float32)},
    r"q_proj\.lora_B\.weight are \[31, 3\] and must be \[32, 3\]",
  ),
  "a table of another shape": (
    {},
    plus(base_model__model__lm_head__weight=np.ones((150, 8), np.float32)),
    r"lm_head\.weight are \[150, 8\] and must be \[150, 32\]",
  ),
  "a table too large": (
    {},
    plus(base_model__model__lm_head__weight=np.ones((151, 32), np.float32)),
    "151 tokens and vocab_size is 150",
  ),
  "not finite": (
    {},
    lambda there: (
      there | {f"{Q}.lora_B.weight": np.full((32, 3), np.nan, np.float32)}
    ),
    "q_proj.lora_B.weight of the adapter has values that are NaN",
  ),
  "quantised": (
    {},
    lambda there: there | {f"{Q}.lora_B.weight": np.ones((32, 3), np.int8)},
    "q_proj.lora_B.weight is stored as I8",
  ),
  "empty": ({"target_modules": None}, lambda there: {}, "there are none"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """A model and its adapter for the query and the value."""
  folder = tmp_path_factory.mktemp("plain")
  pair = hf_models.language(folder / "base")
  adapter(pair.oracle).save_pretrained(folder / "adapter")
  return pair, folder / "adapter"


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_named(plain, name, tmp_path):
  pair, folder = plain
  settings, change, complaint = FAULTS[name]
  content = json.loads((folder / "adapter_config.json").read_text())
  (tmp_path / "adapter_config.json").write_text(json.dumps(content | settings))
  there = safetensors_numpy.load_file(folder / "adapter_model.safetensors")
  there = change(there) if change else there
  safetensors_numpy.save_file(there, tmp_path / "adapter_model.safetensors")
  with pytest.raises(files.WeightsError, match=complaint):
    lora_peft.read(pair.config, pair.shapes, tmp_path)


def test_all_faults_are_told_at_once(plain, tmp_path):
  pair, folder = plain
  text = (folder / "adapter_config.json").read_text()
  (tmp_path / "adapter_config.json").write_text(text)
  there = safetensors_numpy.load_file(folder / "adapter_model.safetensors")
  del there[f"{Q}.lora_A.weight"]
  there[f"{UP}.lora_A.weight"] = np.ones((3, 5), np.float32)
  there["x.weight"] = np.ones(1, np.float32)
  safetensors_numpy.save_file(there, tmp_path / "adapter_model.safetensors")
  with pytest.raises(tables.TableError) as error:
    lora_peft.read(pair.config, pair.shapes, tmp_path)
  assert error.value.missing == (
    "model.layers.0.self_attn.q_proj.lora_A.weight",
  )
  assert error.value.extra == ("x.weight",)
  assert error.value.misshapen == ((f"{UP}.lora_A.weight", (3, 5), (3, 32)),)
  assert str(tmp_path) in str(error.value)


def test_a_pickled_adapter_is_refused(plain, tmp_path):
  pair, folder = plain
  text = (folder / "adapter_config.json").read_text()
  (tmp_path / "adapter_config.json").write_text(text)
  (tmp_path / "adapter_model.bin").write_bytes(b"PK\3\4")
  with pytest.raises(files.WeightsError, match="adapter_model.bin .*can run"):
    lora_peft.read(pair.config, pair.shapes, tmp_path)


def test_tables_trained_apart_do_not_fit_a_tied_model(tmp_path):
  pair = hf_models.language(tmp_path / "base", tie_word_embeddings=True)
  for number, saved in enumerate((["embed_tokens"], [*lora_peft.TABLES])):
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
      adapted = adapter(base(pair), modules_to_save=saved)
    folder = tmp_path / str(number)
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
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
def test_the_modules_that_settings_name_are_pefts(plain, change):
  pair, _ = plain
  adapted = adapter(base(pair), **change)
  content = adapted.peft_config["default"].to_dict()
  # peft resolves this word when it makes the adapter.
  content["target_modules"] = change.get(
    "target_modules", PAPER["target_modules"]
  )
  content |= {"peft_type": "LORA"}
  settings = lora_settings.read(content)
  want = {
    name.removeprefix("base_model.model.").partition(".lora_A")[0]
    for name, _ in adapted.named_parameters()
    if "lora_A" in name
  }
  linear = {
    key.removesuffix(".weight")
    for key in pair.oracle.state_dict()
    if "proj" in key or "lm_head" in key
  }
  linear = {name.removesuffix(".base_layer") for name in linear}
  linear = {
    re.sub(r"\.lora_.*|^base_model\.model\.", "", name) for name in linear
  }
  assert {name for name in linear if settings.targets_module(name)} == want
