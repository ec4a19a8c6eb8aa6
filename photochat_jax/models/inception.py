"""Inception v3 as FID and Inception Score mean it.

The network of the TensorFlow graph of 2015-12-05 with its 1,008 classes, whose
weights in torch's form are pytorch-fid's `pt_inception-2015-12-05-6726825d`.
It is torchvision's `InceptionV3` but for its pools: averages leave the padding
out, and the last block takes a maximum. There is one size, as there is one
such checkpoint; features of any other network are no FID.

Axis letters: B photos, H and W pixels, C channels.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

SIZE = 299
"""Height and width of what the network sees, pixels."""

FEATURES, CLASSES = 2048, 1008

_average = functools.partial(
  nn.avg_pool,
  window_shape=(3, 3),
  strides=(1, 1),
  padding="SAME",
  count_include_pad=False,
)
_largest = functools.partial(
  nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding="VALID"
)


def prepare(photos: jax.Array) -> jax.Array:
  """uint8[B, H, W, 3] -> float32[B, 299, 299, 3] in [-1, 1].

  Resized as pytorch-fid does: linearly, pixel centres correspond, nothing is
  smoothed before shrinking.
  """
  shape = (photos.shape[0], SIZE, SIZE, 3)
  sized = jax.image.resize(
    photos.astype(jnp.float32) / 255.0, shape, "linear", antialias=False
  )
  return 2.0 * sized - 1.0


class Norm(nn.Module):
  """torch's BatchNorm2d in `eval`: statistics are parameters."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., C] -> [..., C]."""
    shape = x.shape[-1:]
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale, var = (self.param(name, ones, shape) for name in ("scale", "var"))
    bias, mean = (self.param(name, zeros, shape) for name in ("bias", "mean"))
    factor = scale * jax.lax.rsqrt(var + 1e-3)
    return x * factor + (bias - mean * factor)


class Conv(nn.Module):
  """A convolution, its norm and a ReLU (torchvision's `BasicConv2d`)."""

  features: int
  window: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H', W', features]."""
    x = nn.Conv(
      self.features,
      self.window,
      (self.stride, self.stride),
      self.padding,
      use_bias=False,
      name="conv",
    )(x)
    return nn.relu(Norm(name="bn")(x))


def _chain(x, *convs):
  """Applies `(name, features, window, ...)` one after the other."""
  for name, *numbers in convs:
    x = Conv(*numbers, name=name)(x)
  return x


def _join(*branches):
  return jnp.concatenate(branches, axis=-1)


class BlockA(nn.Module):
  """torchvision's `InceptionA`: windows of 1, 5 and twice 3."""

  pool_features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return _join(
      _chain(x, ("branch1x1", 64)),
      _chain(x, ("branch5x5_1", 48), ("branch5x5_2", 64, (5, 5))),
      _chain(
        x,
        ("branch3x3dbl_1", 64),
        ("branch3x3dbl_2", 96, (3, 3)),
        ("branch3x3dbl_3", 96, (3, 3)),
      ),
      _chain(_average(x), ("branch_pool", self.pool_features)),
    )


class BlockB(nn.Module):
  """torchvision's `InceptionB`, half the height and width."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return _join(
      _chain(x, ("branch3x3", 384, (3, 3), 2, "VALID")),
      _chain(
        x,
        ("branch3x3dbl_1", 64),
        ("branch3x3dbl_2", 96, (3, 3)),
        ("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
      ),
      _largest(x),
    )


class BlockC(nn.Module):
  """torchvision's `InceptionC`: windows of 7 in one direction at a time."""

  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width, row, column = self.width, (1, 7), (7, 1)
    return _join(
      _chain(x, ("branch1x1", 192)),
      _chain(
        x,
        ("branch7x7_1", width),
        ("branch7x7_2", width, row),
        ("branch7x7_3", 192, column),
      ),
      _chain(
        x,
        ("branch7x7dbl_1", width),
        ("branch7x7dbl_2", width, column),
        ("branch7x7dbl_3", width, row),
        ("branch7x7dbl_4", width, column),
        ("branch7x7dbl_5", 192, row),
      ),
      _chain(_average(x), ("branch_pool", 192)),
    )


class BlockD(nn.Module):
  """torchvision's `InceptionD`, half the height and width."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return _join(
      _chain(
        x, ("branch3x3_1", 192), ("branch3x3_2", 320, (3, 3), 2, "VALID")
      ),
      _chain(
        x,
        ("branch7x7x3_1", 192),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
      ),
      _largest(x),
    )


class BlockE(nn.Module):
  """torchvision's `InceptionE`; the last one pools by the maximum."""

  last: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    pooled = _largest(x, strides=(1, 1), padding="SAME") if self.last else (
      _average(x)
    )
    three = _chain(x, ("branch3x3_1", 384))
    double = _chain(
      x, ("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, (3, 3))
    )
    return _join(
      _chain(x, ("branch1x1", 320)),
      _chain(three, ("branch3x3_2a", 384, (1, 3))),
      _chain(three, ("branch3x3_2b", 384, (3, 1))),
      _chain(double, ("branch3x3dbl_3a", 384, (1, 3))),
      _chain(double, ("branch3x3dbl_3b", 384, (3, 1))),
      _chain(pooled, ("branch_pool", 192)),
    )


class Inception(nn.Module):
  """Photos to the features of FID and the logits of Inception Score."""

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Looks at photos.

    Args:
      x: float32[B, 299, 299, 3] from `prepare`.

    Returns:
      [B, 2048] features after the average over places, and [B, 1008] logits
      without the bias, as Inception Score's own code takes them.
    """
    x = _chain(
      x,
      ("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
      ("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
      ("Conv2d_2b_3x3", 64, (3, 3)),
    )
    x = _chain(
      _largest(x),
      ("Conv2d_3b_1x1", 80),
      ("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    )
    x = _largest(x)
    for name, features in (("5b", 32), ("5c", 64), ("5d", 64)):
      x = BlockA(features, name=f"Mixed_{name}")(x)
    x = BlockB(name="Mixed_6a")(x)
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
      x = BlockC(width, name=f"Mixed_{name}")(x)
    x = BlockD(name="Mixed_7a")(x)
    for name, last in (("7b", False), ("7c", True)):
      x = BlockE(last, name=f"Mixed_{name}")(x)
    features = jnp.mean(x, axis=(1, 2))
    kernel = self.param(
      "fc", nn.initializers.lecun_normal(), (FEATURES, CLASSES)
    )
    return features, features @ kernel
