"""checkpoints/files.py: sound folders, read and written."""

import hashlib
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from photochat_jax.checkpoints import files


def draw(**shapes):
  rng = np.random.default_rng(0)
  return {
    key: rng.standard_normal(shape).astype(np.float32)
    for key, shape in shapes.items()
  }


def read(tensors):
  return {key: np.asarray(tensors[key]) for key in tensors}


def test_shapes_and_types_are_known_before_values_are_read(tmp_path):
  arrays = {
    "f32": np.arange(2_000_000, dtype=np.float32).reshape(1000, 2000),
    "f16": np.ones((3, 4), np.float16),
    "bf16": np.ones((5,), ml_dtypes.bfloat16),
    "f64": np.ones((), np.float64),
    "i64": np.ones((2,), np.int64),
  }
  safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
  tracemalloc.start()
  tensors = files.Tensors(tmp_path)
  shapes = {key: tensor.shape for key, tensor in tensors.items()}
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 200_000  # of 8 MB
  assert tensors.files == ["model.safetensors"]
  assert len(tensors) == 5 and set(tensors) == set(arrays)
  assert shapes == {key: array.shape for key, array in arrays.items()}
  for key in ("f32", "f16", "bf16", "f64"):
    assert tensors[key].dtype == arrays[key].dtype
  with pytest.raises(files.WeightsError, match="i64 is stored as I64"):
    _ = tensors["i64"].dtype
  for key, array in read(tensors).items():
    assert array.dtype == arrays[key].dtype
    np.testing.assert_array_equal(array, arrays[key])
  # Every time anew: what is done to one does nothing to the next.
  first = np.asarray(tensors["f16"])
  first[:] = 7
  np.testing.assert_array_equal(tensors["f16"], arrays["f16"])
  assert np.asarray(tensors["f16"], np.float32).dtype == np.float32


def test_one_file_is_written_where_all_fits(tmp_path):
  arrays = draw(a=(2, 3), b=(4,))
  arrays["half"] = np.arange(6).astype(ml_dtypes.bfloat16)
  folder = tmp_path / "new" / "folder"
  told = []
  # A view that runs the other way through memory is as good as any.
  turned = {**arrays, "a": np.asfortranarray(arrays["a"])}
  files.write_tensors(folder, turned.items(), progress=told.append)
  assert told == list(arrays)
  assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
  with safetensors.safe_open(folder / "model.safetensors", "np") as opened:
    # Without it transformers refuses the file.
    assert opened.metadata() == {"format": "pt"}
  got = safetensors.numpy.load_file(folder / "model.safetensors")
  assert got.keys() == arrays.keys()
  for key, array in got.items():
    assert array.dtype == arrays[key].dtype
    np.testing.assert_array_equal(array, arrays[key])


def test_shards_have_the_names_and_the_index_of_the_originals(tmp_path):
  # 40, 40, 80, 200 and 20 bytes: as much as fits into 100, and one too large.
  arrays = draw(a=(10,), b=(2, 5), c=(20,), d=(50,), e=(5,))
  stem = files.DIFFUSION
  files.write_tensors(tmp_path, arrays.items(), stem, shard_bytes=100)
  names = [f"{stem}-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
  index = f"{stem}.safetensors.index.json"
  assert {path.name for path in tmp_path.iterdir()} == {*names, index}
  assert json.loads((tmp_path / index).read_text()) == {
    "metadata": {"total_size": 380},
    "weight_map": dict(
      zip("abcde", [names[i] for i in (0, 0, 1, 2, 3)], strict=True)
    ),
  }
  tensors = files.Tensors(tmp_path, stem)
  assert tensors.files == names
  got = read(tensors)
  assert got.keys() == arrays.keys()
  for key, array in got.items():
    np.testing.assert_array_equal(array, arrays[key])


@pytest.mark.parametrize("shard_bytes", [10, 10**6])
def test_weights_are_never_overwritten(shard_bytes, tmp_path):
  arrays = draw(a=(10,), b=(10,))
  files.write_tensors(tmp_path, arrays.items(), shard_bytes=shard_bytes)
  before = {path: path.read_bytes() for path in tmp_path.iterdir()}

  def never():
    raise AssertionError("no tensor is taken")
    yield

  with pytest.raises(files.WeightsError, match="nothing is overwritten"):
    files.write_tensors(tmp_path, never())
  assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_full_precision_is_preferred(tmp_path):
  for name, number in (("model", 1), ("model.fp16", 2)):
    safetensors.numpy.save_file(
      {"x": np.full(2, number, np.float32)}, tmp_path / f"{name}.safetensors"
    )
  np.testing.assert_array_equal(files.Tensors(tmp_path)["x"], [1, 1])


def test_a_file_alone_gives_its_tensors_and_metadata(tmp_path):
  arrays = draw(a=(2, 3))
  path = tmp_path / "adapter_model.safetensors"
  safetensors.numpy.save_file(arrays, path, {"format": "pt", "rank": "4"})
  tensors, metadata = files.read_file(path)
  assert metadata == {"format": "pt", "rank": "4"}
  assert tensors["a"].shape == (2, 3)
  np.testing.assert_array_equal(tensors["a"], arrays["a"])
  safetensors.numpy.save_file(arrays, path)
  assert files.read_file(path)[1] == {}


def test_hashes_are_those_of_the_files(tmp_path):
  arrays = draw(a=(10,), b=(10,))
  files.write_tensors(tmp_path, arrays.items(), shard_bytes=40)
  want = {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in tmp_path.glob("*.safetensors")
  }
  assert len(want) == 2
  assert files.Tensors(tmp_path).hashes() == want
  files.write_json(tmp_path / "config.json", {"a": 1})
  digest = hashlib.sha256((tmp_path / "config.json").read_bytes()).hexdigest()
  assert files.Tensors(tmp_path).hashes() == {**want, "config.json": digest}


def test_json_goes_out_and_comes_back(tmp_path):
  content = {"name": "ä", "sizes": [1, 2], "rope": None, "eps": 1e-05}
  files.write_json(tmp_path / "config.json", content)
  text = (tmp_path / "config.json").read_text()
  assert text.endswith("}\n") and '\n  "sizes": [\n' in text
  assert files.read_json(tmp_path / "config.json") == content
