"""Digests against the same sums in numpy, and what they notice."""

import json
import os
import pathlib
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from photochat_jax.checkpoints import digests

DTYPES = (
  np.bool_,
  np.int8,
  np.uint8,
  ml_dtypes.float8_e4m3fn,
  np.float16,
  ml_dtypes.bfloat16,
  np.uint16,
  np.float32,
  np.int32,
  np.uint32,
  np.float64,
  np.int64,
)
PI = np.frombuffer(
  bytes.fromhex("243f6a88 85a308d3 13198a2e 03707344"), ">u4"
).astype(np.uint64)
M = np.uint64(0xFFFFFFFF)


def fmix32(x):
  """As MurmurHash3.cpp has it, in 64 bits without overflow."""
  x = (x ^ (x >> np.uint64(16))) * np.uint64(0x85EBCA6B) & M
  x = (x ^ (x >> np.uint64(13))) * np.uint64(0xC2B2AE35) & M
  return x ^ (x >> np.uint64(16))


def oracle(array):
  size = array.dtype.itemsize
  words = np.frombuffer(array.tobytes(), f"<u{min(size, 4)}").astype(np.uint64)
  index = np.arange(len(words), dtype=np.uint64)
  sums = [int((fmix32(words ^ fmix32(index + s & M))).sum()) for s in PI]
  shape = ",".join(str(n) for n in array.shape)
  lanes = "".join(f"{s % 2**32:08x}" for s in sums)
  return f"{array.dtype.name}[{shape}]:{lanes}"


def random(shape, dtype, seed=0):
  rng = np.random.default_rng(seed)
  if dtype == np.bool_:
    return rng.integers(0, 2, shape).astype(bool)
  size = np.dtype(dtype).itemsize
  bits = rng.bytes(int(np.prod(shape)) * size)
  return np.frombuffer(bits, dtype).reshape(shape)


def test_the_finaliser_is_murmurs():
  # Of 1 and 2^32 - 1, as MurmurHash3's own code gives them.
  got = fmix32(np.array([0, 1, 0xFFFFFFFF], np.uint64))
  assert [hex(x) for x in got] == ["0x0", "0x514e28b7", "0x81f16f39"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)], ids=str)
def test_the_sums_are_numpys(dtype, shape):
  array = random(shape, dtype)
  assert digests.compute({"x": array}) == {"x": oracle(array)}
  if np.dtype(dtype).itemsize < 8:
    assert digests.compute({"x": jnp.asarray(array)}) == {"x": oracle(array)}


def test_the_form():
  (text,) = digests.compute({"a": jnp.zeros((3, 4))}).values()
  form, sums = text.split(":")
  assert form == "float32[3,4]" and len(sums) == 32
  # Equal bits in another form are another array.
  made = digests.compute(
    {"a": jnp.zeros((3, 4)), "b": jnp.zeros((4, 3)), "c": np.zeros(12, "i4")}
  )
  assert len(set(made.values())) == 3 and list(made) == ["a", "b", "c"]
  assert digests.compute({}) == {}


# One shape and the dtypes of a state, so that little is compiled.
@hypothesis.given(
  st.sampled_from([np.float32, ml_dtypes.bfloat16, np.int32, np.int8]),
  st.integers(0, 2**32 - 1),
  st.data(),
)
def test_one_flipped_bit_and_one_swap_change_all(dtype, seed, data):
  array = random((3, 7), dtype, seed)
  before = digests.compute({"x": array})["x"]
  flipped = array.copy()
  octets = flipped.reshape(-1).view(np.uint8)
  bit = data.draw(st.integers(0, 8 * octets.size - 1))
  octets[bit // 8] ^= np.uint8(1 << bit % 8)
  after = digests.compute({"x": flipped})["x"]
  # In each of the four sums, because a term is a bijection of the bits.
  for lane in range(-32, 0, 8):
    assert before[lane:][:8] != after[lane:][:8]
  i, j = data.draw(st.lists(st.integers(0, 20), min_size=2, max_size=2))
  swapped = array.reshape(-1).copy()
  swapped[[i, j]] = swapped[[j, i]]
  swapped = swapped.reshape(array.shape)
  same = swapped.tobytes() == array.tobytes()
  assert (digests.compute({"x": swapped})["x"] == before) == same


SHARDED = """
import json, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from photochat_jax.checkpoints import digests
mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)
x = np.random.default_rng(0).normal(size=(64, 32, 24)).astype("float32")
made = []
for spec in ((), ("a",), ("b", "a"), (None, ("a", "b"))):
  where = NamedSharding(mesh, PartitionSpec(*spec))
  array = jax.device_put(x, where)
  made.append(digests.compute({"x": array})["x"])
  program = digests._program(NamedSharding(mesh, PartitionSpec()))
  memory = program.lower(array).compile().memory_analysis()
  assert memory.temp_size_in_bytes < x.nbytes / 4, memory
print(json.dumps(made))
"""


def test_they_do_not_depend_on_the_sharding():
  """Nor does any device gather an array for them."""
  root = pathlib.Path(__file__).parents[2]
  flags = "--xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-c", SHARDED],
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": flags},
    check=False,
  )
  assert done.returncode == 0, done.stderr
  x = np.random.default_rng(0).normal(size=(64, 32, 24)).astype("float32")
  assert set(json.loads(done.stdout.splitlines()[-1])) == {oracle(x)}


def test_nothing_of_an_arrays_size_is_kept():
  x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
  memory = digests._program(None).lower(x).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 1000
