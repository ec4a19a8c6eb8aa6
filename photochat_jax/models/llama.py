"""Llama: the language model which reads the dialogue and writes captions.

HF's `LlamaForCausalLM` (arXiv:2307.09288), cut where the agent needs it:
`embed` turns tokens into vectors, `__call__` turns vectors (of tokens or of
photos) into hidden states, `logits` turns hidden states into scores, so that
no [B, L, V] buffer exists unless asked for.

Axis letters: B rows, L tokens, S cache slots, H query heads, Kh key/value
heads, Dh width of a head, D width, V padded vocabulary.

Parameters: `embed_tokens`, `norm`, `lm_head` (absent when tied) and `layers`,
in which every array has a leading layer axis.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from photochat_jax.models import lora
from photochat_jax.ops import attention as attention_lib
from photochat_jax.ops import norms, partition, rope
from photochat_jax.ops import remat as remat_lib


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """HF's `LlamaConfig` words; `rope_scaling` is kept as sorted pairs.

  Attributes:
    vocab_size: tokens with a meaning; see `padded_vocab_size`.
    hidden_size: D.
    intermediate_size: width inside the gated MLP.
    num_hidden_layers: decoder layers.
    num_attention_heads: H.
    num_key_value_heads: Kh, a divisor of H.
    head_dim: Dh, hidden_size / num_attention_heads when None.
    rms_norm_eps: added to every mean square.
    rope_theta: base of the rotary wavelengths.
    rope_scaling: see `ops.rope.rope_frequencies`; a mapping or its pairs.
    tie_word_embeddings: scores reuse the embedding table.
    max_position_embeddings: context the weights were trained for.
    dtype: of activations; parameters are float32.
    remat: what each layer keeps for the backward pass, see `ops.remat`.
    scan_unroll: layers per step of the loop over layers; more saves time for
      small layers (copies of weights) and costs compile time for many.
  """

  vocab_size: int = 32000
  hidden_size: int = 4096
  intermediate_size: int = 11008
  num_hidden_layers: int = 32
  num_attention_heads: int = 32
  num_key_value_heads: int = 32
  head_dim: int | None = None
  rms_norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  rope_scaling: Mapping | tuple | None = None
  tie_word_embeddings: bool = False
  max_position_embeddings: int = 4096
  dtype: str = 'float32'
  remat: str = 'none'
  scan_unroll: int = 1

  def __post_init__(self):
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
          f'num_attention_heads={self.num_attention_heads} must be a multiple '
          f'of num_key_value_heads={self.num_key_value_heads}.'
      )
    if self.head_dim is None and self.hidden_size % self.num_attention_heads:
      raise ValueError(
          f'Give head_dim, because hidden_size={self.hidden_size} is not a '
          f'multiple of num_attention_heads={self.num_attention_heads}.'
      )
    if self.rope_scaling is not None:
      # A mapping could not be hashed, and configs are keys of jit caches.
      pairs = tuple(sorted(dict(self.rope_scaling).items()))
      object.__setattr__(self, 'rope_scaling', pairs)

  @property
  def padded_vocab_size(self) -> int:
    """V: vocab_size up to a multiple of 128, to fill lanes and shards."""
    return -(-self.vocab_size // 128) * 128

  @property
  def size_per_head(self) -> int:
    """Dh."""
    return self.head_dim or self.hidden_size // self.num_attention_heads

  @classmethod
  def tiny(cls, **overrides) -> 'LlamaConfig':
    """1 M parameters, for CPUs."""
    numbers = {
        'vocab_size': 640,
        'hidden_size': 128,
        'intermediate_size': 384,
        'num_hidden_layers': 4,
        'num_attention_heads': 4,
        'num_key_value_heads': 2,
        'max_position_embeddings': 512,
        'scan_unroll': 4,
    }
    return cls(**numbers | overrides)

  @classmethod
  def llama2_7b(cls, **overrides) -> 'LlamaConfig':
    """meta-llama/Llama-2-7b-hf, the language model of the paper."""
    return cls(**overrides)

  @classmethod
  def llama2_13b(cls, **overrides) -> 'LlamaConfig':
    """meta-llama/Llama-2-13b-hf."""
    numbers = {
        'hidden_size': 5120,
        'intermediate_size': 13824,
        'num_hidden_layers': 40,
        'num_attention_heads': 40,
        'num_key_value_heads': 40,
    }
    return cls(**numbers | overrides)

  @classmethod
  def llama32_1b(cls, **overrides) -> 'LlamaConfig':
    """meta-llama/Llama-3.2-1B."""
    numbers = {
        'vocab_size': 128256,
        'hidden_size': 2048,
        'intermediate_size': 8192,
        'num_hidden_layers': 16,
        'num_attention_heads': 32,
        'num_key_value_heads': 8,
        'head_dim': 64,
        'rope_theta': 500000.0,
        'rope_scaling': {
            'rope_type': 'llama3',
            'factor': 32.0,
            'low_freq_factor': 1.0,
            'high_freq_factor': 4.0,
            'original_max_position_embeddings': 8192,
        },
        'tie_word_embeddings': True,
        'max_position_embeddings': 131072,
    }
    return cls(**numbers | overrides)

  @classmethod
  def smollm2_135m(cls, **overrides) -> 'LlamaConfig':
    """HuggingFaceTB/SmolLM2-135M."""
    numbers = {
        'vocab_size': 49152,
        'hidden_size': 576,
        'intermediate_size': 1536,
        'num_hidden_layers': 30,
        'num_attention_heads': 9,
        'num_key_value_heads': 3,
        'rope_theta': 100000.0,
        'tie_word_embeddings': True,
        'max_position_embeddings': 8192,
    }
    return cls(**numbers | overrides)


def init_cache(
    config: LlamaConfig, batch: int, length: int, dtype=None
) -> dict[str, jax.Array]:
  """An empty key/value cache of `length` slots per row.

  Args:
    config: of the model which will fill it.
    batch: B.
    length: S, at least prompt plus answer; a write past the end lands on the
      last slots, because a traced `index` cannot be checked.
    dtype: of keys and values, `config.dtype` when None.

  Returns:
    'key' and 'value' [layers, B, S, Kh, Dh], 'segments' int32 [B, S] (0: an
    empty slot or padding) and 'index' int32 [], the next slot to be written.
  """
  layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
  shape = (layers, batch, length, kv_heads, config.size_per_head)
  dtype = jnp.dtype(dtype or config.dtype)
  return {
      'key': jnp.zeros(shape, dtype),
      'value': jnp.zeros(shape, dtype),
      'segments': jnp.zeros((batch, length), jnp.int32),
      'index': jnp.zeros((), jnp.int32),
  }


def _dense(config: LlamaConfig, features: int, **kwargs):
  """HF's Llama has no bias anywhere."""
  return lora.Dense(
      features, use_bias=False, dtype=jnp.dtype(config.dtype), **kwargs
  )


