"""CLIP: photos and texts in one space, for scores of what was drawn.

HF's `CLIPModel`. Letters: B photos or texts, m text positions, N patches, D
width of a tower, P width of the common space.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from photochat_jax.models import clip_text
from photochat_jax.models.clip_text import CLIPTextConfig
from photochat_jax.models.vit import normalise
from photochat_jax.ops import remat as remat_lib


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
  """Numbers of a CLIP vision tower (`transformers.CLIPVisionConfig`).

  Attributes:
    image_size: height and width of a photo, pixels.
    patch_size: height and width of a patch, pixels; divides `image_size`.
    hidden_size: D.
    intermediate_size: width inside the MLP.
    num_hidden_layers: encoder layers.
    num_attention_heads: divides `hidden_size`.
    hidden_act: `quick_gelu` or `gelu`.
    layer_norm_eps: added to every variance.
    dtype: of activations; parameters are float32.
    remat: what each layer keeps for the backward pass, see `ops.remat`.
  """

  is_causal: ClassVar[bool] = False

  image_size: int = 224
  patch_size: int = 32
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  dtype: str = "float32"
  remat: str = "none"

  def __post_init__(self):
    clip_text.check_layer(self)
    if self.image_size % self.patch_size:
      raise ValueError(
        f"image_size={self.image_size} must be a multiple of "
        f"patch_size={self.patch_size}."
      )


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """Both towers.

  Attributes:
    vision: of the vision tower.
    text: of the text tower.
    projection_dim: P.
  """

  vision: CLIPVisionConfig = CLIPVisionConfig()
  text: CLIPTextConfig = CLIPTextConfig(
    hidden_size=512, intermediate_size=2048, num_attention_heads=8
  )
  projection_dim: int = 512

  @classmethod
  def tiny(cls) -> "CLIPConfig":
    """Toys of two layers, for CPUs and tests."""
    vision = CLIPVisionConfig(
      image_size=32,
      patch_size=8,
      hidden_size=48,
      intermediate_size=96,
      num_hidden_layers=2,
      num_attention_heads=4,
    )
    return cls(vision, CLIPTextConfig.tiny(), 24)

  @classmethod
  def vit_b32(cls) -> "CLIPConfig":
    """openai/clip-vit-base-patch32, what CLIPScore was published with."""
    return cls()


class CLIPVision(nn.Module):
  """Photos to the class token (HF `CLIPVisionModel`'s pooled output)."""

  config: CLIPVisionConfig

  @nn.compact
  def __call__(self, pixel_values: jax.Array) -> jax.Array:
    """[B, image_size, image_size, 3] from `vit.normalise` -> [B, D]."""
    c = self.config
    dtype, width = jnp.dtype(c.dtype), c.hidden_size
    patch = c.patch_size
    side = c.image_size // patch
    # A convolution whose stride is its size is a product over patches.
    patches = pixel_values.reshape(-1, side, patch, side, patch, 3)
    patches = patches.swapaxes(2, 3).reshape(-1, side * side, 3 * patch**2)
    x = nn.Dense(width, use_bias=False, dtype=dtype, name="patch_embedding")(
      patches
    )
    init = nn.initializers.normal(0.02)
    first = self.param("class_embedding", init, (width,))
    places = self.param("position_embedding", init, (1 + side * side, width))
    first = jnp.broadcast_to(first.astype(dtype), (len(x), 1, width))
    x = jnp.concatenate([first, x], axis=1) + places.astype(dtype)
    x = clip_text.layer_norm(c, "pre_layrnorm")(x)
    layer = remat_lib.remat(clip_text.Layer, c.remat, scanned=True)
    x, _ = nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=c.num_hidden_layers,
    )(c, name="layers")(x)
    return clip_text.layer_norm(c, "post_layernorm")(x[:, 0])


class CLIP(nn.Module):
  """Both towers and their projections."""

  config: CLIPConfig

  def setup(self):
    c = self.config
    self.vision_model = CLIPVision(c.vision)
    self.text_model = clip_text.CLIPText(c.text)
    self.visual_projection = nn.Dense(c.projection_dim, use_bias=False)
    self.text_projection = nn.Dense(c.projection_dim, use_bias=False)

  def see(self, photos: jax.Array) -> jax.Array:
    """Photos uint8[B, image_size, image_size, 3] -> [B, P], of length 1."""
    return _unit(self.visual_projection(self.vision_model(normalise(photos))))

  def read(self, tokens: jax.Array) -> jax.Array:
    """Texts int32[B, m], each with EOS -> [B, P], of length 1.

    What stands behind the first EOS does not count.
    """
    hidden = self.text_model(self.text_model.embed(tokens))
    end = jnp.argmax(tokens == self.config.text.eos_token_id, axis=-1)
    pooled = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
    return _unit(self.text_projection(pooled))

  def __call__(self, photos: jax.Array, tokens: jax.Array):
    """`see` and `read` at once, which makes every parameter."""
    return self.see(photos), self.read(tokens)


def _unit(x: jax.Array) -> jax.Array:
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
