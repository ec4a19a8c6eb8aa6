"""Folders as the hub has them: old names of tensors, shards, half precision.

What is read must be, bit for bit, what the plain folder of today's
transformers or diffusers gives.
"""

import re

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from photochat_jax.checkpoints import blip2, files, tables

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import hf_compare  # noqa: E402
import hf_models  # noqa: E402


def renamed(folder, change):
  """The tensors of a folder under other names, through a file of their own.

  Args:
    folder: of one weight file.
    change: a function from {name: array} to the same.
  """
  (path,) = folder.glob("*.safetensors")
  odd = folder / "odd"
  odd.mkdir()
  arrays = change(safetensors.numpy.load_file(path))
  safetensors.numpy.save_file(arrays, odd / "model.safetensors")
  return files.Tensors(odd)


def read(pair, tensors, dtype=None):
  return tables.read(pair.table, pair.shapes, tensors, dtype)


def test_text_encoders_with_the_prefix_and_the_numbers_of_the_hub(tmp_path):
  pair = hf_models.text(tmp_path)

  def change(arrays):
    assert not any(key.startswith("text_model.") for key in arrays)
    arrays = {f"text_model.{key}": array for key, array in arrays.items()}
    numbers = np.arange(9, dtype=np.int64)[None]
    arrays["text_model.embeddings.position_ids"] = numbers
    return arrays

  tensors = renamed(tmp_path, change)
  hf_compare.assert_same(read(pair, tensors), pair.params)


@pytest.mark.parametrize("tied", [False, True])
def test_language_models_with_rotations_and_a_tied_head(tied, tmp_path):
  pair = hf_models.language(tmp_path, tie_word_embeddings=tied)

  def change(arrays):
    assert ("lm_head.weight" in arrays) != tied
    if tied:
      arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    for layer in range(3):
      key = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
      arrays[key] = np.ones(4, np.float32)
    return arrays

  tensors = renamed(tmp_path, change)
  hf_compare.assert_same(read(pair, tensors), pair.params)


def test_a_tied_language_model_without_its_prefix(tmp_path):
  pair = hf_models.language(tmp_path / "whole", tie_word_embeddings=True)
  pair.oracle.model.save_pretrained(tmp_path / "bare")
  tensors = files.Tensors(tmp_path / "bare")
  assert "embed_tokens.weight" in tensors
  hf_compare.assert_same(read(pair, tensors), pair.params)


def test_an_autoencoder_with_the_attention_of_2022(tmp_path):
  pair = hf_models.autoencoder(tmp_path)
  old = {
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out.0": "proj_attn",
  }
  count = 0

  def change(arrays):
    nonlocal count
    result = {}
    for key, array in arrays.items():
      for new, name in old.items():
        key, changes = re.subn(
          rf"(attentions\.0\.){re.escape(new)}\.", rf"\1{name}.", key
        )
        count += changes
      result[key] = array
    return result

  tensors = renamed(tmp_path, change)
  assert count == 2 * 4 * 2
  hf_compare.assert_same(read(pair, tensors), pair.params)


@pytest.mark.parametrize("build", [hf_models.language, hf_models.autoencoder])
def test_shards_are_one_model(build, tmp_path):
  want = build(tmp_path / "whole")
  got = build(tmp_path / "shards", save={"max_shard_size": "9KB"})
  assert len(list(got.folder.glob("*-of-*.safetensors"))) > 2
  hf_compare.assert_same(got.params, want.params)


@pytest.mark.parametrize("build", [hf_models.language, hf_models.autoencoder])
def test_a_folder_with_the_half_precision_variant_alone(build, tmp_path):
  pair = build(tmp_path / "whole")
  half = pair.oracle.half()
  half.save_pretrained(tmp_path / "half", variant="fp16")
  stem = files.MODEL if build is hf_models.language else files.DIFFUSION
  tensors = files.Tensors(tmp_path / "half", stem)
  assert tensors.files == [f"{stem}.fp16.safetensors"]
  got = read(pair, tensors, np.float32)
  want = jax.tree.map(
    lambda x: x.astype(np.float16).astype(np.float32), pair.params
  )
  hf_compare.assert_same(got, want)


@pytest.mark.parametrize(
  "theirs,ours",
  [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)],
)
def test_half_precision_files_keep_every_bit(theirs, ours, tmp_path):
  pair = hf_models.language(tmp_path / "whole")
  half = pair.oracle.to(getattr(torch, theirs))
  half.save_pretrained(tmp_path / "half")
  tensors = files.Tensors(tmp_path / "half")
  assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ours)}
  # As torch widens them, and as they are.
  want = read(
    pair,
    {key: value.float().numpy() for key, value in half.state_dict().items()},
  )
  hf_compare.assert_same(read(pair, tensors, np.float32), want)
  kept = read(pair, tensors)
  assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {np.dtype(ours)}
  wide = jax.tree.map(lambda x: x.astype(np.float32), kept)
  hf_compare.assert_same(wide, want)
  # Float32 files are rounded as torch rounds them.
  hf_compare.assert_same(read(pair, files.Tensors(pair.folder), ours), kept)


@pytest.mark.parametrize("name", ["Blip2Model", "Blip2ForImageTextRetrieval"])
def test_every_model_with_such_eyes_gives_them(name, tmp_path):
  oracle = getattr(transformers, name)(
    transformers.Blip2Config(
      vision_config=hf_models.VISION,
      # Retrieval reads texts with the Q-Former; those weights are no eyes.
      qformer_config={
        **hf_models.QFORMER,
        "use_qformer_text_input": name == "Blip2ForImageTextRetrieval",
      },
      text_config={
        "model_type": "opt",
        "vocab_size": 11,
        "hidden_size": 8,
        "ffn_dim": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 8,
      },
      image_text_hidden_size=6,
      num_query_tokens=2,
    )
  )
  hf_models.randomise(oracle).save_pretrained(tmp_path)
  config = blip2.read_config(files.read_json(tmp_path / "config.json"))
  table, shapes = blip2.table(*config), hf_models.abstract_eyes(*config)
  tensors, state = files.Tensors(tmp_path), hf_compare.arrays(oracle)
  got = tables.read(table, shapes, tensors)
  # All that are eyes were read, and back they are what they were.
  eyes = re.compile(
    r"vision_model\..*|query_tokens|qformer\.layernorm\..*"
    r"|qformer\.encoder\..*(attention|_query)\..*"
  )
  want = {key: state[key] for key in state if eyes.fullmatch(key)}
  hf_compare.assert_same(dict(tables.write(table, got)), want)
  # The linear perceiver leaves the Q-Former where it is.
  alone = tables.read(
    blip2.without_qformer(table),
    {"vision_model": shapes["vision_model"]},
    tensors,
  )
  hf_compare.assert_same(alone, {"vision_model": got["vision_model"]})
