"""checkpoints/lora*.py: the whole model's adapters, and what can be wrong."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from photochat_jax.checkpoints import files, lora_diffusers, lora_peft, tables
from photochat_jax.checkpoints import lora as adapters
from photochat_jax.config import RunConfig
from photochat_jax.models import llama, lora, unet
from photochat_jax.ops import partition

LANGUAGE = llama.LlamaConfig(
  vocab_size=150,
  hidden_size=8,
  intermediate_size=12,
  num_hidden_layers=2,
  num_attention_heads=2,
  num_key_value_heads=1,
)
UNET = unet.UNetConfig.tiny(
  block_out_channels=(8, 16),
  attention=(True, False),
  num_attention_heads=2,
  cross_attention_dim=6,
  norm_num_groups=4,
)
PEFT, DIFFUSERS = (
  "adapter_model.safetensors",
  "pytorch_lora_weights.safetensors",
)


@pytest.fixture(scope="module")
def shapes():
  """Of the language model and the UNet."""
  key, ids = jax.random.key(0), np.zeros((1, 2), np.int32)

  def of(module, *inputs):
    return jax.eval_shape(module.init, key, *inputs)["params"]

  vectors = np.zeros((1, 2, 8), np.float32)
  latents = np.zeros((1, 4, 4, 4), np.float32)
  context = np.zeros((1, 2, 6), np.float32)
  return {
    "language_model": of(llama.Llama(LANGUAGE), vectors, ids, ids),
    "unet": of(unet.UNet(UNET), latents, np.zeros(1), context),
  }


def peft_folder(folder, settings=None, change=None):
  """An adapter as peft writes it, for queries and values of both layers."""
  rng = np.random.default_rng(1)
  there = {}
  for layer in range(2):
    for name, width in (("q_proj", 8), ("v_proj", 4)):
      module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
      for letter, shape in (("A", (3, 8)), ("B", (width, 3))):
        array = rng.standard_normal(shape).astype(np.float32)
        there[f"{module}.lora_{letter}.weight"] = array
  there = change(there) if change else there
  safetensors_numpy.save_file(there, folder / PEFT)
  content = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj"],
    "lora_dropout": 0.1,
  }
  text = json.dumps(content | (settings or {}))
  (folder / "adapter_config.json").write_text(text)


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def diffusers_file(folder, change=None, metadata=None):
  """An adapter as diffusers writes it, for one query and one value."""
  rng = np.random.default_rng(2)
  there = {}
  for name, width in (("attn1.to_q", 8), ("attn2.to_v", 6)):
    for letter, shape in (("A", (3, width)), ("B", (8, 3))):
      array = rng.standard_normal(shape).astype(np.float32)
      there[f"unet.{BLOCK}.{name}.lora_{letter}.weight"] = array
  there = change(there) if change else there
  safetensors_numpy.save_file(there, folder / DIFFUSERS, metadata)


def without(*names):
  return lambda there: {k: v for k, v in there.items() if k not in names}


def plus(key, *shape, value=1.0, dtype=np.float32):
  """One tensor more, or in the place of one."""
  return lambda there: there | {key: np.full(shape, value, dtype)}


Q0, Q1 = (
  f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in "01"
)
HEAD = "base_model.model.lm_head.weight"
# (changes of the settings, of the tensors, what is complained about).
PEFT_FAULTS = {
  "another method": ({"peft_type": "LOHA"}, None, "peft_type='LOHA'"),
  "DoRA": ({"use_dora": True}, None, "use_dora=True"),
  "biases": ({"bias": "all"}, None, "bias='all'"),
  "single tokens": (
    {"trainable_token_indices": [1]},
    None,
    "trainable_token_indices=",
  ),
  "it changes the base": (
    {"init_lora_weights": "pissa_niter_4"},
    None,
    "'pissa_niter_4'.*path_initial_model_for_weight_conversion",
  ),
  "alpha is text": ({"lora_alpha": "16"}, None, "must be a number"),
  "no rank": ({"r": 0}, None, "r=0"),
  "no regex": ({"rank_pattern": {"(": 3}}, None, "is no regex"),
  "odd names": ({"target_modules": [3]}, None, "a name or several"),
  "odd layers": ({"layers_to_transform": "1"}, None, "a number or several"),
  "odd alphas": ({"alpha_pattern": {"a": "b"}}, None, "numbers by name"),
  "another rank": ({"r": 4}, None, "rank 3 and not 4.*and so 3 more"),
  "a matrix is missing": (
    {},
    without(f"{Q0}.lora_A.weight"),
    r"1 missing: model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight",
  ),
  "a layer is missing": (
    {},
    without(f"{Q1}.lora_A.weight", f"{Q1}.lora_B.weight"),
    r"2 missing: .*1\.self_attn\.q_proj\.lora_A.*lora_B",
  ),
  "a table is missing": (
    {"modules_to_save": ["embed_tokens"]},
    None,
    r"1 missing: model\.embed_tokens\.weight",
  ),
  "a layer too many": (
    {},
    plus(
      "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", 3, 8
    ),
    r"1 unknown: base_model\.model\.model\.layers\.2",
  ),
  "an embedding's": (
    {},
    plus("base_model.model.model.embed_tokens.lora_embedding_A", 3, 150),
    "1 unknown: .*lora_embedding_A",
  ),
  "another shape": (
    {},
    plus(f"{Q0}.lora_B.weight", 7, 3),
    r"q_proj\.lora_B\.weight are \[7, 3\] and must be \[8, 3\]",
  ),
  "no shape": ({}, plus(f"{Q0}.lora_A.weight"), r"are \[\] and must be \[1, 8"),
  "a table of another width": (
    {},
    plus(HEAD, 150, 9),
    r"lm_head\.weight are \[150, 9\] and must be \[150, 8\]",
  ),
  "a table too large": ({}, plus(HEAD, 151, 8), "151 tokens and .* is 150"),
  "not finite": (
    {},
    plus(f"{Q0}.lora_B.weight", 8, 3, value=np.nan),
    r"q_proj\.lora_B\.weight of the adapter has values that are NaN",
  ),
  "quantised": (
    {},
    plus(f"{Q0}.lora_B.weight", 8, 3, dtype=np.int8),
    r"q_proj\.lora_B\.weight is stored as I8",
  ),
  "empty": ({"target_modules": None}, lambda there: {}, "there are none"),
}


@pytest.mark.parametrize("name", PEFT_FAULTS)
def test_what_is_wrong_with_pefts_is_named(shapes, name, tmp_path):
  settings, change, complaint = PEFT_FAULTS[name]
  peft_folder(tmp_path, settings, change)
  with pytest.raises(files.WeightsError, match=complaint) as error:
    lora_peft.read(LANGUAGE, shapes["language_model"], tmp_path)
  assert str(error.value).count(". ") == 0  # One sentence.


Q, V = f"unet.{BLOCK}.attn1.to_q", f"unet.{BLOCK}.attn2.to_v"
SETTINGS = {"unet.r": 3, "unet.lora_alpha": 6, "unet.target_modules": ["to_q"]}


def as_metadata(**changes):
  settings = SETTINGS | {f"unet.{k}": v for k, v in changes.items()}
  settings = {"unet.peft_type": "LORA"} | settings
  return {"lora_adapter_metadata": json.dumps(settings)}


# (changes of the tensors, metadata, what is complained about).
DIFFUSERS_FAULTS = {
  "a text encoder's": (
    plus("text_encoder.text_model.encoder.layers.0.q_proj.lora_A.weight", 1),
    None,
    "1 unknown: text_encoder.*; those of a text encoder .*skip_text",
  ),
  "kohya's of a text encoder": (
    plus("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", 1),
    None,
    "1 unknown: lora_te_.*skip_text",
  ),
  "a convolution's": (
    plus("unet.down_blocks.0.resnets.0.conv1.lora_A.weight", 3, 8, 3, 3),
    None,
    "1 unknown: .*conv1.lora_A.weight; 3x3 convolutions take no LoRA",
  ),
  "kohya's of a convolution": (
    plus("lora_unet_conv_in.lora_down.weight", 3, 4, 3, 3),
    None,
    "1 unknown: lora_unet_conv_in.*3x3 convolutions take no LoRA",
  ),
  "another method": (
    plus("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", 3, 4),
    None,
    "1 unknown: .*hada_w1_a",
  ),
  "DoRA": (
    plus(f"{Q}.lora_magnitude_vector", 8),
    None,
    "1 unknown: .*lora_magnitude_vector",
  ),
  "another model's": (
    plus("unet.down_blocks.5.attentions.0.proj_in.lora_A.weight", 3, 8),
    None,
    r"1 unknown: unet.down_blocks\.5",
  ),
  "a matrix is missing": (
    without(f"{Q}.lora_B.weight"),
    None,
    r"1 missing: down_blocks.*to_q\.lora_B\.weight",
  ),
  "a module is missing": (
    without(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"),
    as_metadata(target_modules=["attn1.to_q"], exclude_modules="(mid|up).*"),
    r"2 missing: down_blocks.*to_q\.lora_A\.weight.*to_q\.lora_B\.weight",
  ),
  "another shape": (
    plus(f"{Q}.lora_A.weight", 3, 7),
    None,
    r"to_q\.lora_A\.weight are \[3, 7\] and must be \[3, 8\]",
  ),
  "some alphas": (plus(f"{Q}.alpha"), None, r"1 missing: .*to_v\.alpha"),
  "two alphas": (
    lambda there: plus(f"{Q}.alpha", 2)(plus(f"{V}.alpha")(there)),
    None,
    r"to_q\.alpha are \[2\] and must be \[\]",
  ),
  "alphas and metadata": (
    lambda there: plus(f"{Q}.alpha")(plus(f"{V}.alpha")(there)),
    as_metadata(target_modules=[]),
    "its strength is in alphas and in lora_adapter_metadata",
  ),
  "another rank": (
    None,
    as_metadata(r=2, target_modules=[]),
    "rank 3 and not 2 as its settings say, and so 1 more",
  ),
  "metadata of DoRA": (None, as_metadata(use_dora=True), "use_dora=True"),
  "damaged metadata": (
    None,
    {"lora_adapter_metadata": "{"},
    "metadata lora_adapter_metadata of .* is not JSON",
  ),
  "odd metadata": (None, {"lora_adapter_metadata": "[]"}, "rank 3 and not 8"),
  "not finite": (
    plus(f"{Q}.lora_B.weight", 8, 3, value=np.inf),
    None,
    "to_q.lora_B.weight of the adapter has values that are NaN or inf",
  ),
  "empty": (lambda there: {}, None, "none for a dense layer of the UNet"),
}


@pytest.mark.parametrize("name", DIFFUSERS_FAULTS)
def test_what_is_wrong_with_diffusers_is_named(shapes, name, tmp_path):
  change, metadata, complaint = DIFFUSERS_FAULTS[name]
  diffusers_file(tmp_path, change, metadata)
  with pytest.raises(files.WeightsError, match=complaint) as error:
    lora_diffusers.read(UNET, shapes["unet"], tmp_path)
  assert str(error.value).count(". ") == 0


def test_all_faults_are_told_at_once(shapes, tmp_path):
  def change(there):
    del there[f"{Q0}.lora_A.weight"]
    there[f"{Q1}.lora_A.weight"] = np.ones((3, 5), np.float32)
    return there | {"x.weight": np.ones(1, np.float32)}

  peft_folder(tmp_path, None, change)
  with pytest.raises(tables.TableError) as error:
    lora_peft.read(LANGUAGE, shapes["language_model"], tmp_path)
  found = error.value
  assert found.missing == ("model.layers.0.self_attn.q_proj.lora_A.weight",)
  assert found.extra == ("x.weight",)
  assert found.misshapen == ((f"{Q1}.lora_A.weight", (3, 5), (3, 8)),)
  assert str(tmp_path) in str(found)


def test_files_that_are_not_there_or_pickled(shapes, tmp_path):
  language, denoiser = shapes["language_model"], shapes["unet"]
  (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
  (tmp_path / "adapter_model.bin").write_bytes(b"PK\3\4")
  with pytest.raises(files.WeightsError, match="adapter_model.bin .*can run"):
    lora_peft.read(LANGUAGE, language, tmp_path)
  with pytest.raises(files.WeightsError, match="adapter_model.bin .*can run"):
    lora_diffusers.read(UNET, denoiser, tmp_path)
  with pytest.raises(files.WeightsError, match="adapter_model.bin .*can run"):
    lora_diffusers.read(UNET, denoiser, tmp_path / "adapter_model.bin")
  with pytest.raises(files.WeightsError, match="There is no x.safetensors"):
    lora_diffusers.read(UNET, denoiser, tmp_path / "x.safetensors")
  with pytest.raises(files.WeightsError, match="There is no folder"):
    lora_peft.read(LANGUAGE, language, tmp_path / "none")
  for name in ("one", "two"):  # Which of them is meant?
    safetensors_numpy.save_file({}, tmp_path / f"{name}.safetensors")
  (tmp_path / "adapter_model.bin").unlink()
  with pytest.raises(files.WeightsError, match="holds no pytorch_lora_weights"):
    lora_diffusers.read(UNET, denoiser, tmp_path)


def test_a_text_encoders_part_can_be_left_out(shapes, tmp_path):
  key = "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"
  (tmp_path / "both").mkdir()
  diffusers_file(tmp_path / "both", plus(key, 3, 8))
  diffusers_file(tmp_path)
  got = lora_diffusers.read(UNET, shapes["unet"], tmp_path / "both", True)
  want = lora_diffusers.read(UNET, shapes["unet"], tmp_path)
  chex.assert_trees_all_equal(lora_leaves(got), lora_leaves(want))


def lora_leaves(tree):
  return {
    path: leaf
    for path, leaf in partition.flatten(tree).items()
    if path.rpartition("/")[2] in lora.LEAVES
  }


@pytest.mark.parametrize("metadata, scale", [(None, 1), (as_metadata(), 2)])
def test_an_adapter_by_hand(shapes, metadata, scale, tmp_path):
  only = without(f"{V}.lora_A.weight", f"{V}.lora_B.weight")
  if metadata:  # Which says that other queries have one too.
    metadata = as_metadata(target_modules=[f"{BLOCK}.attn1.to_q"])
  diffusers_file(tmp_path, only, metadata)
  there = safetensors_numpy.load_file(tmp_path / DIFFUSERS)
  got = lora_leaves(lora_diffusers.read(UNET, shapes["unet"], tmp_path))
  start = "down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q"
  assert got.keys() == {f"{start}/{name}" for name in lora.LEAVES}
  a, b, strength = got.values()
  np.testing.assert_array_equal(a, there[f"{Q}.lora_A.weight"].T)
  np.testing.assert_array_equal(b, there[f"{Q}.lora_B.weight"].T)
  assert strength == scale and strength.shape == ()


def test_a_whole_models_adapters_there_and_back(shapes, tmp_path):
  config = dataclasses.replace(RunConfig().model, language=LANGUAGE, unet=UNET)
  peft_folder(tmp_path)
  diffusers_file(tmp_path)
  read = adapters.read(
    config, shapes, tmp_path, tmp_path / DIFFUSERS, dtype=np.float32
  )
  assert read["unet"].keys() == shapes["unet"].keys()
  found = lora_leaves(read)
  assert len(found) == 4 * 3
  chex.assert_trees_all_equal(adapters.read(config, read), read)

  adapters.write(config, read, tmp_path / "out")
  llm, diffusion = tmp_path / "out" / "llm", tmp_path / "out" / "diffusion"
  for name, folder in ((PEFT, llm), (DIFFUSERS, diffusion)):
    want, got = (
      safetensors_numpy.load_file(where / name) for where in (tmp_path, folder)
    )
    chex.assert_trees_all_equal(got, want)
  again = adapters.read(config, shapes, llm, diffusion)
  chex.assert_trees_all_equal(lora_leaves(again), found)
  settings = json.loads((llm / "adapter_config.json").read_text())
  assert (settings["r"], settings["lora_alpha"]) == (3, 6)
  assert settings["target_modules"] == ["q_proj", "v_proj"]

  only = {**shapes, "language_model": read["language_model"]}
  adapters.write(config, only, tmp_path / "one")
  assert [path.name for path in (tmp_path / "one").iterdir()] == ["llm"]
  with pytest.raises(files.WeightsError, match=r"comes with model\.lora\.rank"):
    adapters.write(config, shapes, tmp_path / "none")
  with pytest.raises(files.WeightsError, match="already holds adapter_model"):
    adapters.write(config, read, tmp_path / "out")
