"""What the forward pass of each part costs, kernel by kernel.

Formulas over the models' configs: tiny and seven billion parameters come from
the same ones. 1 multiply-add is 2 FLOP; what works element by element (norms,
activations, softmax, positions) counts nothing. A kernel is named by its path
in the parameters, stacked layers together, so that what a stage trains can be
told by its regexes.

Letters: D width, L tokens of a row, V padded vocabulary, h x w latents.
"""

import re

from photochat_jax.models import tiling
from photochat_jax.models.clip_text import CLIPTextConfig
from photochat_jax.models.llama import LlamaConfig
from photochat_jax.models.lora import PARTS as LORA_PARTS
from photochat_jax.models.lora import LoRAConfig
from photochat_jax.models.qformer import QFormerConfig
from photochat_jax.models.unet import UNetConfig
from photochat_jax.models.vae import VAEConfig
from photochat_jax.models.vit import ViTConfig


class Forward:
  """The cost of a part's forward pass.

  Attributes:
    part: the first name of its parameters' paths.
    kernels: FLOPs of the products with each kernel, by its path; embedding
      tables that are only looked up are there with 0.
    products: FLOPs of products of activations with each other: attention.
  """

  def __init__(self, part: str):
    self.part = part
    self.kernels: dict[str, float] = {}
    self.products = 0.0
    self._dense: dict[str, tuple[int, int, float]] = {}

  @property
  def total(self) -> float:
    """FLOPs of everything."""
    return sum(self.kernels.values()) + self.products

  def table(self, name: str) -> None:
    """Notes parameters which are looked up."""
    self.kernels[f"{self.part}/{name}"] = 0.0

  def dense(
    self, name: str, width: int, features: int, positions: float
  ) -> None:
    """Adds [positions, width] times a kernel [width, features]."""
    path = f"{self.part}/{name}"
    self._dense[path] = width, features, positions
    self._add(f"{path}/kernel", 2.0 * width * features * positions)

  def conv(
    self, name: str, width: int, features: int, positions: float
  ) -> None:
    """Adds a 3x3 convolution that gives so many pixels."""
    path = f"{self.part}/{name}/kernel"
    self._add(path, 2.0 * 9 * width * features * positions)

  def attend(self, queries: float, keys: float, width: float) -> None:
    """Adds scores and weighted sum; `width` is that of all heads."""
    self.products += 2.0 * 2 * queries * keys * width

  def adapt(self, lora: LoRAConfig) -> "Forward":
    """Adds LoRA where the config targets layers of this part."""
    if lora.rank and self.part in LORA_PARTS:
      for path, (width, features, positions) in self._dense.items():
        if any(re.fullmatch(target, path) for target in lora.targets):
          self._add(f"{path}/lora_a", 2.0 * width * lora.rank * positions)
          self._add(f"{path}/lora_b", 2.0 * lora.rank * features * positions)
    return self

  def _add(self, path: str, flops: float) -> None:
    self.kernels[path] = self.kernels.get(path, 0.0) + flops


def vision(config: ViTConfig) -> Forward:
  """The ViT on one photo."""
  out, d = Forward("vision_model"), config.hidden_size
  tokens, layers = config.num_tokens, config.num_hidden_layers
  out.dense("patch_embedding", 3 * config.patch_size**2, d, tokens - 1)
  out.table("class_embedding")
  out.table("position_embedding")
  rows = tokens * layers
  out.dense("layers/self_attn/qkv", d, 3 * d, rows)
  out.dense("layers/self_attn/projection", d, d, rows)
  out.attend(rows, tokens, d)
  out.dense("layers/mlp/fc1", d, config.intermediate_size, rows)
  out.dense("layers/mlp/fc2", config.intermediate_size, d, rows)
  return out


def qformer(config: QFormerConfig, features: int) -> Forward:
  """The Q-Former on so many features of one photo."""
  out, d = Forward("qformer"), config.hidden_size
  queries, inner = config.num_query_tokens, config.intermediate_size
  out.table("query_tokens")
  groups = config.num_hidden_layers // config.cross_attention_frequency
  rows = queries * groups

  def attention(name, keys, width):
    for part, size, count in (
      ("attention/query", d, queries),
      ("attention/key", width, keys),
      ("attention/value", width, keys),
      ("output/dense", d, queries),
    ):
      out.dense(f"{name}/{part}", size, d, count * groups)
    out.attend(rows, keys, d)

  for i in range(config.cross_attention_frequency):
    layer = f"layers/layer_{i}"
    attention(f"{layer}/attention", queries, d)
    if i == 0:
      attention(
        f"{layer}/crossattention", features, config.encoder_hidden_size
      )
    out.dense(f"{layer}/intermediate_query/dense", d, inner, rows)
    out.dense(f"{layer}/output_query/dense", inner, d, rows)
  return out


