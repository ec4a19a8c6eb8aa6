"""The published checkpoints, whole, without their weights.

From the `config.json` of each the original's own class is built on torch's
meta device, where tensors have names and shapes and no memory, and each must
have its place in our module of the size we call by that name.
"""

import dataclasses

import jax
import pytest

from photochat_jax.checkpoints import blip2, clip_text, llama, tables, unet, vae
from photochat_jax.models.clip_text import CLIPTextConfig
from photochat_jax.models.llama import LlamaConfig
from photochat_jax.models.qformer import QFormerConfig
from photochat_jax.models.unet import UNetConfig
from photochat_jax.models.vae import VAEConfig
from photochat_jax.models.vit import ViTConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
import hf_models  # noqa: E402
import hub_configs  # noqa: E402

# Name: (parameters, our name of the size).
LANGUAGE = {
  "meta-llama/Llama-2-7b-hf": (6_738_415_616, LlamaConfig.llama2_7b()),
  "meta-llama/Llama-2-13b-hf": (13_015_864_320, LlamaConfig.llama2_13b()),
  "meta-llama/Llama-3.2-1B": (1_235_814_400, LlamaConfig.llama32_1b()),
  "HuggingFaceTB/SmolLM2-135M": (134_515_008, LlamaConfig.smollm2_135m()),
  "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (
    1_100_048_384,
    LlamaConfig(
      hidden_size=2048,
      intermediate_size=5632,
      num_hidden_layers=22,
      num_key_value_heads=4,
      max_position_embeddings=2048,
    ),
  ),
}
TEXT = {
  "stable-diffusion-v1-5": (123_060_480, CLIPTextConfig.sd15()),
  "stable-diffusion-2-1": (340_387_840, CLIPTextConfig.sd21()),
}
UNET = {
  "stable-diffusion-v1-5": (859_520_964, UNetConfig.sd15()),
  "stable-diffusion-2-1-base": (865_910_724, UNetConfig.sd21()),
  "stable-diffusion-2-1": (865_910_724, UNetConfig.sd21(sample_size=96)),
}


def on_meta(make):
  """A torch module's tensors by name, shapes only; and its parameters."""
  with torch.device("meta"):
    model = make()
  count = sum(value.numel() for value in model.parameters())
  return dict(model.state_dict()), count


def count(shapes):
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def assert_every_tensor_has_its_place(table, shapes, tensors):
  # Raises if a tensor is missing, unknown or of another shape.
  wanted, names = tables.match(table, shapes, tensors)
  assert set(wanted) == set(names)
  return names


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name):
  settings = hub_configs.LANGUAGE[name]
  parameters, ours = LANGUAGE[name]
  config = llama.read_config(settings)
  assert config == ours
  tensors, theirs = on_meta(
    lambda: transformers.LlamaForCausalLM(
      transformers.LlamaConfig.from_dict(settings)
    )
  )
  shapes = hf_models.abstract(config)
  assert theirs == count(shapes) == parameters
  # Published in 2023 with a buffer that is no parameter.
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.empty(64)
  assert_every_tensor_has_its_place(llama.table(config), shapes, tensors)


@pytest.mark.parametrize("name", hub_configs.BLIP2)
def test_eyes(name):
  settings = hub_configs.BLIP2[name]
  vision, queries = blip2.read_config(settings)
  assert vision == ViTConfig.eva_g()
  assert queries == QFormerConfig.blip2()
  tensors, _ = on_meta(
    lambda: transformers.Blip2ForConditionalGeneration(
      transformers.Blip2Config.from_dict(settings)
    )
  )
  shapes = hf_models.abstract_eyes(vision, queries)
  names = assert_every_tensor_has_its_place(
    blip2.table(vision, queries), shapes, tensors
  )
  ignored = {key.split(".")[0] for key in tensors.keys() - names.values()}
  assert ignored == {"language_model", "language_projection"}
  for part, starts, parameters in (
    ("vision_model", ("vision_model.",), 985_952_256),
    ("qformer", ("qformer.", "query_tokens"), 105_162_240),
  ):
    theirs = sum(
      value.numel() for key, value in tensors.items() if key.startswith(starts)
    )
    assert theirs == count(shapes[part]) == parameters


@pytest.mark.parametrize("name", TEXT)
def test_text_encoders(name):
  settings = hub_configs.TEXT[name]
  parameters, ours = TEXT[name]
  config = clip_text.read_config(settings)
  # The ids are the tokenizer's; the config has wrong ones.
  assert config == dataclasses.replace(ours, pad_token_id=config.pad_token_id)
  tensors, theirs = on_meta(
    lambda: transformers.CLIPTextModel(
      transformers.CLIPTextConfig.from_dict(settings)
    )
  )
  shapes = hf_models.abstract(config)
  assert theirs == count(shapes) == parameters
  # The hub's names, and a buffer of numbers.
  tensors = {f"text_model.{key}": value for key, value in tensors.items()}
  numbers = torch.empty((1, 77), dtype=torch.int64)
  tensors["text_model.embeddings.position_ids"] = numbers
  assert_every_tensor_has_its_place(clip_text.table(config), shapes, tensors)


@pytest.mark.parametrize("name", UNET)
def test_denoisers(name):
  settings = hub_configs.UNET[name]
  parameters, ours = UNET[name]
  config = unet.read_config(settings)
  assert config == ours
  tensors, theirs = on_meta(
    lambda: diffusers.UNet2DConditionModel.from_config(settings)
  )
  shapes = hf_models.abstract(config)
  assert theirs == count(shapes) == parameters
  assert_every_tensor_has_its_place(unet.table(config), shapes, tensors)


@pytest.mark.parametrize("name", hub_configs.VAE)
def test_autoencoders(name):
  settings = hub_configs.VAE[name]
  config = vae.read_config(settings)
  assert config == VAEConfig.sd15()
  assert config.factor == 8
  tensors, theirs = on_meta(
    lambda: diffusers.AutoencoderKL.from_config(settings)
  )
  shapes = hf_models.abstract(config)
  assert theirs == count(shapes) == 83_653_863
  # The names of 2022, which the published files have.
  renamed = {}
  for key, value in tensors.items():
    for new, old in (
      ("to_q", "query"),
      ("to_k", "key"),
      ("to_v", "value"),
      ("to_out.0", "proj_attn"),
    ):
      key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    renamed[key] = value
  assert len(renamed.keys() - tensors.keys()) == 16
  assert_every_tensor_has_its_place(vae.table(), shapes, renamed)
