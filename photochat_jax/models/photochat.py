"""The paper's model in one page: perceive -> converse -> bridge -> draw.

A dialogue's photos become visual tokens (`perceive`: ViT, Q-Former if any,
projection); the language model reads text and visual tokens and writes text
and captions (`converse`); a caption's logits cross into the text encoder of
the photo generator (`bridge`: dynamic vocabulary transformation with
straight-through Gumbel-softmax); the diffusion model draws (`denoise`,
`draw`). Nothing here holds a layer of its own.

Axis legend: B rows, L tokens, P photos in and Q photos out of a row, K visual
tokens of a photo, D language width, n caption positions, m text-encoder slots,
V language vocabulary (padded), X photos of any batch, h x w x C latents.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from photochat_jax.diffusion import samplers
from photochat_jax.diffusion import schedule as schedule_lib
from photochat_jax.models import bridge as bridge_lib
from photochat_jax.models import (
  clip_text,
  llama,
  qformer,
  tiling,
  unet,
  vae,
  vit,
)
from photochat_jax.models import lora as lora_lib

Params = dict[str, Any]

EYES = ("vision_model", "qformer", "language_projection")
"""The parts that make visual tokens of a photo."""
PARTS = (*EYES, "language_model", "text_model", "unet", "vae")


@dataclasses.dataclass(frozen=True)
class PhotoChatConfig:
  """The numbers of every part.

  `perceiver` says what stands between the ViT and the language model:

  - 'qformer': BLIP-2's Q-Former and a linear layer (the paper's version 1).
    A photo is `qformer.num_query_tokens` visual tokens.
  - 'caption': nothing. The language model reads what a captioner wrote of the
    photo, as a pipeline does; there is no ViT and no visual token.
  - 'linear': a linear layer alone (version 2). A photo is one visual token
    for each patch of the ViT, without its class token. That is how LLaVA
    (arXiv:2304.08485) projects, and MiniGPT-v2 (arXiv:2310.09478) from this
    very ViT: each token then stands for a place in the photo. The Q-Former
    reads the class token too, as one feature among those it chooses from.
  """

  vision: vit.ViTConfig
  qformer: qformer.QFormerConfig
  language: llama.LlamaConfig
  text: clip_text.CLIPTextConfig
  unet: unet.UNetConfig
  vae: vae.VAEConfig
  schedule: schedule_lib.ScheduleConfig
  bridge: bridge_lib.BridgeConfig
  perceiver: str = "qformer"
  lora: lora_lib.LoRAConfig = lora_lib.LoRAConfig()

  @property
  def absent(self) -> tuple[str, ...]:
    """The parts that stand between photos and the language model elsewhere."""
    return {"qformer": (), "linear": ("qformer",), "caption": EYES}[
      self.perceiver
    ]

  def is_moot(self, regex: str) -> bool:
    """Whether a rule stands for parameters of absent parts and no others."""
    spoken_of = {p for p in PARTS if re.fullmatch(regex, f"{p}/x")}
    return bool(spoken_of) and spoken_of <= set(self.absent)

  @property
  def num_visual_tokens(self) -> int:
    """K: the language model's tokens for a photo it sees."""
    if self.perceiver == "caption":
      return 0
    if self.perceiver == "linear":
      return self.vision.num_tokens - 1
    return self.qformer.num_query_tokens


