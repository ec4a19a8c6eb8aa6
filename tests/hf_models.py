"""Tiny random models of transformers and diffusers, each beside ours.

They are the originals that `tests/parity` compares with: built by their own
classes, every parameter drawn anew, saved by their own `save_pretrained` and
read by our tables. So a table is tested by the numbers that come out of the
model, and those are torch's.

Every builder takes the differences from its tiny config, and as dicts `ours`,
fields that only our config has, `draw`, arguments of `randomise`, and `save`,
arguments of `save_pretrained`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from photochat_jax.checkpoints import blip2 as blip2_files
from photochat_jax.checkpoints import clip_text as clip_text_files
from photochat_jax.checkpoints import files, tables
from photochat_jax.checkpoints import llama as llama_files
from photochat_jax.checkpoints import unet as unet_files
from photochat_jax.checkpoints import vae as vae_files
from photochat_jax.models import clip_text, llama, qformer, unet, vae, vit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")


def randomise(model, seed=1, kernel_scale=1.0, loud=None):
  """Draws every parameter anew: fresh ones hide bugs behind zeros and ones.

  Activations stay near 1 at any depth: matrices get the standard deviation
  1 / sqrt(fan in), scales of norms the mean 1.

  Args:
    model: a torch module, changed in place.
    seed: of the draws.
    kernel_scale: a small one makes activations so faint that the epsilons of
      norms show.
    loud: parameters with this in their name keep the scale 1.

  Returns:
    The model, in evaluation mode.
  """
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, value in model.named_parameters():
      noise = torch.randn(value.shape, generator=generator)
      if "norm" in name.lower() and value.ndim == 1:
        value.copy_(0.3 * noise + name.endswith("weight"))
        continue
      std = 0.3 if value.ndim < 2 else value[0].numel() ** -0.5
      scale = 1.0 if loud and loud in name else kernel_scale
      value.copy_(noise * std * scale)
  return model.eval()


def abstract(config):
  """Shapes of the parameters of our module with this config."""

  def vectors(*shape):
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32)

  def numbers(*shape):
    return jax.ShapeDtypeStruct((1, *shape), jnp.int32)

  c = config
  if isinstance(c, llama.LlamaConfig):
    module = llama.Llama(c)
    inputs = vectors(2, c.hidden_size), numbers(2), numbers(2)
  elif isinstance(c, vit.ViTConfig):
    module, inputs = vit.ViT(c), [vectors(c.image_size, c.image_size, 3)]
  elif isinstance(c, qformer.QFormerConfig):
    module = qformer.QFormer(c)
    inputs = [vectors(2, c.encoder_hidden_size)]
  elif isinstance(c, clip_text.CLIPTextConfig):
    module, inputs = clip_text.CLIPText(c), [vectors(2, c.hidden_size)]
  elif isinstance(c, unet.UNetConfig):
    side = 2 ** len(c.block_out_channels)
    module = unet.UNet(c)
    inputs = (
      vectors(side, side, c.in_channels),
      numbers(),
      vectors(2, c.cross_attention_dim),
    )
  else:
    module, side = vae.VAE(c), 2 * c.factor
    inputs = [vectors(side, side, c.in_channels)]
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def abstract_eyes(vision, queries, width=None):
  """Shapes of the parts that `checkpoints.blip2.table` speaks of.

  Args:
    vision: config of the vision model.
    queries: config of the Q-Former.
    width: of the language model; None leaves the projection out.
  """
  shapes = {"vision_model": abstract(vision), "qformer": abstract(queries)}
  if width is not None:
    shapes["language_projection"] = {
      "kernel": jax.ShapeDtypeStruct((queries.hidden_size, width), jnp.float32),
      "bias": jax.ShapeDtypeStruct((width,), jnp.float32),
    }
  return shapes


@dataclasses.dataclass(frozen=True)
class Pair:
  """An original and ours, read from the folder that the original wrote.

  Attributes:
    oracle: the torch module.
    folder: where it was saved.
    config: ours; two for BLIP-2, vision model and Q-Former.
    table: which read the folder.
    shapes: of our parameters.
    params: ours.
  """

  oracle: Any
  folder: Any
  config: Any
  table: tables.Table
  shapes: Any
  params: Any


def _pair(
  oracle, folder, part, table, ours, draw, save, stem, shapes=abstract
):
  randomise(oracle, **draw or {})
  oracle.save_pretrained(folder, **save or {})
  config = part.read_config(files.read_json(folder / "config.json"))
  if isinstance(config, tuple):
    config = tuple(dataclasses.replace(c, **ours or {}) for c in config)
  else:
    config = dataclasses.replace(config, **ours or {})
  table, shapes = table(config), shapes(config)
  params = tables.read(table, shapes, files.Tensors(folder, stem))
  return Pair(oracle, folder, config, table, shapes, params)


LANGUAGE = {
  "model_type": "llama",
  "vocab_size": 150,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5,
}


def language(folder, ours=None, draw=None, save=None, **changes):
  """`LlamaForCausalLM`; the changes may be of any version's config.json."""
  config = transformers.LlamaConfig.from_dict(LANGUAGE | changes)
  return _pair(
    transformers.LlamaForCausalLM(config),
    folder,
    llama_files,
    llama_files.table,
    ours,
    draw,
    save,
    files.MODEL,
  )


