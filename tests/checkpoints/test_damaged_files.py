"""Weight files that cannot be used: which one, and what to do.

One file is damaged in a copy of sound folders, or an index and its shards.
Tensors that do not fit are in `test_damaged_weights.py`.
"""

import json
import pickle
import struct
import zipfile

import hf_folders
import hypothesis
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from photochat_jax.checkpoints.files import Tensors, WeightsError, write_tensors

pytestmark = pytest.mark.usefixtures("shapes_once")
LLM = "llm/model.safetensors"
INDEX = "llm/model.safetensors.index.json"
SHARD = "llm/model-00002-of-00003.safetensors"
UNET = "diffusion/unet/diffusion_pytorch_model.safetensors"


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
  message = hf_folders.weights_complaint(root, file.split("/")[0])
  assert said in message
  assert str((root / file).parent) in message


# ---------------------------------------------------------------------- shards


@pytest.fixture
def sharded(root):
  """The folder of the language model, cut into three files."""
  tensors = safetensors.numpy.load_file(root / LLM)
  (root / LLM).unlink()
  write_tensors(root / "llm", tensors.items(), shard_bytes=13000)
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
  "one missing": (lambda root: (root / SHARD).unlink(), "its index names"),
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
    reindex(lambda where: where.update(more=where["lm_head.weight"])),
    "differ in 'more'",
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
  message = hf_folders.weights_complaint(sharded, "llm")
  assert said in message
  assert str(sharded / "llm") in message


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
