"""The convolutional parts that the UNet and the VAE share.

Everything is NHWC and carries diffusers' names, so that a checkpoint's key and
ours differ by punctuation only.

Letters: B photos, h and w latent rows and columns, C channels, m context
positions, H heads.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from photochat_jax.models import lora
from photochat_jax.ops import partition
from photochat_jax.ops.attention import attention

# Uniform, as torch's own: half the time that normal draws take to compile.
_KERNEL_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
# Residual branches start small, so that a new network begins near the
# identity, as in Stable Diffusion's zero-initialised ones; but not at zero,
# so that the very first gradient already reaches the context.
BRANCH_INIT = nn.initializers.variance_scaling(1e-2, "fan_in", "uniform")

Dense = functools.partial(lora.Dense, kernel_init=_KERNEL_INIT)


class Conv(nn.Module):
  """A convolution with torch's explicit padding.

  Attributes:
    features: output channels.
    kernel: side of the square kernel.
    stride: step of both axes.
    padding: rows and columns added ((top, bottom), (left, right)).
    dtype: of the computation.
    kernel_init: initialiser of the kernel.
  """

  features: int
  kernel: int = 3
  stride: int = 1
  padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
  dtype: jnp.dtype = jnp.float32
  kernel_init: nn.initializers.Initializer = _KERNEL_INIT

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.kernel, self.kernel, x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x = x.astype(self.dtype)
    kernel = kernel.astype(self.dtype)
    out = jax.lax.conv_general_dilated(
      x,
      kernel,
      (self.stride, self.stride),
      self.padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    # On a mesh of three axes larger than 1, XLA (jax 0.10.2) gives wrong
    # gradients to a norm before two convolutions that it places itself.
    return partition.constrain(out + bias.astype(self.dtype))


class GroupNorm(nn.Module):
  """Group normalisation over all but the batch axis (torch `GroupNorm`).

  Statistics and result are computed in float32 whatever the dtype.

  Attributes:
    num_groups: how many groups the channels are split into.
    epsilon: added to the variance.
    dtype: of the result.
  """

  num_groups: int
  epsilon: float
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    # Pixels are averaged before the channels of a group: the long reduction
    # then keeps channels innermost, which halves the time on CPUs.
    pixels = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)
    centred = pixels - self._group_mean(pixels.mean(1))
    var = self._group_mean(jnp.square(centred).mean(1))
    out = centred * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
    return out.reshape(x.shape).astype(self.dtype)

  def _group_mean(self, x):
    """Channels' means [B, C] -> their groups', repeated to [B, 1, C]."""
    means = x.reshape(x.shape[0], self.num_groups, -1).mean(-1)
    repeats = x.shape[-1] // self.num_groups
    return jnp.repeat(means, repeats, axis=-1)[:, None]


class ResnetBlock(nn.Module):
  """diffusers `ResnetBlock2D`.

  Attributes:
    features: output channels.
    num_groups: of the two group norms.
    epsilon: of the two group norms.
    dtype: of the computation.
  """

  features: int
  num_groups: int
  epsilon: float
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
    """x [B, h, w, C], time [B, T] (already activated) or None."""
    norm = functools.partial(
      GroupNorm, self.num_groups, self.epsilon, self.dtype
    )
    conv = functools.partial(Conv, self.features, dtype=self.dtype)
    hidden = nn.silu(norm(name="norm1")(x))
    hidden = conv(name="conv1")(hidden)
    if time is not None:
      dense = Dense(self.features, dtype=self.dtype, name="time_emb_proj")
      hidden = hidden + dense(time)[:, None, None, :]
    hidden = nn.silu(norm(name="norm2")(hidden))
    hidden = conv(kernel_init=BRANCH_INIT, name="conv2")(hidden)
    if x.shape[-1] != self.features:
      x = Dense(self.features, dtype=self.dtype, name="conv_shortcut")(x)
    return x + hidden


class Downsample(nn.Module):
  """Halves both sides by a strided convolution (diffusers `Downsample2D`).

  Attributes:
    features: channels, in and out.
    padding: one row and column before and after (UNet) or only after (VAE).
    dtype: of the computation.
  """

  features: int
  padding: tuple[int, int] = (1, 1)
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return Conv(
      self.features,
      stride=2,
      padding=(self.padding, self.padding),
      dtype=self.dtype,
      name="conv",
    )(x)


class Upsample(nn.Module):
  """Repeats every pixel 2x2 and convolves (diffusers `Upsample2D`).

  Attributes:
    features: channels, in and out.
    dtype: of the computation.
  """

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, size: tuple[int, int] | None = None
  ) -> jax.Array:
    """x [B, h, w, C] -> [B, *size, C]; without a size, [B, 2 h, 2 w, C].

    A size is at most one less than double: then the last repeated row or
    column is cut, which is nearest-neighbour interpolation to that size.
    """
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    x = x.reshape(b, 2 * h, 2 * w, c)
    if size is not None:
      x = x[:, : size[0], : size[1]]
    return Conv(self.features, dtype=self.dtype, name="conv")(x)


class Attention(nn.Module):
  """Attention as in diffusers (`Attention`): to_q, to_k, to_v, to_out.0.

  Attributes:
    num_heads: heads that share the query's channels.
    use_bias: whether to_q, to_k and to_v have biases.
    num_groups: of a group norm before them; None: no group norm.
    dtype: of the computation.
  """

  num_heads: int
  use_bias: bool = False
  num_groups: int | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, context: jax.Array | None = None
  ) -> jax.Array:
    """x [B, T, C] attends to context [B, S, D], or to itself."""
    channels = x.shape[-1]
    if self.num_groups is not None:
      x = GroupNorm(self.num_groups, 1e-6, self.dtype, name="group_norm")(x)
    context = x if context is None else context

    def project(name, source):
      out = Dense(
        channels, use_bias=self.use_bias, dtype=self.dtype, name=name
      )(source)
      return out.reshape(*out.shape[:-1], self.num_heads, -1)

    out = attention(
      project("to_q", x), project("to_k", context), project("to_v", context)
    )
    out = out.reshape(x.shape)
    return Dense(channels, dtype=self.dtype, name="to_out_0")(out)


class GEGLU(nn.Module):
  """A dense layer gated by the GELU of another (diffusers `GEGLU`).

  Attributes:
    features: output channels.
    dtype: of the computation.
  """

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = Dense(2 * self.features, dtype=self.dtype, name="proj")(x)
    hidden, gate = jnp.split(x, 2, axis=-1)
    return hidden * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
  """The gated network after the attentions (diffusers `FeedForward`).

  Attributes:
    dtype: of the computation.
  """

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    hidden = GEGLU(4 * channels, self.dtype, name="net_0")(x)
    return Dense(channels, dtype=self.dtype, name="net_2")(hidden)


class TransformerBlock(nn.Module):
  """Self-attention, cross-attention, MLP (`BasicTransformerBlock`).

  Attributes:
    num_heads: of both attentions.
    dtype: of the computation.
  """

  num_heads: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=self.dtype)
    attend = functools.partial(Attention, self.num_heads, dtype=self.dtype)
    x = x + attend(name="attn1")(norm(name="norm1")(x))
    x = x + attend(name="attn2")(norm(name="norm2")(x), context)
    return x + FeedForward(self.dtype, name="ff")(norm(name="norm3")(x))


class Transformer(nn.Module):
  """Transformer blocks over the pixels (diffusers `Transformer2DModel`).

  Attributes:
    num_heads: of every attention.
    num_layers: transformer blocks.
    num_groups: of the group norm before them.
    dtype: of the computation.
  """

  num_heads: int
  num_layers: int
  num_groups: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    """x [B, h, w, C], context [B, m, D] -> [B, h, w, C]."""
    channels = x.shape[-1]
    # A 1x1 convolution is a Dense: one form serves both of diffusers'
    # (`use_linear_projection` only says how a checkpoint stores the kernel).
    hidden = GroupNorm(self.num_groups, 1e-6, self.dtype, name="norm")(x)
    hidden = hidden.reshape(x.shape[0], -1, channels)
    hidden = Dense(channels, dtype=self.dtype, name="proj_in")(hidden)
    for i in range(self.num_layers):
      block = TransformerBlock(
        self.num_heads, self.dtype, name=f"transformer_blocks_{i}"
      )
      hidden = block(hidden, context)
    hidden = Dense(
      channels, dtype=self.dtype, kernel_init=BRANCH_INIT, name="proj_out"
    )(hidden)
    return partition.constrain(x + hidden.reshape(x.shape))
