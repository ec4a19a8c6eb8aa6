"""Our Inception against FID's variant written in plain PyTorch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from photochat_jax import judges
from photochat_jax.checkpoints import inception as table_lib
from photochat_jax.checkpoints import tables
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.checkpoints.table_error import TableError
from photochat_jax.models import inception

torch = pytest.importorskip("torch")
F = torch.nn.functional

# name: (in, out, window h, w, stride, padding h, w), as the published network.
A = {
  "branch1x1": (0, 64, 1, 1, 1, 0, 0),
  "branch5x5_1": (0, 48, 1, 1, 1, 0, 0),
  "branch5x5_2": (48, 64, 5, 5, 1, 2, 2),
  "branch3x3dbl_1": (0, 64, 1, 1, 1, 0, 0),
  "branch3x3dbl_2": (64, 96, 3, 3, 1, 1, 1),
  "branch3x3dbl_3": (96, 96, 3, 3, 1, 1, 1),
}
C = {
  "branch1x1": (768, 192, 1, 1, 1, 0, 0),
  "branch7x7_1": (768, -1, 1, 1, 1, 0, 0),
  "branch7x7_2": (-1, -1, 1, 7, 1, 0, 3),
  "branch7x7_3": (-1, 192, 7, 1, 1, 3, 0),
  "branch7x7dbl_1": (768, -1, 1, 1, 1, 0, 0),
  "branch7x7dbl_2": (-1, -1, 7, 1, 1, 3, 0),
  "branch7x7dbl_3": (-1, -1, 1, 7, 1, 0, 3),
  "branch7x7dbl_4": (-1, -1, 7, 1, 1, 3, 0),
  "branch7x7dbl_5": (-1, 192, 1, 7, 1, 0, 3),
  "branch_pool": (768, 192, 1, 1, 1, 0, 0),
}
E_ = {
  "branch1x1": (0, 320, 1, 1, 1, 0, 0),
  "branch3x3_1": (0, 384, 1, 1, 1, 0, 0),
  "branch3x3_2a": (384, 384, 1, 3, 1, 0, 1),
  "branch3x3_2b": (384, 384, 3, 1, 1, 1, 0),
  "branch3x3dbl_1": (0, 448, 1, 1, 1, 0, 0),
  "branch3x3dbl_2": (448, 384, 3, 3, 1, 1, 1),
  "branch3x3dbl_3a": (384, 384, 1, 3, 1, 0, 1),
  "branch3x3dbl_3b": (384, 384, 3, 1, 1, 1, 0),
  "branch_pool": (0, 192, 1, 1, 1, 0, 0),
}


def _sized(block, change):
  return {k: tuple(change.get(n, n) for n in v[:2]) + v[2:]
          for k, v in block.items()}  # fmt: skip


NET = {
  "Conv2d_1a_3x3": (3, 32, 3, 3, 2, 0, 0),
  "Conv2d_2a_3x3": (32, 32, 3, 3, 1, 0, 0),
  "Conv2d_2b_3x3": (32, 64, 3, 3, 1, 1, 1),
  "Conv2d_3b_1x1": (64, 80, 1, 1, 1, 0, 0),
  "Conv2d_4a_3x3": (80, 192, 3, 3, 1, 0, 0),
}
for name, width, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
  block = _sized(A, {0: width}) | {"branch_pool": (width, pool, 1, 1, 1, 0, 0)}
  NET |= {f"Mixed_{name}.{k}": v for k, v in block.items()}
NET |= {
  "Mixed_6a.branch3x3": (288, 384, 3, 3, 2, 0, 0),
  "Mixed_6a.branch3x3dbl_1": (288, 64, 1, 1, 1, 0, 0),
  "Mixed_6a.branch3x3dbl_2": (64, 96, 3, 3, 1, 1, 1),
  "Mixed_6a.branch3x3dbl_3": (96, 96, 3, 3, 2, 0, 0),
}
for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
  NET |= {f"Mixed_{name}.{k}": v for k, v in _sized(C, {-1: width}).items()}
NET |= {
  "Mixed_7a.branch3x3_1": (768, 192, 1, 1, 1, 0, 0),
  "Mixed_7a.branch3x3_2": (192, 320, 3, 3, 2, 0, 0),
  "Mixed_7a.branch7x7x3_1": (768, 192, 1, 1, 1, 0, 0),
  "Mixed_7a.branch7x7x3_2": (192, 192, 1, 7, 1, 0, 3),
  "Mixed_7a.branch7x7x3_3": (192, 192, 7, 1, 1, 3, 0),
  "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3, 2, 0, 0),
}
for name, width in (("7b", 1280), ("7c", 2048)):
  NET |= {f"Mixed_{name}.{k}": v for k, v in _sized(E_, {0: width}).items()}


@pytest.fixture(scope="module")
def weights():
  """Random ones that keep the size of what runs through."""
  rng = np.random.default_rng(0)
  found = {}
  for name, (into, out, height, width, *_) in NET.items():
    scale = (2 / (into * height * width)) ** 0.5
    kernel = rng.normal(size=(out, into, height, width)) * scale
    found |= {
      f"{name}.conv.weight": kernel,
      f"{name}.bn.weight": rng.uniform(0.7, 1.3, out),
      f"{name}.bn.bias": rng.normal(size=out) * 0.1,
      f"{name}.bn.running_mean": rng.normal(size=out) * 0.1,
      f"{name}.bn.running_var": rng.uniform(0.7, 1.3, out),
      f"{name}.bn.num_batches_tracked": np.zeros(()),
    }
  found["fc.weight"] = rng.normal(size=(1008, 2048)) * 0.02
  found["fc.bias"] = rng.normal(size=1008)
  return {name: value.astype(np.float32) for name, value in found.items()}


def original(weights, photos):
  """uint8[B, H, W, 3] -> features, logits without bias, by torch."""
  w = {name: torch.tensor(value) for name, value in weights.items()}

  def conv(x, name):
    *_, stride, high, wide = NET[name]
    x = F.conv2d(
      x, w[f"{name}.conv.weight"], stride=stride, padding=(high, wide)
    )
    norm = [
      w[f"{name}.bn.{k}"]
      for k in ("running_mean", "running_var", "weight", "bias")
    ]
    return F.relu(F.batch_norm(x, *norm, eps=0.001))

  def chain(x, block, *names):
    for name in names:
      x = conv(x, f"{block}.{name}")
    return x

  def average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

  x = torch.tensor(photos).permute(0, 3, 1, 2).float() / 255
  x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
  x = 2 * x - 1
  for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"):
    x = conv(x, name)
  x = F.max_pool2d(x, 3, 2)
  x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
  double = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
  for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
    x = torch.cat([
      chain(x, b, "branch1x1"), chain(x, b, "branch5x5_1", "branch5x5_2"),
      chain(x, b, *double), chain(average(x), b, "branch_pool"),
    ], 1)  # fmt: skip
  x = torch.cat([
    chain(x, "Mixed_6a", "branch3x3"), chain(x, "Mixed_6a", *double),
    F.max_pool2d(x, 3, 2),
  ], 1)  # fmt: skip
  seven = [f"branch7x7_{i}" for i in (1, 2, 3)]
  sevens = [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)]
  for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
    x = torch.cat([
      chain(x, b, "branch1x1"), chain(x, b, *seven), chain(x, b, *sevens),
      chain(average(x), b, "branch_pool"),
    ], 1)  # fmt: skip
  x = torch.cat([
    chain(x, "Mixed_7a", "branch3x3_1", "branch3x3_2"),
    chain(x, "Mixed_7a", *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4))),
    F.max_pool2d(x, 3, 2),
  ], 1)  # fmt: skip
  for b in ("Mixed_7b", "Mixed_7c"):
    three = chain(x, b, "branch3x3_1")
    both = chain(x, b, "branch3x3dbl_1", "branch3x3dbl_2")
    pooled = F.max_pool2d(x, 3, 1, 1) if b == "Mixed_7c" else average(x)
    x = torch.cat([
      chain(x, b, "branch1x1"),
      chain(three, b, "branch3x3_2a"), chain(three, b, "branch3x3_2b"),
      chain(both, b, "branch3x3dbl_3a"), chain(both, b, "branch3x3dbl_3b"),
      chain(pooled, b, "branch_pool"),
    ], 1)  # fmt: skip
  features = x.mean((2, 3))
  return features.numpy(), (features @ w["fc.weight"].T).numpy()


def abstract():
  x = jax.ShapeDtypeStruct((1, inception.SIZE, inception.SIZE, 3), jnp.float32)
  init = inception.Inception().init
  return jax.eval_shape(init, jax.random.key(0), x)["params"]


def test_equals_the_original(weights):
  rng = np.random.default_rng(1)
  photos = rng.integers(0, 256, (2, 64, 48, 3), np.uint8)
  params = tables.read(table_lib.table(), abstract(), weights)
  ours = jax.jit(
    lambda params, photos: inception.Inception().apply(
      {"params": params}, inception.prepare(photos)
    )
  )(params, photos)
  for found, wanted in zip(ours, original(weights, photos), strict=True):
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * scale)
  # Photos larger than the network's are not smoothed before shrinking.
  large = rng.integers(0, 256, (1, 400, 600, 3), np.uint8)
  wanted = F.interpolate(
    torch.tensor(large).permute(0, 3, 1, 2).float() / 127.5 - 1,
    size=(299, 299), mode="bilinear", align_corners=False,
  )  # fmt: skip
  np.testing.assert_allclose(
    inception.prepare(large), wanted.permute(0, 2, 3, 1), atol=1e-4
  )


def test_the_judge_reads_a_folder_and_looks_in_batches(weights, tmp_path):
  safetensors_numpy.save_file(weights, tmp_path / "model.safetensors")
  judge = judges.InceptionJudge(str(tmp_path), batch_size=2)
  rng = np.random.default_rng(2)
  photos = rng.integers(0, 256, (3, 20, 20, 3), np.uint8)
  found = judge.look(list(photos))
  for ours, wanted in zip(found, original(weights, photos), strict=True):
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-4 * scale)
  (tmp_path / "empty").mkdir()
  with pytest.raises(WeightsError, match="empty"):
    judges.InceptionJudge(str(tmp_path / "empty"))


def test_all_of_a_file_is_read_and_nothing_else(weights):
  table = table_lib.table()
  wanted, _ = tables.match(table, abstract(), weights)
  read = set(weights) - {
    k for k in weights if re.search("tracked|fc.bias", k)
  }
  assert set(wanted) == read
  with pytest.raises(TableError, match="Mixed_6b.branch1x1.bn.weight"):
    broken = dict(weights)
    del broken["Mixed_6b.branch1x1.bn.weight"]
    tables.match(table, abstract(), broken)