def _scores(x, kernel, dimension_numbers, **unused):
  """`lax.dot_general` which keeps the float32 sums of bfloat16 factors."""
  return lax.dot_general(
      x, kernel, dimension_numbers, preferred_element_type=jnp.float32
  )


class Attention(nn.Module):
  """HF's `LlamaAttention`."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x, stored, layer, angles, mask, index):
    """See `DecoderLayer`; returns ([B, L, D], stored)."""
    config = self.config
    heads, width = config.num_attention_heads, config.size_per_head
    kv_heads = config.num_key_value_heads

    def project(name, heads):
      y = _dense(config, heads * width, name=name)(x)
      return y.reshape(*x.shape[:2], heads, width)

    q = rope.apply_rope(project('q_proj', heads), *angles)
    k = rope.apply_rope(project('k_proj', kv_heads), *angles)
    v = project('v_proj', kv_heads)
    if stored is not None:
      # The whole cache is carried and written in place: as a scanned output
      # it would be copied for every token.
      start = (layer, 0, index, 0, 0)
      stored = tuple(
          lax.dynamic_update_slice(old, new[None].astype(old.dtype), start)
          for old, new in zip(stored, (k, v), strict=True)
      )
      k, v = (
          lax.dynamic_index_in_dim(s, layer, keepdims=False).astype(q.dtype)
          for s in stored
      )
    y = attention_lib.attention(q, k, v, mask)
    y = y.reshape(*x.shape[:2], heads * width)
    return _dense(config, config.hidden_size, name='o_proj')(y), stored


class MLP(nn.Module):
  """HF's `LlamaMLP`: down(silu(gate(x)) * up(x))."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x):
    """[B, L, D] -> [B, L, D]."""
    config = self.config
    gate = _dense(config, config.intermediate_size, name='gate_proj')(x)
    up = _dense(config, config.intermediate_size, name='up_proj')(x)
    return _dense(config, config.hidden_size, name='down_proj')(
        nn.silu(gate) * up
    )