def projection(width: int, features: int, positions: int) -> Forward:
  """The linear layer into the language model, on one photo."""
  out = Forward("language_projection")
  path = "language_projection/kernel"
  out.kernels[path] = 2.0 * width * features * positions
  return out


def language(config: LlamaConfig, length: int, scored: int) -> Forward:
  """Llama on one row.

  Attention counts half: a token sees none after it. Where several dialogues
  share a row it could see fewer still; that is not taken off.

  Args:
    config: its numbers.
    length: L, tokens of the row.
    scored: positions whose logits are computed.
  """
  out, d = Forward("language_model"), config.hidden_size
  heads = config.num_attention_heads * config.size_per_head
  shared = config.num_key_value_heads * config.size_per_head
  inner, rows = config.intermediate_size, length * config.num_hidden_layers
  for name, width, features in (
    ("self_attn/q_proj", d, heads),
    ("self_attn/k_proj", d, shared),
    ("self_attn/v_proj", d, shared),
    ("self_attn/o_proj", heads, d),
    ("mlp/gate_proj", d, inner),
    ("mlp/up_proj", d, inner),
    ("mlp/down_proj", inner, d),
  ):
    out.dense(f"layers/{name}", width, features, rows)
  out.attend(rows, length / 2, heads)
  out.table("embed_tokens/embedding")
  if config.tie_word_embeddings:
    scores = 2.0 * d * config.padded_vocab_size * scored
    out.kernels["language_model/embed_tokens/embedding"] = scores
  else:
    out.dense("lm_head", d, config.padded_vocab_size, scored)
  return out


def text(config: CLIPTextConfig) -> Forward:
  """CLIP's text encoder on one caption; its attention counts in full."""
  out, d = Forward("text_model"), config.hidden_size
  slots, inner = config.max_position_embeddings, config.intermediate_size
  rows = slots * config.num_hidden_layers
  out.table("token_embedding/embedding")
  out.table("position_embedding/embedding")
  for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
    out.dense(f"layers/self_attn/{name}", d, d, rows)
  out.attend(rows, slots, d)
  out.dense("layers/mlp/fc1", d, inner, rows)
  out.dense("layers/mlp/fc2", inner, d, rows)
  return out


