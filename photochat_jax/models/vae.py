"""Stable Diffusion's autoencoder: photos to latents and back.

diffusers' `AutoencoderKL` in Flax, NHWC.

Letters: B photos, H and W their sides, h = H / factor and w = W / factor the
latents', C latent channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from photochat_jax.models import unet_blocks
from photochat_jax.ops import remat as remat_lib


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Numbers of an autoencoder (`diffusers.AutoencoderKL`'s config).

  Attributes:
    in_channels: colours of the photo read.
    out_channels: colours of the photo made.
    latent_channels: channels of the latents.
    block_out_channels: channels of each resolution, finest first.
    layers_per_block: resnets per resolution in the encoder; one more in the
      decoder.
    norm_num_groups: groups of every group norm.
    scaling_factor: what latents are multiplied by to have unit variance in
      the diffusion. Applied by the caller.
    tile_size: side in pixels of the tiles that a larger photo is encoded and
      decoded in (`models/tiling.py`), a multiple of four times `factor`; 0
      takes every photo whole. diffusers' `enable_tiling` takes the side that
      the autoencoder was trained on, 512 for Stable Diffusion 1.x. Applied
      by the caller.
    dtype: of the computation; parameters are float32.
    remat: what each resnet keeps for the backward pass, see `ops.remat`.
  """

  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  tile_size: int = 0
  dtype: str = "float32"
  remat: str = "none"

  def __post_init__(self):
    for channels in self.block_out_channels:
      if channels % self.norm_num_groups:
        raise ValueError(
          f"block_out_channels {channels} must be a multiple of "
          f"norm_num_groups {self.norm_num_groups}."
        )
    if self.tile_size < 0 or self.tile_size % (4 * self.factor):
      raise ValueError(
        f"tile_size {self.tile_size} must be a multiple of "
        f"{4 * self.factor}, or 0 for no tiles."
      )

  @property
  def factor(self) -> int:
    """Photo side over latent side."""
    return 2 ** (len(self.block_out_channels) - 1)

  @classmethod
  def tiny(cls, **overrides) -> "VAEConfig":
    """A toy that shrinks photos by four, for CPUs and tests."""
    numbers = dict(
      block_out_channels=(16, 32, 64),
      layers_per_block=1,
      norm_num_groups=8,
    )
    return cls(**(numbers | overrides))

  @classmethod
  def sd15(cls, **overrides) -> "VAEConfig":
    """Stable Diffusion 1.x's and 2.x's autoencoder: one architecture."""
    return cls(**overrides)


class _Half(nn.Module):
  """What encoder and decoder share."""

  config: VAEConfig

  @property
  def dtype(self):
    return jnp.dtype(self.config.dtype)


class Resnets(_Half):
  """Resnets of one resolution, and the change to the next.

  Attributes:
    channels: of this resolution.
    layers: number of resnets.
    change: 'down', 'up' or '' after the resnets.
  """

  channels: int
  layers: int
  change: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.layers):
      x = _resnet(self.config, self.channels, f"resnets_{i}")(x)
    if self.change == "down":
      # Zeros only after the last row and column, unlike the UNet.
      x = unet_blocks.Downsample(
        self.channels, (0, 1), self.dtype, name="downsamplers_0"
      )(x)
    elif self.change == "up":
      x = unet_blocks.Upsample(self.channels, self.dtype, name="upsamplers_0")(
        x
      )
    return x


