"""A network over photos too large for it, in overlapping tiles.

diffusers' `AutoencoderKL.tiled_encode` and `tiled_decode`. The autoencoder's
middle attends from every pixel to every other, so its memory grows with the
fourth power of a photo's side; in tiles it stays that of one tile. The result
is not quite that of the whole: each tile is normalised and attends by itself.

Letters: B photos, H and W rows and columns of the network's input, C channels.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

OVERLAP = 4
"""Neighbouring tiles share one part in this many of their side."""


def tiled(
  function: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  tile: int,
  tile_out: int,
) -> jax.Array:
  """Applies `function` tile by tile, blending where tiles overlap.

  Tiles begin at the top left, three quarters of a tile apart, and those at
  the right and the bottom are cut off with the photo. Tiles of one size run
  one after another through one compiled loop.

  Args:
    function: [B, h, w, C] -> [B, h', w', C'] for any h and w, where
      h' / h = w' / w = tile_out / tile.
    x: [B, H, W, C].
    tile: largest side of the function's input, a multiple of 4; 0 for none.
    tile_out: the side of what the function makes of it, a multiple of 4.

  Returns:
    [B, H', W', C']; just `function(x)` where neither side exceeds the tile.
  """
  if not tile or max(x.shape[1:3]) <= tile:
    return function(x)
  step = tile - tile // OVERLAP
  rows, columns = (range(0, side, step) for side in x.shape[1:3])

  by_shape = {}
  for i, j in itertools.product(rows, columns):
    part = x[:, i : i + tile, j : j + tile]
    by_shape.setdefault(part.shape, {})[i, j] = part
  tiles = {}
  for parts in by_shape.values():
    made = jax.lax.map(function, jnp.stack(list(parts.values())))
    tiles |= zip(parts, made, strict=True)

  shared = tile_out // OVERLAP
  kept = tile_out - shared
  bands = []
  for i in rows:
    band = []
    for j in columns:
      # Neighbours are blended already: where four tiles meet, each counts.
      if i:
        tiles[i, j] = _blend(tiles[i - step, j], tiles[i, j], shared, 1)
      if j:
        tiles[i, j] = _blend(tiles[i, j - step], tiles[i, j], shared, 2)
      band.append(tiles[i, j][:, :kept, :kept])
    bands.append(jnp.concatenate(band, axis=2))
  return jnp.concatenate(bands, axis=1)


def _blend(
  before: jax.Array, tile: jax.Array, shared: int, axis: int
) -> jax.Array:
  """Lets a tile's first pixels come out of the last ones of that before it.

  Args:
    before: the tile above or to the left, [B, h, w, C].
    tile: [B, h, w, C], of the same size across `axis`.
    shared: pixels along `axis` that both show; a smaller tile is all shared.
    axis: 1 for rows, 2 for columns.

  Returns:
    The tile, its first pixels a straight line from `before` to itself.
  """
  end = before.shape[axis]
  shared = min(end, tile.shape[axis], shared)
  last = jax.lax.slice_in_dim(before, end - shared, end, axis=axis)
  first = jax.lax.slice_in_dim(tile, 0, shared, axis=axis)
  rest = jax.lax.slice_in_dim(tile, shared, None, axis=axis)
  shape = [1] * tile.ndim
  shape[axis] = shared
  weight = (jnp.arange(shared) / shared).astype(tile.dtype).reshape(shape)
  mixed = last * (1 - weight) + first * weight
  return jnp.concatenate([mixed, rest], axis=axis)
