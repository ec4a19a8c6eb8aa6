"""A model of a few thousand parameters and a word tokenizer to talk with."""

import types

import jax
import numpy as np

from photochat_jax import generate
from photochat_jax.data.spec import DataSpec
from photochat_jax.diffusion.schedule import ScheduleConfig
from photochat_jax.models import (
  bridge,
  clip_text,
  llama,
  qformer,
  unet,
  vae,
  vit,
)
from photochat_jax.models.photochat import PhotoChat, PhotoChatConfig

WORDS = "<pad> <s> </s> [img] [/img] a b c d e f g h".split()
PAD, BOS, EOS, IMG, END = range(5)
A, B, C = 5, 6, 7

SETTINGS = types.SimpleNamespace(
  batch_size=2,
  max_new_tokens=6,
  sampler="ddim",
  sampler_steps=2,
  guidance=2.0,
)


class WordTokenizer:
  """One id per word; control words come from ids only."""

  pad_id, bos_id, eos_id, img_id, end_img_id = range(5)

  def encode(self, text):
    return [WORDS.index(word, 5) for word in text.split()]

  def decode(self, ids):
    return " ".join(WORDS[i] for i in ids if i > END)


class LetterTokenizer:
  """A text encoder's: one piece a letter, eight slots."""

  max_length = 8

  def encode_padded(self, text):
    ids = [1, *(3 + ord(c) % 50 for c in text), 2][:8]
    return np.asarray(ids + [0] * (8 - len(ids)), np.int32)


def config(vocab_size=13, text_vocab_size=64, slots=8):
  """Every part at its smallest."""
  return PhotoChatConfig(
    vision=vit.ViTConfig.tiny(
      image_size=8, patch_size=4, hidden_size=16, intermediate_size=16,
      num_hidden_layers=1, num_attention_heads=2,
    ),
    qformer=qformer.QFormerConfig.tiny(
      num_query_tokens=2, hidden_size=16, num_hidden_layers=2,
      num_attention_heads=2, intermediate_size=16, encoder_hidden_size=16,
    ),
    language=llama.LlamaConfig.tiny(
      vocab_size=vocab_size, hidden_size=32, intermediate_size=32,
      num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    ),
    text=clip_text.CLIPTextConfig.tiny(
      vocab_size=text_vocab_size, hidden_size=16, intermediate_size=16,
      num_hidden_layers=1, num_attention_heads=2,
      max_position_embeddings=slots, bos_token_id=text_vocab_size - 2,
      eos_token_id=text_vocab_size - 1, pad_token_id=text_vocab_size - 1,
    ),
    unet=unet.UNetConfig.tiny(
      sample_size=4, block_out_channels=(8, 8), cross_attention_dim=16,
      num_attention_heads=1, norm_num_groups=4,
    ),
    vae=vae.VAEConfig.tiny(block_out_channels=(8, 8), norm_num_groups=4),
    schedule=ScheduleConfig(),
    bridge=bridge.BridgeConfig(),
  )  # fmt: skip


def random_params(model, seed=0):
  """Parameters of unit-variance layers, without compiling `init`."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key == "scale":
      return np.ones(leaf.shape, np.float32)
    if path[-1].key == "embedding":
      return rng.normal(size=leaf.shape).astype(np.float32)
    fan = np.prod(leaf.shape[-2:-1]) if len(leaf.shape) > 1 else 100
    return rng.normal(size=leaf.shape, scale=fan**-0.5).astype(np.float32)

  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def spec(model, **changes):
  numbers = dict(
    batch_size=2,
    length=24,
    photos_in=2,
    photos_out=2,
    num_visual_tokens=model.config.num_visual_tokens,
    vision_size=model.config.vision.image_size,
    photo_size=model.photo_shape[0],
    caption_tokens=3,
    template="bare",
  )
  return DataSpec(**(numbers | changes))


def generator(model, params, **changes):
  """A `Generator` of words; `changes` are its other arguments."""
  arguments = dict(
    llm_tokenizer=WordTokenizer(),
    clip_tokenizer=LetterTokenizer(),
    spec=spec(model),
    settings=SETTINGS,
  )
  return generate.Generator(model, params, **(arguments | changes))


def script(monkeypatch, prompt_length, lines, vocab_size=13):
  """Makes the model want to write `lines`, whatever it reads.

  Each line, one for a row, is a list of steps; a step is a list of ids, the
  first wish first. Prompts must have `prompt_length` tokens. Call
  `jax.clear_caches` before and after.
  """
  steps = max(len(line) for line in lines) + 1
  table = np.zeros((len(lines), steps, vocab_size), np.float32)
  for row, line in enumerate(lines):
    for step, wishes in enumerate(line):
      table[row, step, wishes] = 10 - np.arange(len(wishes))

  def converse(self, params, tokens, positions, *_, cache=None):
    return positions[..., None], cache

  def logits(self, params, hidden):
    step = jax.numpy.clip(hidden[:, 0] - (prompt_length - 1), 0, steps - 1)
    rows = jax.numpy.arange(len(step))
    return jax.numpy.asarray(table)[rows, step]

  monkeypatch.setattr(PhotoChat, "converse", converse)
  monkeypatch.setattr(PhotoChat, "logits", logits)
