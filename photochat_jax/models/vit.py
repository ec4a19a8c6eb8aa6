"""The vision transformer of BLIP-2 (EVA-CLIP ViT-g), which sees photos.

HF's `Blip2VisionModel`. Axis letters: B photos, H and W pixels, N patches,
T = 1 + N tokens, D width.

Parameters: `class_embedding`, `patch_embedding`, `position_embedding`,
`post_layernorm` and `layers`, in which every array has a leading layer axis.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from photochat_jax.ops import attention as attention_lib
from photochat_jax.ops import partition
from photochat_jax.ops import remat as remat_lib

# CLIP's colour statistics (HF: OPENAI_CLIP_MEAN, OPENAI_CLIP_STD), for RGB
# in [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(photos):
  """uint8 RGB [..., 3] -> float32 [..., 3], what `ViT` expects."""
  mean, std = np.asarray(IMAGE_MEAN), np.asarray(IMAGE_STD)
  # One multiply-add instead of three passes over the pixels.
  factor = (1.0 / (255.0 * std)).astype(np.float32)
  offset = (mean / std).astype(np.float32)
  return photos.astype(jnp.float32) * factor - offset


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """HF's `Blip2VisionConfig` words.

  Attributes:
    image_size: height and width of a photo, pixels.
    patch_size: height and width of a patch, pixels; divides `image_size`.
    hidden_size: D.
    intermediate_size: width inside the MLP.
    num_hidden_layers: encoder layers.
    num_attention_heads: divides `hidden_size`.
    qkv_bias: whether queries, keys and values have a bias.
    layer_norm_eps: added to every variance.
    dtype: of activations; parameters are float32.
    remat: what each layer keeps for the backward pass, see `ops.remat`.
    scan_unroll: layers per step of the loop over layers; more saves time for
      small layers (copies of weights) and costs compile time for many.
  """

  image_size: int = 224
  patch_size: int = 14
  hidden_size: int = 1408
  intermediate_size: int = 6144
  num_hidden_layers: int = 39
  num_attention_heads: int = 16
  qkv_bias: bool = True
  layer_norm_eps: float = 1e-6
  dtype: str = 'float32'
  remat: str = 'none'
  scan_unroll: int = 1

  def __post_init__(self):
    if self.image_size % self.patch_size:
      raise ValueError(
          f'image_size={self.image_size} must be a multiple of '
          f'patch_size={self.patch_size}.'
      )
    if self.hidden_size % self.num_attention_heads:
      raise ValueError(
          f'hidden_size={self.hidden_size} must be a multiple of '
          f'num_attention_heads={self.num_attention_heads}.'
      )

  @property
  def num_tokens(self) -> int:
    """T: the class token and one token per patch."""
    return 1 + (self.image_size // self.patch_size) ** 2

  @classmethod
  def tiny(cls, **overrides) -> 'ViTConfig':
    """0.3 M parameters, for CPUs."""
    numbers = {
        'image_size': 32,
        'patch_size': 8,
        'hidden_size': 96,
        'intermediate_size': 192,
        'num_hidden_layers': 3,
        'num_attention_heads': 4,
        'scan_unroll': 3,
    }
    return cls(**numbers | overrides)

  @classmethod
  def eva_g(cls, **overrides) -> 'ViTConfig':
    """EVA-CLIP ViT-g/14 less its last layer, as in Salesforce/blip2-*."""
    return cls(**overrides)


class Attention(nn.Module):
  """HF's `Blip2Attention`: one product for queries, keys and values."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x):
    """[B, T, D] -> [B, T, D]."""
    config = self.config
    dtype = jnp.dtype(config.dtype)
    batch, tokens, width = x.shape
    qkv = nn.Dense(
        3 * width, use_bias=config.qkv_bias, dtype=dtype, name='qkv'
    )(x)
    q, k, v = (
        part.reshape(batch, tokens, config.num_attention_heads, -1)
        for part in jnp.split(qkv, 3, axis=-1)
    )
    y = attention_lib.attention(q, k, v).reshape(batch, tokens, width)
    return nn.Dense(width, dtype=dtype, name='projection')(y)


class MLP(nn.Module):
  """HF's `Blip2MLP`, with the exact GELU."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x):
    """[B, T, D] -> [B, T, D]."""
    dtype = jnp.dtype(self.config.dtype)
    y = nn.Dense(self.config.intermediate_size, dtype=dtype, name='fc1')(x)
    y = nn.gelu(y, approximate=False)
    return nn.Dense(x.shape[-1], dtype=dtype, name='fc2')(y)


class EncoderLayer(nn.Module):
  """HF's `Blip2EncoderLayer`, in the form `nn.scan` wants."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x, _):
    """[B, T, D] -> ([B, T, D], None)."""
    config = self.config
    x = partition.constrain(x)
    norm = {
        'epsilon': config.layer_norm_eps,
        'dtype': jnp.dtype(config.dtype),
    }
    y = nn.LayerNorm(name='layer_norm1', **norm)(x)
    x = x + Attention(config, name='self_attn')(y)
    y = nn.LayerNorm(name='layer_norm2', **norm)(x)
    return x + MLP(config, name='mlp')(y), None


