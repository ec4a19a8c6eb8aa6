"""Weights that cannot be used: which file or tensor, and what to do.

One thing is damaged in a copy of sound folders. What nothing can notice is a
flipped bit of a value that stays a number: safetensors has no checksum, so
`from_pretrained` of the originals reads it as well. Checkpoints of our own
carry a digest of each array, and `convert_hf` writes down the SHA-256 of every
file it read.
"""

import shutil

import hf_folders
import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.checkpoints.table_error import TableError
from photochat_jax.ops import partition

pytestmark = pytest.mark.usefixtures("shapes_once")
LLM = "llm/model.safetensors"
UNET = "diffusion/unet/diffusion_pytorch_model.safetensors"
ONE = "model.layers.1.mlp.gate_proj.weight"


def test_the_sound_folders_are_read(sound):
  hf_folders.read(sound)


def change_tensors(root, change, file=LLM):
  tensors = safetensors.numpy.load_file(root / file)
  change(tensors)
  safetensors.numpy.save_file(tensors, root / file)


def drop(*names):
  return lambda tensors: [tensors.pop(name) for name in names]


def add(**tensors):
  return lambda old: old.update(tensors)


def recast(dtype, *names):
  def change(tensors):
    for name in names or tuple(tensors):
      tensors[name] = tensors[name].astype(dtype)

  return change


def transpose(tensors):
  tensors[ONE] = np.ascontiguousarray(tensors[ONE].T)


def spell_anew(tensors):
  tensors["norm.weight"] = tensors["model.norm.weight"].copy()