class MidBlock(_Half):
  """Resnet, attention over all pixels, resnet (`UNetMidBlock2D`)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    x = _resnet(c, x.shape[-1], "resnets_0")(x)
    pixels = x.reshape(x.shape[0], -1, x.shape[-1])
    attended = unet_blocks.Attention(
      num_heads=1,
      use_bias=True,
      num_groups=c.norm_num_groups,
      dtype=self.dtype,
      name="attentions_0",
    )(pixels)
    x = x + attended.reshape(x.shape)
    return _resnet(c, x.shape[-1], "resnets_1")(x)


class Encoder(_Half):
  """diffusers `Encoder`: [B, H, W, 3] -> [B, h, w, 2 C]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    channels = c.block_out_channels
    x = unet_blocks.Conv(channels[0], dtype=self.dtype, name="conv_in")(x)
    for i, width in enumerate(channels):
      change = "down" if i < len(channels) - 1 else ""
      x = Resnets(
        c, width, c.layers_per_block, change, name=f"down_blocks_{i}"
      )(x)
    x = MidBlock(c, name="mid_block")(x)
    return _head(c, 2 * c.latent_channels, x)


class Decoder(_Half):
  """diffusers `Decoder`: [B, h, w, C] -> [B, H, W, 3]."""

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    c = self.config
    channels = c.block_out_channels[::-1]
    x = unet_blocks.Conv(channels[0], dtype=self.dtype, name="conv_in")(z)
    x = MidBlock(c, name="mid_block")(x)
    for i, width in enumerate(channels):
      change = "up" if i < len(channels) - 1 else ""
      x = Resnets(
        c, width, c.layers_per_block + 1, change, name=f"up_blocks_{i}"
      )(x)
    return _head(c, c.out_channels, x)


class VAE(nn.Module):
  """The autoencoder (diffusers `AutoencoderKL`)."""

  config: VAEConfig

  def setup(self):
    c = self.config
    self.encoder = Encoder(c)
    self.decoder = Decoder(c)
    self.quant_conv = unet_blocks.Dense(2 * c.latent_channels, dtype=c.dtype)
    self.post_quant_conv = unet_blocks.Dense(c.latent_channels, dtype=c.dtype)

  def moments(self, x: jax.Array) -> jax.Array:
    """Photos [B, H, W, in_channels] in [-1, 1] -> [B, h, w, 2 C].

    `posterior` says what they mean.

    Raises:
      ValueError: a side of the photos is no multiple of `config.factor`.
    """
    factor = self.config.factor
    if x.shape[1] % factor or x.shape[2] % factor:
      raise ValueError(
        f"Photos of {x.shape[1]}x{x.shape[2]} cannot be encoded: resize them "
        f"to multiples of {factor}."
      )
    return self.quant_conv(self.encoder(x))

  def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Photos as in `moments` -> mean, log-variance, each [B, h, w, C]."""
    return posterior(self.moments(x))

  def decode(self, z: jax.Array) -> jax.Array:
    """Decodes latents [B, h, w, C], unscaled, to photos [B, H, W, 3]."""
    return self.decoder(self.post_quant_conv(z))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Encodes photos and decodes the mean."""
    mean, _ = self.encode(x)
    return self.decode(mean)


def posterior(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The Gaussian over latents (diffusers `DiagonalGaussianDistribution`).

  Args:
    moments: [B, h, w, 2 C], from `VAE.moments`.

  Returns:
    mean, which is the mode too, and logarithm of the variance of the latents,
    each [B, h, w, C], not yet multiplied by a scale.
  """
  mean, logvar = jnp.split(moments, 2, axis=-1)
  return mean, jnp.clip(logvar, -30.0, 20.0)


def sample(
  mean: jax.Array, logvar: jax.Array, noise: jax.Array
) -> jax.Array:
  """Draws from `posterior` with standard normal noise of the same shape."""
  return mean + jnp.exp(0.5 * logvar) * noise


def _resnet(config, channels, name):
  return remat_lib.remat(unet_blocks.ResnetBlock, config.remat)(
    channels,
    config.norm_num_groups,
    1e-6,
    jnp.dtype(config.dtype),
    name=name,
  )


def _head(config, features, x):
  dtype = jnp.dtype(config.dtype)
  x = unet_blocks.GroupNorm(
    config.norm_num_groups, 1e-6, dtype, name="conv_norm_out"
  )(x)
  return unet_blocks.Conv(features, dtype=dtype, name="conv_out")(nn.silu(x))
