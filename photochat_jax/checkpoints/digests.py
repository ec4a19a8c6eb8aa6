"""Digests of arrays, computed where they lie.

A digest is the shape, the dtype and 128 bits that depend on every bit and on
its place. It is a sum over the elements, so that each device adds up what it
holds, whatever the sharding, and only the sums travel: one array may be larger
than a host. There are four sums modulo 2^32, with different seeds, of

    fmix32(bits ^ fmix32(index + seed))

where `index` counts the elements in C order and `fmix32` is the last step of
MurmurHash3 (A. Appleby, public domain), a bijection of 32 bits. So one changed
element always changes all four sums; other damage, such as elements in another
order, goes unnoticed with a chance of 2^-128, but for elements just 2^32 places
apart, which have the same index. It is no defence against
somebody who wants to go unnoticed.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# Digits of pi, as in Blowfish.
SEEDS = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


def compute(leaves: Mapping[str, Any]) -> dict[str, str]:
  """The digests of arrays, by their names.

  Waits for the arrays. Where they are divided among processes, all of these
  must call it.

  Args:
    leaves: numbers, or arrays of numpy or JAX under any shardings, of 8, 16,
      32 or 64 bits to an element.

  Returns:
    A text such as 'float32[3,4]:' and 32 hexadecimal digits for each.
  """
  if not leaves:
    return {}
  arrays = {
    path: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    for path, leaf in leaves.items()
  }
  # One small program for each shape, not one for all: that would be as large
  # as the train step's. All are begun before the first is waited for.
  sums = jax.device_get({path: _start(array) for path, array in arrays.items()})
  return {
    path: f"{form(array)}:{''.join(f'{s:08x}' for s in sums[path])}"
    for path, array in arrays.items()
  }


def form(array: Any) -> str:
  """The beginning of an array's digest, such as 'float32[3,4]'."""
  return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _start(array: Any) -> jax.Array:
  """The sums of one array, uint32[4], whole on each of its devices."""
  if isinstance(array, np.ndarray) and array.dtype.itemsize == 8:
    # JAX has 32 bits.
    array = np.ascontiguousarray(array)[..., None].view(np.uint32)
  where = getattr(array, "sharding", None)
  if isinstance(where, NamedSharding):
    return _program(NamedSharding(where.mesh, PartitionSpec()))(array)
  return _program(None)(array)


@functools.lru_cache(maxsize=8)
def _program(where: NamedSharding | None) -> Any:
  return jax.jit(_sums, out_shardings=where)


def _sums(array: jax.Array) -> jax.Array:
  bits = _bits(array)
  # The index of each element from those of its axes: to flatten the array
  # would send it about between the devices.
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):
    stride = math.prod(bits.shape[axis + 1 :]) % 2**32
    along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    index += along * np.uint32(stride)
  terms = [_mix(bits ^ _mix(index + np.uint32(seed))) for seed in SEEDS]
  # One pass over the array, of which nothing is kept; four sums would keep
  # the four terms of every element.
  sums = jax.lax.reduce(
    terms,
    [np.uint32(0)] * len(terms),
    lambda x, y: [a + b for a, b in zip(x, y, strict=True)],
    tuple(range(bits.ndim)),
  )
  return jnp.stack(sums)


def _bits(array: jax.Array) -> jax.Array:
  """The bits of each element as uint32; two words, the low first, for 64."""
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  size = array.dtype.itemsize
  if size >= 4:
    return jax.lax.bitcast_convert_type(array, jnp.uint32)
  unsigned = {1: jnp.uint8, 2: jnp.uint16}[size]
  return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
  """fmix32 of MurmurHash3."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