TENSORS = {
  "one missing": (drop(ONE), f"1 missing: {ONE};"),
  "a layer missing": (
    lambda tensors: [tensors.pop(k) for k in list(tensors) if ".1." in k],
    "9 missing: model.layers.1.",
  ),
  "one more": (add(score=np.zeros(3, np.float32)), "1 unknown: score;"),
  "more lines": (add(**{"a\nb": np.zeros(3, np.float32)}), r"'a\nb'"),
  "another shape": (
    lambda tensors: tensors.update({ONE: tensors[ONE][:20]}),
    f"1 of another shape: {ONE} are [20, 16] and must be [24, 16];",
  ),
  "transposed": (transpose, "weight are [16, 24] and must be [24, 16]"),
  "no axes": (
    lambda tensors: tensors.update({ONE: np.float32(3)[None][0][...]}),
    "are [] and must be [24, 16]",
  ),
  "twice, by two names": (spell_anew, "norm.weight there a second time"),
  "one in eight bits": (recast(np.int8, ONE), f"{ONE} stored as I8"),
  "one logical": (recast(bool, ONE), f"{ONE} stored as BOOL"),
  "one in integers": (recast(np.int64, ONE), f"{ONE} stored as I64"),
  "one in float8": (
    recast(ml_dtypes.float8_e4m3fn, ONE),
    f"{ONE} stored as F8_E4M3",
  ),
  "all in eight bits": (
    recast(np.int8),
    "model.layers.*.mlp.gate_proj.weight (2)",
  ),
  "nothing": (lambda tensors: tensors.clear(), "21 missing: "),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(root, case):
  change, said = TENSORS[case]
  change_tensors(root, change)
  message = hf_folders.weights_complaint(root, "llm", kind=TableError)
  assert said in message
  assert "the language model in" in message and str(root / "llm") in message


# What the config says instead: what is said of the weights.
CONFIGS = {
  "fewer layers": ({"num_hidden_layers": 1}, "9 unknown: "),
  "more layers": ({"num_hidden_layers": 3}, "9 missing: "),
  "another width": (
    {"hidden_size": 32, "head_dim": 8},
    "(2) are [16, 24] and must be [32, 24] and 3 more",
  ),
  "the widest": (
    {"hidden_size": 2**24, "intermediate_size": 2**24},
    "[16777216, 16777216]",
  ),
  "the deepest": ({"num_hidden_layers": 1024}, ".weight (1022)"),
  "fewer tokens": ({"vocab_size": 90}, "are [100, 16] and must be [90, 16]"),
  "more tokens": ({"vocab_size": 110}, "are [100, 16] and must be [110, 16]"),
  "no table of its own": ({"tie_word_embeddings": True}, None),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_weights_of_another_config(root, case):
  changes, said = CONFIGS[case]
  hf_folders.edit(root / "llm/config.json", **changes)
  if said is None:  # The published files hold it twice, or only once.
    hf_folders.read(root, "llm")
    return
  assert said in hf_folders.weights_complaint(root, "llm", kind=TableError)


def test_eyes_of_another_width_than_the_q_former_reads(root):
  def widen(tensors):
    for name, value in tensors.items():
      if "crossattention.attention.key" in name and value.ndim == 2:
        tensors[name] = np.zeros((8, 14), np.float32)

  change_tensors(root, widen, "blip2/model.safetensors")
  message = hf_folders.weights_complaint(root, "blip2", kind=TableError)
  assert "key.weight are [8, 14] and must be [8, 12]" in message


def test_one_part_in_place_of_another(root):
  stem = "diffusion_pytorch_model.safetensors"
  shutil.copy(root / "diffusion/vae" / stem, root / UNET)
  message = hf_folders.weights_complaint(root, "diffusion", kind=TableError)
  assert "missing" in message and "unknown" in message
  assert " more" in message  # Not all of them are named.


def test_all_layers_are_told_at_once(root):
  """32 layers, each with three kernels of another shape and one missing."""
  layers = 32
  hf_folders.edit(
    root / "llm/config.json", num_hidden_layers=layers, intermediate_size=28
  )

  def change(tensors):
    first = {k: v for k, v in tensors.items() if ".0." in k}
    del first["model.layers.0.input_layernorm.weight"]
    for number in range(layers):
      for key, value in first.items():
        tensors[key.replace(".0.", f".{number}.")] = value.copy()
    for number in range(2):
      del tensors[f"model.layers.{number}.input_layernorm.weight"]

  change_tensors(root, change)
  message = hf_folders.weights_complaint(root, "llm", kind=TableError)
  assert "32 missing: model.layers.*.input_layernorm.weight (32); 96 of" in (
    message
  )
  assert "model.layers.*.mlp.down_proj.weight (32) are [16, 24]" in message


# ---------------------------------------------------------------------- values

BAD = {"NaN": np.nan, "-NaN": -np.nan, "Inf": np.inf, "-Inf": -np.inf}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_values_that_are_no_numbers(root, dtype, value):
  """They are looked for: it costs a tenth of reading, at memory's speed."""

  def change(tensors):
    recast(dtype)(tensors)
    tensors[ONE][-1, -1] = BAD[value]

  change_tensors(root, change)
  message = hf_folders.weights_complaint(root, "llm")
  assert f"{ONE} in the weights of the language model in {root}" in message
  assert "NaN or infinite" in message


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_largest_and_the_faintest_numbers_are_read(root, dtype):
  def change(tensors):
    recast(dtype)(tensors)
    limits = ml_dtypes.finfo(dtype)
    faint = limits.smallest_subnormal
    tensors[ONE][0, :4] = limits.max, limits.min, -0.0, faint

  change_tensors(root, change)
  params = partition.flatten(hf_folders.read(root, "llm"))
  kernel = params["language_model/layers/mlp/gate_proj/kernel"]
  found = kernel[1, :3, 0].astype(np.float64)
  limits = ml_dtypes.finfo(dtype)
  np.testing.assert_array_equal(
    found, np.array([limits.max, limits.min, 0.0]).astype(np.float64)
  )


def test_what_is_not_read_may_hold_anything(root):
  name = "language_model.model.decoder.final_layer_norm.bias"

  def change(tensors):
    tensors[name][:] = np.nan

  change_tensors(root, change, "blip2/model.safetensors")
  hf_folders.read(root, "blip2")


# ---------------------------------------------------------------------- random


@pytest.fixture(scope="module")
def scratch(sound, tmp_path_factory):
  return hf_folders.copy(sound, tmp_path_factory.mktemp("random") / "hub")


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=150)
def test_random_damage_is_complained_about_or_harmless(sound, scratch, data):
  """Flipped bytes and cuts: the same names and shapes come out, or an error."""
  whole = (sound / LLM).read_bytes()
  start = 8 + int.from_bytes(whole[:8], "little")
  damaged = bytearray(whole)
  # Half of them in the header, where they matter.
  places = st.integers(0, start) | st.integers(0, len(whole) - 1)
  for _ in range(data.draw(st.integers(0, 4))):
    damaged[data.draw(places)] = data.draw(st.integers(0, 255))
  if data.draw(st.booleans()):
    del damaged[data.draw(st.integers(0, len(whole))) :]
  if data.draw(st.booleans()):
    place = data.draw(st.integers(0, len(damaged)))
    damaged[place:place] = data.draw(st.binary(max_size=3))
  (scratch / LLM).write_bytes(damaged)
  try:
    found = hf_folders.read(scratch, "llm")
  except WeightsError as error:
    hf_folders.assert_sentence(error, scratch, 1000)
    return
  shapes = {p: x.shape for p, x in partition.flatten(found).items()}
  want = partition.flatten(hf_folders.read(sound, "llm"))
  assert shapes == {path: leaf.shape for path, leaf in want.items()}