VISION = {
  "model_type": "blip_2_vision_model",
  "image_size": 18,
  "patch_size": 6,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
}
QFORMER = {
  "model_type": "blip_2_qformer",
  "vocab_size": 11,
  "hidden_size": 20,
  "num_hidden_layers": 4,
  "num_attention_heads": 2,
  "intermediate_size": 36,
  "cross_attention_frequency": 2,
  "encoder_hidden_size": 24,
}


def blip2(
  folder,
  vision=None,
  queries=None,
  language=None,
  ours=None,
  draw=None,
  save=None,
  **changes,
):
  """`Blip2ForConditionalGeneration` with a Llama; its eyes and projection.

  The first three dicts are the differences of its three models.
  """
  words = LANGUAGE | (language or {})
  config = transformers.Blip2Config(
    vision_config=VISION | (vision or {}),
    qformer_config=QFORMER | (queries or {}),
    text_config=words,
    **{"num_query_tokens": 3} | changes,
  )
  return _pair(
    transformers.Blip2ForConditionalGeneration(config),
    folder,
    blip2_files,
    lambda config: blip2_files.table(*config, projection=True),
    ours,
    draw,
    save,
    files.MODEL,
    lambda config: abstract_eyes(*config, words["hidden_size"]),
  )


TEXT = {
  "vocab_size": 50,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "max_position_embeddings": 9,
}


def text(folder, ours=None, draw=None, save=None, **changes):
  """`CLIPTextModel`."""
  config = transformers.CLIPTextConfig(**TEXT | changes)
  return _pair(
    transformers.CLIPTextModel(config),
    folder,
    clip_text_files,
    clip_text_files.table,
    ours,
    draw,
    save,
    files.MODEL,
  )


UNET = {
  "sample_size": 8,
  "block_out_channels": (16, 32),
  "layers_per_block": 1,
  "attention_head_dim": 2,
  "cross_attention_dim": 12,
  "norm_num_groups": 4,
}


def denoiser(
  folder, attention=(True, False), ours=None, draw=None, save=None, **changes
):
  """`UNet2DConditionModel`; `attention` says which levels have it."""
  down = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
  up = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
  oracle = diffusers.UNet2DConditionModel(
    down_block_types=[down[has] for has in attention],
    up_block_types=[up[has] for has in reversed(attention)],
    **UNET | changes,
  )
  return _pair(
    oracle,
    folder,
    unet_files,
    unet_files.table,
    ours,
    draw,
    save,
    files.DIFFUSION,
  )


VAE = {
  "block_out_channels": (8, 16),
  "layers_per_block": 1,
  "norm_num_groups": 4,
}


def autoencoder(folder, ours=None, draw=None, save=None, **changes):
  """`AutoencoderKL`."""
  numbers = VAE | changes
  blocks = len(numbers["block_out_channels"])
  oracle = diffusers.AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * blocks,
    up_block_types=("UpDecoderBlock2D",) * blocks,
    **numbers,
  )
  return _pair(
    oracle,
    folder,
    vae_files,
    lambda config: vae_files.table(),
    ours,
    draw,
    save,
    files.DIFFUSION,
  )