class ViT(nn.Module):
  """Photos to patch features."""

  config: ViTConfig

  @nn.compact
  def __call__(self, pixel_values):
    """HF's `Blip2VisionModel(...).last_hidden_state`.

    Args:
      pixel_values: float [B, image_size, image_size, 3] from `normalise`.

    Returns:
      [B, 1 + N, D]; the class token first, then patches row by row.

    Raises:
      ValueError: photos of another size.
    """
    config = self.config
    dtype = jnp.dtype(config.dtype)
    size, patch = config.image_size, config.patch_size
    if pixel_values.shape[1:] != (size, size, 3):
      raise ValueError(
          f'Resize photos to {(size, size, 3)}, because image_size={size}; '
          f'got {pixel_values.shape[1:]}.'
      )
    # A convolution whose stride is its size is a product over patches, and
    # XLA's weight gradient of the product is the faster one.
    side = size // patch
    patches = pixel_values.reshape(-1, side, patch, side, patch, 3)
    patches = patches.swapaxes(2, 3).reshape(-1, side * side, 3 * patch**2)
    x = nn.Dense(config.hidden_size, dtype=dtype, name='patch_embedding')(
        patches
    )
    init = nn.initializers.normal(0.02)
    width = config.hidden_size
    first = self.param('class_embedding', init, (1, 1, width))
    places = self.param(
        'position_embedding', init, (1, config.num_tokens, width)
    )
    first = jnp.broadcast_to(first.astype(dtype), (x.shape[0], 1, width))
    x = jnp.concatenate([first, x], axis=1) + places.astype(dtype)
    layer = remat_lib.remat(EncoderLayer, config.remat, scanned=True)
    x, _ = nn.scan(
        layer,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=config.num_hidden_layers,
        unroll=config.scan_unroll,
    )(config, name='layers')(x, None)
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps, dtype=dtype, name='post_layernorm'
    )(x)


def interpolate_positions(table: np.ndarray, num_tokens: int) -> np.ndarray:
  """A trained position table for photos of another size.

  HF's `Blip2VisionEmbeddings.interpolate_pos_encoding`: the class token keeps
  its row, the patches' square of rows is resized bicubically. On the host,
  once, when weights are read.

  Args:
    table: [1, 1 + N, D], the parameter `position_embedding`.
    num_tokens: 1 + N', `num_tokens` of the config to use.

  Returns:
    [1, 1 + N', D] in the table's dtype; the table itself where N' = N.

  Raises:
    ValueError: N or N' is no square number.
  """
  if table.shape[1] == num_tokens:
    return table
  old, new = (math.isqrt(n - 1) for n in (table.shape[1], num_tokens))
  if 1 + old**2 != table.shape[1] or 1 + new**2 != num_tokens:
    raise ValueError(
        f'Positions of {table.shape[1]} tokens cannot be interpolated to '
        f'{num_tokens}: both must be one more than a square number.'
    )
  square = table[0, 1:].reshape(old, old, -1).astype(np.float64)
  weights = _bicubic(old, new)
  # Rows, then columns.
  square = np.tensordot(weights, square, 1)
  square = np.tensordot(weights, square, (1, 1)).swapaxes(0, 1)
  patches = square.reshape(1, new**2, -1).astype(table.dtype)
  return np.concatenate([table[:, :1], patches], axis=1)


def _bicubic(old: int, new: int) -> np.ndarray:
  """Weights float64[new, old] of torch's bicubic `interpolate`.

  Pixel centres correspond (align_corners=False), nothing is smoothed before
  shrinking (antialias=False), and beyond the edge the last row is repeated.
  """
  places = (np.arange(new) + 0.5) * (old / new) - 0.5
  weights = np.zeros((new, old))
  for shift in (-1, 0, 1, 2):
    near = np.floor(places) + shift
    x = np.abs(places - near)
    # Keys' cubic convolution (1981) with a = -3/4.
    weight = np.where(
        x <= 1,
        1.25 * x**3 - 2.25 * x**2 + 1,
        -0.75 * (x**3 - 5 * x**2 + 8 * x - 4),
    )
    column = np.clip(near, 0, old - 1).astype(int)
    np.add.at(weights, (np.arange(new), column), weight)
  return weights