class DecoderLayer(nn.Module):
  """HF's `LlamaDecoderLayer`, in the form `nn.scan` wants."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, carry, layer, angles, mask, index):
    """One layer.

    Args:
      carry: (hidden [B, L, D], stored): `stored` is None or the keys and
        values of all layers, each [layers, B, S, Kh, Dh].
      layer: int32 [] number of this layer, None without `stored`.
      angles: (cos, sin) of `ops.rope.rope_angles`.
      mask: bool [B, 1, L, S].
      index: int32 [] first cache slot to write, None without `stored`.

    Returns:
      (carry, None).
    """
    hidden, stored = carry
    hidden = partition.constrain(hidden)
    config = self.config
    norm = {'epsilon': config.rms_norm_eps, 'dtype': jnp.dtype(config.dtype)}
    x = norms.RMSNorm(name='input_layernorm', **norm)(hidden)
    x, stored = Attention(config, name='self_attn')(
        x, stored, layer, angles, mask, index
    )
    hidden = hidden + x
    x = norms.RMSNorm(name='post_attention_layernorm', **norm)(hidden)
    hidden = partition.constrain(hidden + MLP(config, name='mlp')(x))
    return (hidden, stored), None


class Llama(nn.Module):
  """The decoder; call its methods with `module.apply(..., method=)`."""

  config: LlamaConfig

  def setup(self):
    config = self.config
    dtype = jnp.dtype(config.dtype)
    layer = remat_lib.remat(DecoderLayer, config.remat, scanned=True)
    self.embed_tokens = nn.Embed(
        config.padded_vocab_size, config.hidden_size, dtype=dtype
    )
    self.layers = nn.scan(
        layer,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        length=config.num_hidden_layers,
        unroll=config.scan_unroll,
    )(config)
    self.norm = norms.RMSNorm(epsilon=config.rms_norm_eps, dtype=dtype)
    if not config.tie_word_embeddings:
      self.lm_head = _dense(
          config, config.padded_vocab_size, dot_general=_scores
      )

  def embed(self, tokens):
    """Token vectors: int32 [B, L] -> [B, L, D]."""
    return partition.constrain(self.embed_tokens(tokens))

  def __call__(self, inputs_embeds, positions, segments, cache=None):
    """Hidden states of a row of vectors; `init` makes all parameters.

    Args:
      inputs_embeds: [B, L, D] vectors of tokens or photos.
      positions: int32 [B, L] place of each vector in its own sequence.
      segments: int32 [B, L] sequence of each vector, 0 for padding, on
        whichever side.
      cache: None, or what `init_cache` or the last call returned; the L
        vectors then follow what the cache holds. Segment numbers must be
        those of the earlier calls.

    Returns:
      (hidden [B, L, D] after the last norm, cache). Hidden states of padding
      are finite and mean nothing.

    Raises:
      ValueError: L vectors cannot fit into the cache.
    """
    config = self.config
    length = inputs_embeds.shape[1]
    hidden = inputs_embeds.astype(jnp.dtype(config.dtype))
    frequencies = rope.rope_frequencies(
        config.size_per_head, config.rope_theta, dict(config.rope_scaling or ())
    )
    angles = rope.rope_angles(positions, frequencies)
    if cache is None:
      index = layers = stored = None
      mask = attention_lib.segment_mask(segments, segments)
    else:
      slots = cache['segments'].shape[1]
      if length > slots:
        raise ValueError(
            f'The cache has {slots} slots for {length} vectors; make it '
            'longer with init_cache.'
        )
      index = cache['index']
      layers = jnp.arange(config.num_hidden_layers)
      stored = (cache['key'], cache['value'])
      kv_segments = lax.dynamic_update_slice(
          cache['segments'], segments.astype(jnp.int32), (0, index)
      )
      mask = attention_lib.segment_mask(
          segments, kv_segments, index + jnp.arange(length)
      )
    (hidden, stored), _ = self.layers(
        (hidden, stored), layers, angles, mask, index
    )
    hidden = self.norm(hidden)
    if cache is not None:
      cache = {
          'key': stored[0],
          'value': stored[1],
          'segments': kv_segments,
          'index': index + length,
      }
    if self.is_initializing():
      self.embed(jnp.zeros((1, 1), jnp.int32))
      self.logits(hidden[:, :1])
    return hidden, cache

  def logits(self, hidden):
    """Scores: [..., D] -> float32 [..., V], -inf beyond `vocab_size`."""
    config = self.config
    if config.tie_word_embeddings:
      table = self.embed_tokens.embedding.astype(hidden.dtype)
      last = hidden.ndim - 1
      scores = _scores(hidden, table, (((last,), (1,)), ((), ())))
    else:
      scores = self.lm_head(hidden)
    # The vocabulary by `tensor`: a loss over it needs only sums.
    scores = partition.constrain(scores, 'tensor')
    if config.padded_vocab_size == config.vocab_size:
      return scores
    real = jnp.arange(config.padded_vocab_size) < config.vocab_size
    return jnp.where(real, scores, -jnp.inf)
