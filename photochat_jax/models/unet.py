"""Stable Diffusion's UNet: the noise in a latent photo, given its caption.

diffusers' `UNet2DConditionModel` in Flax, NHWC, for the shapes of Stable
Diffusion 1.x and 2.x and smaller ones.

Letters: B photos, h and w latent rows and columns, C latent channels, m
context positions, D context width.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from photochat_jax.models import unet_blocks
from photochat_jax.ops import remat as remat_lib


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """Numbers of a UNet (`diffusers.UNet2DConditionModel`'s config).

  Attributes:
    sample_size: side of the latents it was trained on.
    in_channels: channels of the latents.
    out_channels: channels of the prediction.
    block_out_channels: channels of each resolution, finest first.
    layers_per_block: resnets per resolution on the way down; one more on the
      way up.
    attention: for each resolution, whether it attends to the context. The
      middle always does.
    num_attention_heads: heads, for all resolutions or for each. (diffusers
      calls this number `attention_head_dim`.)
    cross_attention_dim: width of the context.
    norm_num_groups: groups of every group norm.
    use_linear_projection: how checkpoints store `proj_in` and `proj_out`:
      dense, or 1x1 convolutions. Parameters and results here are the same.
    flip_sin_to_cos: whether the time embedding starts with the cosines.
    freq_shift: 1 to reach the lowest frequency exactly, 0 in the originals.
    transformer_layers_per_block: blocks in each attention.
    dtype: of the computation; parameters are float32.
    remat: what each resnet and attention keeps for the backward pass, see
      `ops.remat`.
  """

  sample_size: int = 64
  in_channels: int = 4
  out_channels: int = 4
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int = 2
  attention: tuple[bool, ...] = (True, True, True, False)
  num_attention_heads: int | tuple[int, ...] = 8
  cross_attention_dim: int = 768
  norm_num_groups: int = 32
  use_linear_projection: bool = False
  flip_sin_to_cos: bool = True
  freq_shift: int = 0
  transformer_layers_per_block: int = 1
  dtype: str = "float32"
  remat: str = "none"

  def __post_init__(self):
    blocks = len(self.block_out_channels)
    if not len(self.attention) == len(self.heads) == blocks:
      raise ValueError(
        f"attention and num_attention_heads must have one entry for each of "
        f"the {blocks} block_out_channels; got {self.attention} and "
        f"{self.num_attention_heads}."
      )
    for channels, heads in zip(
      self.block_out_channels, self.heads, strict=True
    ):
      if channels % self.norm_num_groups or channels % heads:
        raise ValueError(
          f"block_out_channels {channels} must be a multiple of "
          f"norm_num_groups {self.norm_num_groups} and of its "
          f"{heads} attention heads."
        )

  @property
  def heads(self) -> tuple[int, ...]:
    """Attention heads of each resolution."""
    if isinstance(self.num_attention_heads, int):
      return (self.num_attention_heads,) * len(self.block_out_channels)
    return tuple(self.num_attention_heads)

  @classmethod
  def tiny(cls, **overrides) -> "UNetConfig":
    """A toy of two resolutions, for CPUs and tests."""
    numbers = dict(
      sample_size=8,
      block_out_channels=(64, 128),
      layers_per_block=1,
      attention=(True, True),
      num_attention_heads=4,
      cross_attention_dim=64,
      norm_num_groups=8,
    )
    return cls(**(numbers | overrides))

  @classmethod
  def sd15(cls, **overrides) -> "UNetConfig":
    """Stable Diffusion 1.5."""
    return cls(**overrides)

  @classmethod
  def sd21(cls, **overrides) -> "UNetConfig":
    """Stable Diffusion 2.1-base (512 px; pass sample_size=96 for 768 px)."""
    numbers = dict(
      num_attention_heads=(5, 10, 20, 20),
      cross_attention_dim=1024,
      use_linear_projection=True,
    )
    return cls(**(numbers | overrides))


def timestep_embedding(
  timesteps: jax.Array, features: int, flip: bool, freq_shift: int
) -> jax.Array:
  """Sinusoids of the timestep (diffusers `get_timestep_embedding`).

  Args:
    timesteps: [B] integers.
    features: width of the result, even.
    flip: cosines before sines.
    freq_shift: subtracted from the number of frequencies in the exponent.

  Returns:
    float32[B, features].
  """
  half = features // 2
  exponent = -math.log(10000) * jnp.arange(half, dtype=jnp.float32)
  frequencies = jnp.exp(exponent / (half - freq_shift))
  angles = timesteps.astype(jnp.float32)[:, None] * frequencies
  parts = [jnp.sin(angles), jnp.cos(angles)]
  return jnp.concatenate(parts[::-1] if flip else parts, axis=-1)


class TimeEmbedding(nn.Module):
  """Two dense layers over the sinusoids (diffusers `TimestepEmbedding`)."""

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = functools.partial(
      unet_blocks.Dense, self.features, dtype=self.dtype
    )
    return dense(name="linear_2")(nn.silu(dense(name="linear_1")(x)))


class _Stage(nn.Module):
  """What the stages of the UNet share: resnets and attentions by number."""

  config: UNetConfig
  level: int

  def resnet(self, number: int) -> nn.Module:
    c = self.config
    return remat_lib.remat(unet_blocks.ResnetBlock, c.remat)(
      c.block_out_channels[self.level],
      c.norm_num_groups,
      1e-5,
      jnp.dtype(c.dtype),
      name=f"resnets_{number}",
    )

  def transformer(self, number: int) -> nn.Module:
    c = self.config
    return remat_lib.remat(unet_blocks.Transformer, c.remat)(
      c.heads[self.level],
      c.transformer_layers_per_block,
      c.norm_num_groups,
      jnp.dtype(c.dtype),
      name=f"attentions_{number}",
    )

  @property
  def channels(self) -> int:
    return self.config.block_out_channels[self.level]


class DownBlock(_Stage):
  """diffusers `CrossAttnDownBlock2D` / `DownBlock2D`."""

  @nn.compact
  def __call__(self, x, time, context):
    """x [B, h, w, C] -> (x at half the size, the list of skips)."""
    c = self.config
    skips = []
    for i in range(c.layers_per_block):
      x = self.resnet(i)(x, time)
      if c.attention[self.level]:
        x = self.transformer(i)(x, context)
      skips.append(x)
    if self.level < len(c.block_out_channels) - 1:
      x = unet_blocks.Downsample(
        self.channels, dtype=jnp.dtype(c.dtype), name="downsamplers_0"
      )(x)
      skips.append(x)
    return x, skips


class MidBlock(_Stage):
  """diffusers `UNetMidBlock2DCrossAttn`."""

  @nn.compact
  def __call__(self, x, time, context):
    x = self.resnet(0)(x, time)
    x = self.transformer(0)(x, context)
    return self.resnet(1)(x, time)


class UpBlock(_Stage):
  """diffusers `CrossAttnUpBlock2D` / `UpBlock2D`."""

  @nn.compact
  def __call__(self, x, time, context, skips, size):
    """Consumes the skips from their end; `size` is the next finer one's."""
    c = self.config
    for i in range(c.layers_per_block + 1):
      x = jnp.concatenate([x, skips.pop()], axis=-1)
      x = self.resnet(i)(x, time)
      if c.attention[self.level]:
        x = self.transformer(i)(x, context)
    if self.level > 0:
      x = unet_blocks.Upsample(
        self.channels, jnp.dtype(c.dtype), name="upsamplers_0"
      )(x, size)
    return x


class UNet(nn.Module):
  """The denoiser (diffusers `UNet2DConditionModel`)."""

  config: UNetConfig

  @nn.compact
  def __call__(
    self, latents: jax.Array, timesteps: jax.Array, context: jax.Array
  ) -> jax.Array:
    """Predicts noise, velocity or the clean latents, as it was trained to.

    Args:
      latents: [B, h, w, C] noisy latents of any size.
      timesteps: int[B].
      context: [B, m, D] the text encoder's last hidden state.

    Returns:
      [B, h, w, out_channels], in the config's dtype.
    """
    c = self.config
    dtype = jnp.dtype(c.dtype)
    levels = range(len(c.block_out_channels))
    context = context.astype(dtype)

    time = timestep_embedding(
      timesteps, c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift
    )
    time = TimeEmbedding(
      4 * c.block_out_channels[0], dtype, name="time_embedding"
    )(time.astype(dtype))
    time = nn.silu(time)

    x = unet_blocks.Conv(c.block_out_channels[0], dtype=dtype, name="conv_in")(
      latents
    )
    skips = [x]
    for level in levels:
      x, more = DownBlock(c, level, name=f"down_blocks_{level}")(
        x, time, context
      )
      skips += more
    x = MidBlock(c, levels[-1], name="mid_block")(x, time, context)
    for number, level in enumerate(reversed(levels)):
      # Odd sizes were rounded up on the way down: the skip below the ones
      # this block consumes has the size to come back to.
      own = c.layers_per_block + 1
      size = skips[-own - 1].shape[1:3] if level else None
      x = UpBlock(c, level, name=f"up_blocks_{number}")(
        x, time, context, skips, size
      )
    x = unet_blocks.GroupNorm(
      c.norm_num_groups, 1e-5, dtype, name="conv_norm_out"
    )(x)
    return unet_blocks.Conv(
      c.out_channels,
      dtype=dtype,
      kernel_init=unet_blocks.BRANCH_INIT,
      name="conv_out",
    )(nn.silu(x))
