"""Rotary position embedding (RoFormer, arXiv:2104.09864) as Llama has it.

The two rotated coordinates are the halves of a head (HF's `rotate_half`),
not neighbours.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np


def _llama3(inv_freq, scaling):
  """HF's `_compute_llama3_parameters`: stretches the slow rotations only."""
  factor = scaling['factor']
  low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
  # Full turns which each frequency makes over the original context.
  turns = scaling['original_max_position_embeddings'] * inv_freq / (2 * np.pi)
  smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return inv_freq * ((1.0 - smooth) / factor + smooth)


def rope_frequencies(
    head_dim: int, theta: float, scaling: Mapping | None = None
) -> np.ndarray:
  """Radians per position of every rotated pair.

  Args:
    head_dim: Dh, even.
    theta: base of the geometric series of wavelengths.
    scaling: HF's `rope_scaling`: None, or a mapping whose 'rope_type' (older
      files: 'type') is 'default', 'linear' (needs 'factor') or 'llama3'
      (needs 'factor', 'low_freq_factor', 'high_freq_factor' and
      'original_max_position_embeddings').

  Returns:
    float32 [Dh / 2].

  Raises:
    ValueError: an odd head, an unknown type or a missing number.
  """
  if head_dim % 2:
    raise ValueError(f'RoPE needs an even head_dim, but got {head_dim}.')
  scaling = dict(scaling or {})
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  inv_freq = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  try:
    if kind == 'linear':
      inv_freq = inv_freq / scaling['factor']
    elif kind == 'llama3':
      inv_freq = _llama3(inv_freq, scaling)
    elif kind != 'default':
      raise ValueError(
          f"rope_scaling type {kind!r} is not supported; use 'default', "
          "'linear' or 'llama3'."
      )
  except KeyError as error:
    raise ValueError(
        f'rope_scaling of type {kind!r} needs the entry {error}.'
    ) from None
  return inv_freq.astype(np.float32)


def rope_angles(positions, inv_freq):
  """Cosine and sine of every rotation, computed once for all layers.

  Args:
    positions: int [B, T].
    inv_freq: float32 [Dh / 2] from `rope_frequencies`.

  Returns:
    (cos, sin), each float32 [B, T, 1, Dh / 2], broadcasting over heads.
  """
  angles = positions[:, :, None, None].astype(jnp.float32) * inv_freq
  return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x, cos, sin):
  """Rotates queries or keys [B, T, H, Dh] by the angles of `rope_angles`."""
  first, second = jnp.split(x, 2, axis=-1)
  # float32 cosines lift a bfloat16 `x`: one rounding, at the end.
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1
  ).astype(x.dtype)