def unet(config: UNetConfig, context: int) -> Forward:
  """One step of the UNet on one photo's latents, with so many slots to read."""
  c, out = config, Forward("unet")
  widths, last = c.block_out_channels, len(c.block_out_channels) - 1
  time, d = 4 * widths[0], c.cross_attention_dim
  side = c.sample_size

  def resnet(name, width, level, side):
    features = widths[level]
    _resnet(out, name, width, features, side**2)
    out.dense(f"{name}/time_emb_proj", time, features, 1)

  def transformer(name, level, side):
    width, pixels = widths[level], side**2
    out.dense(f"{name}/proj_in", width, width, pixels)
    for i in range(c.transformer_layers_per_block):
      block = f"{name}/transformer_blocks_{i}"
      _attention(out, f"{block}/attn1", pixels, pixels, width, width)
      _attention(out, f"{block}/attn2", pixels, context, width, d)
      out.dense(f"{block}/ff/net_0/proj", width, 8 * width, pixels)
      out.dense(f"{block}/ff/net_2", 4 * width, width, pixels)
    out.dense(f"{name}/proj_out", width, width, pixels)

  out.dense("time_embedding/linear_1", widths[0], time, 1)
  out.dense("time_embedding/linear_2", time, time, 1)
  out.conv("conv_in", c.in_channels, widths[0], side**2)
  width, skips, sides = widths[0], [widths[0]], []
  for level, features in enumerate(widths):
    block = f"down_blocks_{level}"
    sides.append(side)
    for i in range(c.layers_per_block):
      resnet(f"{block}/resnets_{i}", width, level, side)
      if c.attention[level]:
        transformer(f"{block}/attentions_{i}", level, side)
      width = features
      skips.append(width)
    if level < last:
      side = -(-side // 2)
      out.conv(f"{block}/downsamplers_0/conv", width, width, side**2)
      skips.append(width)
  resnet("mid_block/resnets_0", width, last, side)
  transformer("mid_block/attentions_0", last, side)
  resnet("mid_block/resnets_1", width, last, side)
  for number, level in enumerate(reversed(range(last + 1))):
    block = f"up_blocks_{number}"
    for i in range(c.layers_per_block + 1):
      resnet(f"{block}/resnets_{i}", width + skips.pop(), level, sides[level])
      if c.attention[level]:
        transformer(f"{block}/attentions_{i}", level, sides[level])
      width = widths[level]
    if level:
      pixels = sides[level - 1] ** 2
      out.conv(f"{block}/upsamplers_0/conv", width, width, pixels)
  out.conv("conv_out", width, c.out_channels, sides[0] ** 2)
  return out


def vae_encoder(config: VAEConfig, side: int) -> Forward:
  """The autoencoder's encoder on one photo of so many pixels a side."""
  out, c, widths = Forward("vae"), config, config.block_out_channels
  for pixels in _tiles(c, side):
    out.conv("encoder/conv_in", c.in_channels, widths[0], pixels)
    width = widths[0]
    for level, features in enumerate(widths):
      block = f"encoder/down_blocks_{level}"
      for i in range(c.layers_per_block):
        _resnet(out, f"{block}/resnets_{i}", width, features, pixels)
        width = features
      if level < len(widths) - 1:
        pixels //= 4
        out.conv(f"{block}/downsamplers_0/conv", width, width, pixels)
    _vae_middle(out, "encoder", width, pixels)
    moments = 2 * c.latent_channels
    out.conv("encoder/conv_out", width, moments, pixels)
    out.dense("quant_conv", moments, moments, pixels)
  return out


def vae_decoder(config: VAEConfig, side: int) -> Forward:
  """The autoencoder's decoder to one photo of so many pixels a side."""
  out, c, widths = Forward("vae"), config, config.block_out_channels[::-1]
  for pixels in _tiles(c, side):
    pixels //= c.factor**2
    latents, width = c.latent_channels, widths[0]
    out.dense("post_quant_conv", latents, latents, pixels)
    out.conv("decoder/conv_in", latents, width, pixels)
    _vae_middle(out, "decoder", width, pixels)
    for level, features in enumerate(widths):
      block = f"decoder/up_blocks_{level}"
      for i in range(c.layers_per_block + 1):
        _resnet(out, f"{block}/resnets_{i}", width, features, pixels)
        width = features
      if level < len(widths) - 1:
        pixels *= 4
        out.conv(f"{block}/upsamplers_0/conv", width, width, pixels)
    out.conv("decoder/conv_out", width, c.out_channels, pixels)
  return out


def _tiles(config: VAEConfig, side: int) -> list[int]:
  """Pixels of each tile that `models.tiling` cuts a square photo into."""
  tile = config.tile_size
  if not tile or side <= tile:
    return [side**2]
  step = tile - tile // tiling.OVERLAP
  sides = [min(tile, side - start) for start in range(0, side, step)]
  return [height * width for height in sides for width in sides]


def _resnet(out, name, width, features, pixels):
  out.conv(f"{name}/conv1", width, features, pixels)
  out.conv(f"{name}/conv2", features, features, pixels)
  if width != features:
    out.dense(f"{name}/conv_shortcut", width, features, pixels)


def _attention(out, name, queries, keys, width, source):
  out.dense(f"{name}/to_q", width, width, queries)
  out.dense(f"{name}/to_k", source, width, keys)
  out.dense(f"{name}/to_v", source, width, keys)
  out.attend(queries, keys, width)
  out.dense(f"{name}/to_out_0", width, width, queries)


def _vae_middle(out, half, width, pixels):
  block = f"{half}/mid_block"
  _resnet(out, f"{block}/resnets_0", width, width, pixels)
  _attention(out, f"{block}/attentions_0", pixels, pixels, width, width)
  _resnet(out, f"{block}/resnets_1", width, width, pixels)
