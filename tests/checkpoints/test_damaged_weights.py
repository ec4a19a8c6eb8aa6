"""Weights that cannot be used: which file or tensor, and what to do.

One thing is damaged in a copy of sound folders. What nothing can notice is a
flipped bit of a value that stays a number: safetensors has no checksum, so
`from_pretrained` of the originals reads it as well. Checkpoints of our own
carry a digest of each array, and `convert_hf` writes down the SHA-256 of every
file it read.
"""

import json
import pickle
import shutil
import struct
import zipfile

import hf_folders
import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from photochat_jax.checkpoints import pretrained
from photochat_jax.checkpoints.files import Tensors, WeightsError, write_tensors
from photochat_jax.checkpoints.tables import TableError
from photochat_jax.ops import partition

pytestmark = pytest.mark.usefixtures("shapes_once")
LLM = "llm/model.safetensors"
INDEX = "llm/model.safetensors.index.json"
SHARD = "llm/model-00002-of-00003.safetensors"
UNET = "diffusion/unet/diffusion_pytorch_model.safetensors"
MLP = "model.layers.{}.mlp.gate_proj.weight"


def read(root, *names):
  folders = hf_folders.folders(root, *names)
  sizes = pretrained.read_sizes(folders)
  return pretrained.read_params(hf_folders.config(sizes), folders)


def complaint(root, *names, kind=WeightsError):
  """What `read_params` says about folders whose configs are sound."""
  with pytest.raises(WeightsError) as error:
    read(root, *names)
  assert type(error.value) is kind
  hf_folders.assert_sentence(error.value, root)
  return str(error.value)


def test_the_sound_folders_are_read(sound):
  read(sound)


# ----------------------------------------------------------------------- files


def pickled(path):
  """As torch saved before version 1.6."""
  path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))


