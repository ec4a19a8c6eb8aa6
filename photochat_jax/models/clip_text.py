"""CLIP's text encoder: caption tokens in, the UNet's context out.

`transformers.CLIPTextModel` in Flax, split where the bridge needs it: `embed`
is the token table alone, and calling the module starts from embeddings, so
that a caption written by the language model can enter without ever becoming
token ids.

Letters: B captions, m text positions, D hidden width, H heads.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from photochat_jax.ops import partition
from photochat_jax.ops import remat as remat_lib
from photochat_jax.ops.attention import attention

_ACTIVATIONS = {
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "gelu": functools.partial(nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """Numbers of a CLIP text encoder (`transformers.CLIPTextConfig`)."""

  is_causal: ClassVar[bool] = True

  vocab_size: int = 49408
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  dtype: str = "float32"
  remat: str = "none"
  bos_token_id: int = 49406
  eos_token_id: int = 49407
  pad_token_id: int = 49407

  def __post_init__(self):
    check_layer(self)

  @classmethod
  def tiny(cls, **overrides) -> "CLIPTextConfig":
    """A toy of two layers, for CPUs and tests."""
    numbers = dict(
      vocab_size=768,
      hidden_size=64,
      intermediate_size=128,
      num_hidden_layers=2,
      num_attention_heads=4,
      max_position_embeddings=32,
      bos_token_id=766,
      eos_token_id=767,
      pad_token_id=767,
    )
    return cls(**(numbers | overrides))

  @classmethod
  def sd15(cls, **overrides) -> "CLIPTextConfig":
    """CLIP ViT-L/14's text tower, as Stable Diffusion 1.x uses it."""
    return cls(**overrides)

  @classmethod
  def sd21(cls, **overrides) -> "CLIPTextConfig":
    """OpenCLIP ViT-H's text tower, last layer dropped: Stable Diffusion 2.x."""
    numbers = dict(
      hidden_size=1024,
      intermediate_size=4096,
      num_hidden_layers=23,
      num_attention_heads=16,
      hidden_act="gelu",
      pad_token_id=0,
    )
    return cls(**(numbers | overrides))


def check_layer(config: Any) -> None:
  """Checks what `Layer` needs of a tower's config.

  Raises:
    ValueError: a field is wrong.
  """
  if config.hidden_act not in _ACTIVATIONS:
    raise ValueError(
      f"hidden_act is {config.hidden_act!r}; choose one of "
      f"{sorted(_ACTIVATIONS)}."
    )
  if config.hidden_size % config.num_attention_heads:
    raise ValueError(
      f"hidden_size {config.hidden_size} must be a multiple of "
      f"num_attention_heads {config.num_attention_heads}."
    )


class Attention(nn.Module):
  """Self-attention, causal in the text encoder (HF `CLIPAttention`)."""

  config: Any

  @nn.compact
  def __call__(self, hidden: jax.Array) -> jax.Array:
    c = self.config
    in_std = (c.hidden_size * 2 * c.num_hidden_layers) ** -0.5
    heads = (c.num_attention_heads, c.hidden_size // c.num_attention_heads)

    def project(name):
      x = _dense(c, c.hidden_size, in_std, name)(hidden)
      return x.reshape(*x.shape[:-1], *heads)

    out = attention(
      project("q_proj"),
      project("k_proj"),
      project("v_proj"),
      is_causal=c.is_causal,
    )
    out = out.reshape(hidden.shape)
    return _dense(c, c.hidden_size, c.hidden_size**-0.5, "out_proj")(out)


class MLP(nn.Module):
  """Two dense layers round the activation (HF `CLIPMLP`)."""

  config: Any

  @nn.compact
  def __call__(self, hidden: jax.Array) -> jax.Array:
    c = self.config
    in_std = (c.hidden_size * 2 * c.num_hidden_layers) ** -0.5
    hidden = _dense(c, c.intermediate_size, (2 * c.hidden_size) ** -0.5, "fc1")(
      hidden
    )
    hidden = _ACTIVATIONS[c.hidden_act](hidden)
    return _dense(c, c.hidden_size, in_std, "fc2")(hidden)


class Layer(nn.Module):
  """One pre-norm block (HF `CLIPEncoderLayer`), in the form nn.scan wants.

  Attributes:
    config: of a tower of CLIP: the text encoder's, or the vision tower's of
      `models.clip`.
  """

  config: Any

  @nn.compact
  def __call__(self, hidden: jax.Array) -> tuple[jax.Array, None]:
    c = self.config
    hidden = partition.constrain(hidden)
    normed = layer_norm(c, "layer_norm1")(hidden)
    hidden = hidden + Attention(c, name="self_attn")(normed)
    normed = layer_norm(c, "layer_norm2")(hidden)
    return hidden + MLP(c, name="mlp")(normed), None


class CLIPText(nn.Module):
  """The text encoder (HF `CLIPTextModel`), without the pooled output."""

  config: CLIPTextConfig

  def setup(self):
    c = self.config
    embed = functools.partial(
      nn.Embed,
      features=c.hidden_size,
      dtype=jnp.dtype(c.dtype),
      embedding_init=nn.initializers.normal(0.02),
    )
    self.token_embedding = embed(c.vocab_size)
    self.position_embedding = embed(c.max_position_embeddings)
    layer = remat_lib.remat(Layer, c.remat, scanned=True)
    self.layers = nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=c.num_hidden_layers,
    )(c)
    self.final_layer_norm = layer_norm(c)

  def embed(self, ids: jax.Array) -> jax.Array:
    """Looks tokens up: ids int32[B, m] -> [B, m, D], without positions."""
    return self.token_embedding(ids)

  def __call__(self, inputs_embeds: jax.Array) -> jax.Array:
    """Encodes embedded captions.

    Args:
      inputs_embeds: [B, m, D] token embeddings, or mixtures of them.

    Returns:
      [B, m, D], the last hidden state after the final layer norm.

    Raises:
      ValueError: m is more than `max_position_embeddings`.
    """
    c = self.config
    length = inputs_embeds.shape[-2]
    if length > c.max_position_embeddings:
      raise ValueError(
        f"The caption has {length} positions but the text encoder only "
        f"{c.max_position_embeddings}; cut it to max_position_embeddings."
      )
    if self.is_initializing():
      # The table is read by `embed` alone: touch it, so that one init of the
      # module makes every parameter.
      self.embed(jnp.zeros((1, 1), jnp.int32))
    hidden = inputs_embeds.astype(c.dtype)
    hidden = hidden + self.position_embedding(jnp.arange(length))
    hidden, _ = self.layers(hidden)
    return self.final_layer_norm(hidden)


def _dense(config, features, std, name):
  return nn.Dense(
    features,
    dtype=jnp.dtype(config.dtype),
    kernel_init=nn.initializers.normal(std),
    name=name,
  )


def layer_norm(config: Any, name: str | None = None) -> nn.LayerNorm:
  """A tower's layer norm."""
  return nn.LayerNorm(
    epsilon=config.layer_norm_eps, dtype=jnp.dtype(config.dtype), name=name
  )
