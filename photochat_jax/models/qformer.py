"""The Q-Former of BLIP-2 (arXiv:2301.12597): a photo as a few vectors.

HF's `Blip2QFormerModel` on the query tokens alone, and the linear layer into
the language model. Axis letters: B photos, N image features of width E, K
query tokens of width D.

Layers come in groups of `cross_attention_frequency`, of which the first looks
at the photo. Parameters: `query_tokens`, `layernorm` and
`layers/layer_<place in the group>`, with a leading group axis.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from photochat_jax.ops import attention as attention_lib
from photochat_jax.ops import partition
from photochat_jax.ops import remat as remat_lib


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
  """HF's `Blip2QFormerConfig` words.

  Attributes:
    num_query_tokens: K, visual tokens per photo.
    hidden_size: D.
    num_hidden_layers: a multiple of `cross_attention_frequency`.
    num_attention_heads: divides `hidden_size`.
    intermediate_size: width inside the MLP.
    cross_attention_frequency: layers per layer which looks at the photo.
    encoder_hidden_size: E.
    layer_norm_eps: added to every variance.
    dtype: of activations; parameters are float32.
    remat: what each group keeps for the backward pass, see `ops.remat`.
  """

  num_query_tokens: int = 32
  hidden_size: int = 768
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  intermediate_size: int = 3072
  cross_attention_frequency: int = 2
  encoder_hidden_size: int = 1408
  layer_norm_eps: float = 1e-12
  dtype: str = 'float32'
  remat: str = 'none'

  def __post_init__(self):
    if self.num_hidden_layers % self.cross_attention_frequency:
      raise ValueError(
          f'num_hidden_layers={self.num_hidden_layers} must be a multiple of '
          f'cross_attention_frequency={self.cross_attention_frequency}.'
      )
    if self.hidden_size % self.num_attention_heads:
      raise ValueError(
          f'hidden_size={self.hidden_size} must be a multiple of '
          f'num_attention_heads={self.num_attention_heads}.'
      )

  @classmethod
  def tiny(cls, **overrides) -> 'QFormerConfig':
    """0.2 M parameters, for CPUs; reads `ViTConfig.tiny()`."""
    numbers = {
        'num_query_tokens': 4,
        'hidden_size': 96,
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'intermediate_size': 192,
        'encoder_hidden_size': 96,
    }
    return cls(**numbers | overrides)

  @classmethod
  def blip2(cls, **overrides) -> 'QFormerConfig':
    """Salesforce/blip2-*: 32 queries over EVA-CLIP ViT-g."""
    return cls(**overrides)


class SelfAttention(nn.Module):
  """HF's `Blip2QFormerMultiHeadAttention`, before its output layer."""

  config: QFormerConfig

  @nn.compact
  def __call__(self, x, features):
    """[B, K, D] attends to [B, N, D or E] -> [B, K, D]."""
    config = self.config

    def project(name, y):
      y = nn.Dense(
          config.hidden_size, dtype=jnp.dtype(config.dtype), name=name
      )(y)
      return y.reshape(*y.shape[:2], config.num_attention_heads, -1)

    q = project('query', x)
    k, v = project('key', features), project('value', features)
    return attention_lib.attention(q, k, v).reshape(x.shape)


class Output(nn.Module):
  """HF's `Blip2QFormerSelfOutput` and `Blip2QFormerOutput` (post-norm)."""

  config: QFormerConfig

  @nn.compact
  def __call__(self, y, x):
    """LayerNorm(x + dense(y)): [B, K, any], [B, K, D] -> [B, K, D]."""
    config = self.config
    dtype = jnp.dtype(config.dtype)
    y = nn.Dense(config.hidden_size, dtype=dtype, name='dense')(y)
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps, dtype=dtype, name='LayerNorm'
    )(x + y)


class Attention(nn.Module):
  """HF's `Blip2QFormerAttention`."""

  config: QFormerConfig

  @nn.compact
  def __call__(self, x, features):
    """[B, K, D] attends to [B, N, D or E] -> [B, K, D]."""
    y = SelfAttention(self.config, name='attention')(x, features)
    return Output(self.config, name='output')(y, x)


class Intermediate(nn.Module):
  """HF's `Blip2QFormerIntermediate`, with the exact GELU."""

  config: QFormerConfig

  @nn.compact
  def __call__(self, x):
    """[B, K, D] -> [B, K, intermediate_size]."""
    y = nn.Dense(
        self.config.intermediate_size,
        dtype=jnp.dtype(self.config.dtype),
        name='dense',
    )(x)
    return nn.gelu(y, approximate=False)


class Layer(nn.Module):
  """HF's `Blip2QFormerLayer` for queries without text."""

  config: QFormerConfig
  cross: bool

  @nn.compact
  def __call__(self, x, image_embeds):
    """[B, K, D], [B, N, E] -> [B, K, D]."""
    config = self.config
    x = Attention(config, name='attention')(x, x)
    if self.cross:
      x = Attention(config, name='crossattention')(x, image_embeds)
    y = Intermediate(config, name='intermediate_query')(x)
    return Output(config, name='output_query')(y, x)


class Group(nn.Module):
  """A layer which looks at the photo and those after it which do not."""

  config: QFormerConfig

  @nn.compact
  def __call__(self, x, image_embeds):
    """[B, K, D], [B, N, E] -> ([B, K, D], None)."""
    x = partition.constrain(x)
    for i in range(self.config.cross_attention_frequency):
      x = Layer(self.config, cross=i == 0, name=f'layer_{i}')(x, image_embeds)
    return x, None


class QFormer(nn.Module):
  """Photo features to visual tokens."""

  config: QFormerConfig

  @nn.compact
  def __call__(self, image_embeds):
    """HF's `Blip2Model.get_qformer_features(...).last_hidden_state`.

    Args:
      image_embeds: [B, N, E], all that `ViT` returns.

    Returns:
      [B, K, D].

    Raises:
      ValueError: features of another width than `encoder_hidden_size`.
    """
    config = self.config
    dtype = jnp.dtype(config.dtype)
    if image_embeds.shape[-1] != config.encoder_hidden_size:
      raise ValueError(
          f'Set encoder_hidden_size={image_embeds.shape[-1]}, the width of '
          f'the image features; it is {config.encoder_hidden_size}.'
      )
    queries = self.param(
        'query_tokens',
        nn.initializers.normal(0.02),
        (1, config.num_query_tokens, config.hidden_size),
    )
    queries = nn.LayerNorm(
        epsilon=config.layer_norm_eps, dtype=dtype, name='layernorm'
    )(queries)
    x = jnp.broadcast_to(queries, (image_embeds.shape[0], *queries.shape[1:]))
    group = remat_lib.remat(Group, config.remat, scanned=True)
    x, _ = nn.scan(
        group,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=nn.broadcast,
        length=config.num_hidden_layers // config.cross_attention_frequency,
    )(config, name='layers')(x, image_embeds)
    return x


class Projection(nn.Dense):
  """HF's `language_projection`: [B, K, D] -> [B, K, features]."""