def zipped(path):
  """As torch saves."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({}))


def edit_bytes(change):
  def damage(path):
    path.write_bytes(change(path.read_bytes()))

  return damage


def replace_by(name):
  def damage(path):
    path.rename(path.parent / name)

  return damage


def header(data):
  """The length of the JSON in front of the values."""
  return struct.unpack("<Q", data[:8])[0]


def make_folder(path):
  path.unlink()
  path.mkdir()


# How the file is damaged: (what does it, what is said).
DAMAGES = {
  "missing": (lambda path: path.unlink(), ".safetensors and no index"),
  "only .bin": (replace_by("pytorch_model.bin"), "pytorch_model.bin holds"),
  "only .ckpt": (replace_by("model.ckpt"), "model.ckpt holds weights in a"),
  "a pickle": (pickled, "can run code when opened"),
  "a zip of pickles": (zipped, "can run code when opened"),
  "a pointer": (lambda p: p.write_bytes(hf_folders.LFS), "git lfs pull"),
  "a web page": (lambda p: p.write_text("<!doctype html>" * 99), "no whole"),
  "a folder": (make_folder, "cannot be read"),
  "empty": (edit_bytes(lambda data: b""), "no whole safetensors"),
  "cut in the length": (edit_bytes(lambda data: data[:5]), "no whole"),
  "cut after the length": (edit_bytes(lambda data: data[:8]), "no whole"),
  "cut in the header": (
    edit_bytes(lambda data: data[: 8 + header(data) // 2]),
    "no whole",
  ),
  "cut after the header": (
    edit_bytes(lambda data: data[: 8 + header(data)]),
    "no whole",
  ),
  "cut in the values": (edit_bytes(lambda data: data[:-1]), "no whole"),
  "longer": (edit_bytes(lambda data: data + b"\0"), "no whole"),
  "twice": (edit_bytes(lambda data: data + data), "no whole"),
  "a header of exabytes": (
    edit_bytes(lambda data: struct.pack("<Q", 2**63) + data[8:]),
    "no whole",
  ),
  "a header beyond the end": (
    edit_bytes(lambda data: struct.pack("<Q", len(data)) + data[8:]),
    "no whole",
  ),
  "a header one byte short": (
    edit_bytes(lambda data: struct.pack("<Q", header(data) - 1) + data[8:]),
    "no whole",
  ),
  "zeros": (edit_bytes(lambda data: bytes(len(data))), "no whole"),
  "a header 50 000 deep": (
    edit_bytes(lambda data: struct.pack("<Q", 50_000) + b"[" * 50_000),
    "no whole",
  ),
}


@pytest.mark.parametrize("file", [LLM, UNET])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file(root, file, damage):
  change, said = DAMAGES[damage]
  change(root / file)
  message = complaint(root, file.split("/")[0])
  assert said in message
  assert str((root / file).parent) in message


# ---------------------------------------------------------------------- shards


@pytest.fixture
def sharded(root):
  """The folder of the language model, cut into three files."""
  tensors = safetensors.numpy.load_file(root / LLM)
  (root / LLM).unlink()
  write_tensors(root / "llm", tensors.items(), shard_bytes=8000)
  assert (root / SHARD).exists()
  return root


def reindex(change):
  """Changes the index; `change` is told the map from tensors to files."""

  def damage(root):
    content = json.loads((root / INDEX).read_text())
    change(content["weight_map"])
    (root / INDEX).write_text(json.dumps(content))

  return damage


def put(content):
  return lambda root: (root / INDEX).write_text(content)


def name_file(name):
  return reindex(lambda where: where.update({"model.norm.weight": name}))


def repeat(root):
  tensors = safetensors.numpy.load_file(root / SHARD)
  tensors["lm_head.weight"] = np.zeros((100, 16), np.float32)
  tensors["model.embed_tokens.weight"] = np.zeros((100, 16), np.float32)
  safetensors.numpy.save_file(tensors, root / SHARD)


OUTSIDE = "is no safetensors file of its folder"
SHARDS = {
  "one missing": (lambda root: (root / SHARD).unlink(), "which its index names"),
  "the index missing": (lambda root: (root / INDEX).unlink(), "no index"),
  "one cut": (
    lambda root: edit_bytes(lambda data: data[:-1])(root / SHARD),
    "no whole",
  ),
  "one a pointer": (
    lambda root: (root / SHARD).write_bytes(hf_folders.LFS),
    "git lfs pull",
  ),
  "one a file of another folder": (name_file("../x.safetensors"), OUTSIDE),
  "one anywhere": (name_file("/etc/passwd.safetensors"), OUTSIDE),
  "one a pickle": (name_file("pytorch_model.bin"), OUTSIDE),
  "one a number": (name_file(7), OUTSIDE),
  "one without a name": (name_file(""), OUTSIDE),
  "one with half a surrogate": (name_file("\ud800.safetensors"), "lacks"),
  "one with a null byte": (name_file("\0.safetensors"), "lacks"),
  "a tensor that is nowhere": (
    reindex(lambda where: where.update({"lm_head.bias": next(iter(where.values()))})),
    "differ in 'lm_head.bias'",
  ),
  "a tensor left out": (
    reindex(lambda where: where.pop("model.norm.weight")),
    "differ in 'model.norm.weight'",
  ),
  "a tensor in two": (repeat, "a second time"),
  "no JSON": (put("weights"), "is not JSON"),
  "a pointer": (put(hf_folders.LFS.decode()), "git lfs pull"),
  "a list": (put("[]"), "must hold a JSON object"),
  "no map": (put("{}"), "no weight_map"),
  "an empty map": (put('{"weight_map": {}}'), "no weight_map"),
  "a list for a map": (put('{"weight_map": ["a"]}'), "no weight_map"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_damaged_shards(sharded, case):
  damage, said = SHARDS[case]
  damage(sharded)
  message = complaint(sharded, "llm")
  assert said in message
  assert str(sharded / "llm") in message


# --------------------------------------------------------------------- tensors


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
  name = MLP.format(0)
  tensors[name] = np.ascontiguousarray(tensors[name].T)


def spell_anew(tensors):
  tensors["norm.weight"] = tensors["model.norm.weight"].copy()


ONE = MLP.format(1)
TENSORS = {
  "one missing": (drop(ONE), f"1 missing: {ONE};"),
  "a layer missing": (
    lambda tensors: [tensors.pop(k) for k in list(tensors) if ".1." in k],
    "9 missing: model.layers.1.self_attn.q_proj.weight, ",
  ),
  "one more": (add(score=np.zeros(3, np.float32)), "1 unknown: score;"),
  "more lines": (add(**{"a\nb": np.zeros(3, np.float32)}), r"'a\nb'"),
  "another shape": (
    lambda tensors: tensors.update({ONE: tensors[ONE][:20]}),
    f"1 of another shape: {ONE} are [20, 16] and must be [24, 16];",
  ),
  "transposed": (transpose, "gate_proj.weight are [16, 24] and must be [24, 16]"),
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
    "model.layers.*.mlp.gate_proj.weight (2), ",
  ),
  "nothing": (lambda tensors: tensors.clear(), "21 missing: "),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(root, case):
  change, said = TENSORS[case]
  change_tensors(root, change)
  message = complaint(root, "llm", kind=TableError)
  assert said in message
  assert "the language model in" in message and str(root / "llm") in message


# What the config says instead: what is said of the weights.
CONFIGS = {
  "fewer layers": ({"num_hidden_layers": 1}, "9 unknown: "),
  "more layers": ({"num_hidden_layers": 3}, "9 missing: "),
  "another width": (
    {"hidden_size": 32, "head_dim": 8},
    "(2) are [24, 16] and must be [24, 32]",
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
    read(root, "llm")
    return
  assert said in complaint(root, "llm", kind=TableError)


def test_eyes_of_another_width_than_the_q_former_reads(root):
  def widen(tensors):
    for name, value in tensors.items():
      if "crossattention.attention.key" in name and value.ndim == 2:
        tensors[name] = np.zeros((8, 14), np.float32)

  change_tensors(root, widen, "blip2/model.safetensors")
  message = complaint(root, "blip2", kind=TableError)
  assert "key.weight are [8, 14] and must be [8, 12]" in message


def test_one_part_in_place_of_another(root):
  stem = "diffusion_pytorch_model.safetensors"
  shutil.copy(root / "diffusion/vae" / stem, root / UNET)
  message = complaint(root, "diffusion", kind=TableError)
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
  message = complaint(root, "llm", kind=TableError)
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
  message = complaint(root, "llm")
  assert f"{ONE} in the weights of the language model in {root}" in message
  assert "NaN or infinite" in message


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_largest_and_the_faintest_numbers_are_read(root, dtype):
  def change(tensors):
    recast(dtype)(tensors)
    limits = ml_dtypes.finfo(dtype)
    tensors[ONE][0, :4] = limits.max, limits.min, -0.0, limits.smallest_subnormal

  change_tensors(root, change)
  kernel = read(root, "llm")["language_model"]["layers"]["mlp"]["gate_proj"]
  found = kernel["kernel"][1, :3, 0].astype(np.float64)
  limits = ml_dtypes.finfo(dtype)
  np.testing.assert_array_equal(
    found, np.array([limits.max, limits.min, 0.0]).astype(np.float64)
  )


def test_what_is_not_read_may_hold_anything(root):
  name = "language_model.model.decoder.final_layer_norm.bias"

  def change(tensors):
    tensors[name][:] = np.nan

  change_tensors(root, change, "blip2/model.safetensors")
  read(root, "blip2")


# ---------------------------------------------------------------------- random


@pytest.fixture(scope="module")
def scratch(sound, tmp_path_factory):
  return hf_folders.copy(sound, tmp_path_factory.mktemp("random") / "hub")


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=150)
def test_random_damage_is_complained_about_or_harmless(sound, scratch, data):
  """Flipped bytes and cuts: the same names and shapes come out, or an error."""
  whole = (sound / LLM).read_bytes()
  start = 8 + header(whole)
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
    found = read(scratch, "llm")
  except WeightsError as error:
    hf_folders.assert_sentence(error, scratch)
    return
  shapes = {p: x.shape for p, x in partition.flatten(found).items()}
  want = partition.flatten(read(sound, "llm"))
  assert shapes == {path: leaf.shape for path, leaf in want.items()}


@hypothesis.given(
  content=st.dictionaries(
    st.text(st.characters(), max_size=5),
    st.text(st.characters(), max_size=9) | st.integers() | st.none(),
    max_size=3,
  )
)
@hypothesis.settings(max_examples=40)
def test_a_random_index_is_complained_about(tmp_path_factory, content):
  folder = tmp_path_factory.mktemp("index")
  path = folder / "model.safetensors.index.json"
  path.write_text(json.dumps({"weight_map": content}))
  with pytest.raises(WeightsError) as error:
    Tensors(folder)
  hf_folders.assert_sentence(error.value, folder)