@dataclasses.dataclass(frozen=True)
class PhotoChat:
  """The composition; every method is pure and takes the parameters.

  `params` is a plain nested dict with the parts `vision_model`, `qformer`,
  `language_projection`, less those that are `absent`, and `language_model`,
  `text_model`, `unet` and `vae`.
  """

  config: PhotoChatConfig

  @functools.cached_property
  def parts(self) -> dict[str, Any]:
    """The Flax module of each part, by its name in `params`."""
    c = self.config
    parts = {
      "vision_model": vit.ViT(c.vision),
      "qformer": qformer.QFormer(c.qformer),
      "language_projection": qformer.Projection(c.language.hidden_size),
      "language_model": llama.Llama(c.language),
      "text_model": clip_text.CLIPText(c.text),
      "unet": unet.UNet(c.unet),
      "vae": vae.VAE(c.vae),
    }
    for part in c.absent:
      del parts[part]
    return parts

  def _apply(self, params: Params, part: str, *args, method=None):
    return self.parts[part].apply(
      {"params": params[part]}, *args, method=method
    )

  def init(self, key: jax.Array) -> Params:
    """Random parameters of every part, float32."""
    c = self.config
    side = c.unet.sample_size
    ids = jnp.zeros((1, 2), jnp.int32)
    language_in = jnp.zeros((1, 2, c.language.hidden_size))
    text_in = jnp.zeros((1, 2, c.text.hidden_size))
    size = c.vision.image_size
    seen = c.vision if c.perceiver == "linear" else c.qformer
    inputs = {
      "vision_model": (jnp.zeros((1, size, size, 3)),),
      "qformer": (jnp.zeros((1, 2, c.qformer.encoder_hidden_size)),),
      "language_projection": (jnp.zeros((1, seen.hidden_size)),),
      "language_model": (language_in, ids, ids),
      "text_model": (text_in,),
      "unet": (
        jnp.zeros((1, side, side, c.unet.in_channels)),
        jnp.zeros((1,), jnp.int32),
        jnp.zeros((1, 2, c.unet.cross_attention_dim)),
      ),
      "vae": (jnp.zeros((1, *self.photo_shape)),),
    }
    keys = jax.random.split(key, len(inputs))
    params = {
      part: self.parts[part].init(k, *args)["params"]
      for k, (part, args) in zip(keys, inputs.items(), strict=True)
      if part in self.parts
    }
    # The first number that `split` has not used.
    lora_key = jax.random.fold_in(key, len(inputs))
    return lora_lib.init(c.lora, params, lora_key)

  @property
  def photo_shape(self) -> tuple[int, int, int]:
    """Height, width and channels of a photo the generator draws."""
    factor = 2 ** (len(self.config.vae.block_out_channels) - 1)
    side = self.config.unet.sample_size * factor
    return side, side, self.config.vae.in_channels

  # ---------------------------------------------------------------- perceive

  def perceive(self, params: Params, photos: jax.Array) -> jax.Array | None:
    """Photos uint8[..., H, W, 3] -> visual tokens [..., K, D], if there are."""
    if self.config.perceiver == "caption":
      return None
    lead, shape = photos.shape[:-3], photos.shape[-3:]
    pixels = vit.normalise(photos.reshape(-1, *shape))
    features = self._apply(params, "vision_model", pixels)
    if self.config.perceiver == "linear":
      features = features[:, 1:]
    else:
      features = self._apply(params, "qformer", features)
    tokens = self._apply(params, "language_projection", features)
    return tokens.reshape(*lead, *tokens.shape[1:])

  # ---------------------------------------------------------------- converse

  def converse(
    self,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    visual: jax.Array | None = None,
    visual_index: jax.Array | None = None,
    cache: dict | None = None,
  ) -> tuple[jax.Array, dict | None]:
    """Reads text and visual tokens.

    Args:
      params: the parameters.
      tokens: int32[B, L].
      positions: int32[B, L], restarting with each segment.
      segments: int32[B, L]; 0 is padding.
      visual: [B, P, K, D] from `perceive`, or None.
      visual_index: int32[B, L], which of a row's P * K visual tokens stands
        at a position, -1 for text.
      cache: the key-value cache, or None.

    Returns:
      Hidden states [B, L, D] after the last norm, and the cache.
    """
    embeds = self._apply(
      params, "language_model", tokens, method=llama.Llama.embed
    )
    if visual is not None:
      flat = visual.reshape(visual.shape[0], -1, visual.shape[-1])
      index = jnp.maximum(visual_index, 0)[..., None]
      seen = jnp.take_along_axis(flat, index, axis=1).astype(embeds.dtype)
      embeds = jnp.where((visual_index >= 0)[..., None], seen, embeds)
    return self._apply(
      params, "language_model", embeds, positions, segments, cache
    )

  def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
    """Hidden states [..., D] -> float32 logits [..., V], padding at -inf."""
    return self._apply(
      params, "language_model", hidden, method=llama.Llama.logits
    )

  # ------------------------------------------------------------------ bridge

  def bridge(
    self,
    params: Params,
    logits: jax.Array,
    caption: dict[str, jax.Array],
    vocabulary_map: dict,
    keys: jax.Array | None,
    tau: jax.Array | float,
  ) -> jax.Array:
    """A caption's logits -> embeddings the text encoder reads.

    Args:
      params: the parameters.
      logits: [X, n, V], those that predict the caption's tokens.
      caption: `tokens` int32[X, n], `mask` bool[X, n], `clip_tokens`
        int32[X, m], `alignment` [X, m, n], `final` bool[X, n].
      vocabulary_map: from `data.vocabulary.build_vocabulary_map`.
      keys: [X] keys of the Gumbel noise; None draws without noise.
      tau: temperature.

    Returns:
      [X, m, d]: exactly the text encoder's own embeddings of `clip_tokens`
      (but for `matrix='static'`), with the bridge's gradient.
    """
    return bridge_lib.cross(
      self.config.bridge,
      logits,
      caption["tokens"],
      caption["clip_tokens"],
      caption["alignment"],
      caption["final"],
      caption["mask"],
      params["text_model"]["token_embedding"]["embedding"],
      vocabulary_map,
      keys,
      tau,
    )

  # -------------------------------------------------------------------- draw

  def embed_caption(self, params: Params, clip_tokens: jax.Array) -> jax.Array:
    """Text-encoder ids [X, m] -> their embeddings [X, m, d]."""
    return self._apply(
      params, "text_model", clip_tokens, method=clip_text.CLIPText.embed
    )

  def read_caption(self, params: Params, embeddings: jax.Array) -> jax.Array:
    """Embeddings [X, m, d] -> what the UNet attends to [X, m, d]."""
    return self._apply(params, "text_model", embeddings)

  def denoise(
    self, params: Params, latents: jax.Array, t: jax.Array, context: jax.Array
  ) -> jax.Array:
    """The UNet: latents [X, h, w, C], steps [X] -> its prediction."""
    return self._apply(params, "unet", latents, t, context)

  def encode_photo(
    self, params: Params, photos: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Photos uint8[X, H, W, 3] -> mean, log-variance [X, h, w, C].

    In tiles where a side exceeds `vae.tile_size`; so does `decode_photo`.
    """
    c = self.config.vae
    encode = functools.partial(
      self._apply, params, "vae", method=vae.VAE.moments
    )
    moments = tiling.tiled(
      encode, to_signed(photos), c.tile_size, c.tile_size // c.factor
    )
    return vae.posterior(moments)

  def decode_photo(self, params: Params, latents: jax.Array) -> jax.Array:
    """Unscaled latents [X, h, w, C] -> photos in [-1, 1] [X, H, W, 3]."""
    c = self.config.vae
    decode = functools.partial(
      self._apply, params, "vae", method=vae.VAE.decode
    )
    return tiling.tiled(
      decode, latents, c.tile_size // c.factor, c.tile_size
    )

  def draw(
    self,
    params: Params,
    clip_tokens: jax.Array,
    empty_tokens: jax.Array,
    keys: jax.Array,
    latent_scale: jax.Array,
    num_steps: int,
    guidance_scale: float,
    sampler: str = "ddim",
  ) -> jax.Array:
    """Draws photos with classifier-free guidance.

    Args:
      params: the parameters (pass the averaged ones, where there are any).
      clip_tokens: int32[X, m], the captions.
      empty_tokens: int32[m], the empty caption that guidance pushes off.
      keys: [X], one for each photo, so a photo does not depend on its batch.
      latent_scale: what latents are multiplied by before the UNet sees them.
      num_steps: denoising steps.
      guidance_scale: 1 is no guidance.
      sampler: a name of `diffusion.samplers.SAMPLERS`.

    Returns:
      uint8[X, H, W, 3].
    """
    c = self.config.unet
    shape = (c.sample_size, c.sample_size, c.in_channels)
    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
    context, empty = (
      self.read_caption(params, self.embed_caption(params, ids))
      for ids in (
        clip_tokens,
        jnp.broadcast_to(empty_tokens, clip_tokens.shape),
      )
    )
    latents = samplers.sample(
      self.config.schedule,
      sampler,
      functools.partial(self.denoise, params),
      noise,
      num_steps,
      guidance_scale=guidance_scale,
      context=context,
      uncond_context=empty,
      keys=keys,
    )
    return to_uint8(self.decode_photo(params, latents / latent_scale))


def to_signed(photos: jax.Array) -> jax.Array:
  """uint8 in 0..255 -> float32 in [-1, 1]."""
  return photos.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(photos: jax.Array) -> jax.Array:
  """Float in [-1, 1] -> uint8 in 0..255, rounded."""
  return jnp.clip(jnp.round((photos + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
