"""There and back: transformers' and diffusers' folders, and ours."""

import jax
import numpy as np
import pytest

from photochat_jax.checkpoints import (
  blip2,
  clip_text,
  files,
  llama,
  tables,
  unet,
  vae,
)
from photochat_jax.models import clip_text as clip_text_model
from photochat_jax.models import qformer, vit
from photochat_jax.models import unet as unet_model
from photochat_jax.models import vae as vae_model
from photochat_jax.models.llama import LlamaConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
import hf_compare  # noqa: E402
import hf_export  # noqa: E402
import hf_models  # noqa: E402
import random_params  # noqa: E402

BUILDERS = {
  "language": hf_models.language,
  "tied language": lambda folder, **options: hf_models.language(
    folder, tie_word_embeddings=True, **options
  ),
  "eyes": hf_models.blip2,
  "text": hf_models.text,
  "denoiser": lambda folder, **options: hf_models.denoiser(
    folder, use_linear_projection=True, **options
  ),
  "denoiser with convolutions": hf_models.denoiser,
  "autoencoder": hf_models.autoencoder,
}


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
@pytest.mark.parametrize("name", BUILDERS)
def test_what_was_read_is_written_bit_for_bit(name, shards, tmp_path):
  pair = BUILDERS[name](tmp_path / "theirs", save=shards)
  stem = files.DIFFUSION
  if isinstance(pair.oracle, transformers.PreTrainedModel):
    stem = files.MODEL
  files.write_tensors(
    tmp_path / "ours",
    tables.write(pair.table, pair.params),
    stem,
    20_000 if shards else 10**9,
  )
  written = files.Tensors(tmp_path / "ours", stem)
  assert (len(written.files) > 1) == bool(shards)
  got = {pair.table.canonical(key): np.asarray(written[key]) for key in written}
  read = files.Tensors(pair.folder, stem)
  want = {pair.table.canonical(key): np.asarray(read[key]) for key in read}
  if name == "eyes":
    assert any(key.startswith("language_model.") for key in want)
    want = {
      key: value
      for key, value in want.items()
      if not key.startswith("language_model.")
    }
  hf_compare.assert_same(got, want)


def test_transformers_opens_our_eyes_and_language_model(tmp_path):
  vision = vit.ViTConfig(
    image_size=21,
    patch_size=7,
    hidden_size=21,
    intermediate_size=30,
    num_hidden_layers=2,
    num_attention_heads=3,
    layer_norm_eps=1e-2,
  )
  queries = qformer.QFormerConfig(
    num_query_tokens=5,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    cross_attention_frequency=3,
    encoder_hidden_size=21,
  )
  language = LlamaConfig(
    vocab_size=70,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
  )
  width = language.hidden_size
  eyes = random_params.draw(hf_models.abstract_eyes(vision, queries, width))
  words = random_params.draw(hf_models.abstract(language))

  def tensors():
    yield from tables.write(blip2.table(vision, queries, True), eyes)
    for key, array in tables.write(llama.table(language), words):
      yield f"language_model.{key}", array

  files.write_tensors(tmp_path, tensors())
  content = blip2.write_config(
    vision, queries, llama.write_config(language, language.vocab_size)
  )
  files.write_json(tmp_path / "config.json", content)
  assert blip2.read_config(content) == (vision, queries)
  model = hf_export.opened(transformers.Blip2ForConditionalGeneration, tmp_path)

  pixels = np.random.default_rng(1).standard_normal((2, 21, 21, 3))
  pixels = pixels.astype(np.float32)

  @jax.jit
  def run(params):
    x = vit.ViT(vision).apply({"params": params["vision_model"]}, pixels)
    x = qformer.QFormer(queries).apply({"params": params["qformer"]}, x)
    projection = qformer.Projection(width)
    return projection.apply({"params": params["language_projection"]}, x)

  with torch.no_grad():
    want = model.get_image_features(
      hf_compare.channels_first(pixels), return_dict=True
    ).pooler_output.numpy()
  hf_compare.assert_outputs_equal(run(eyes), want)
  state = hf_compare.arrays(model.language_model)
  hf_compare.assert_same(
    state, dict(tables.write(llama.table(language), words))
  )


def test_transformers_opens_our_text_encoder(tmp_path):
  config = clip_text_model.CLIPTextConfig(
    vocab_size=50,
    hidden_size=21,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=9,
    hidden_act="gelu",
    layer_norm_eps=1e-2,
    bos_token_id=48,
    eos_token_id=49,
    pad_token_id=49,
  )
  params = random_params.draw(hf_models.abstract(config))
  table, content = clip_text.table(config), clip_text.write_config(config)
  # The names that files of the hub have, which every version opens.
  keys = tables.entries(table, params)
  assert all(key.startswith("text_model.") for key in keys)
  hf_export.publish(tmp_path, content, table, params)
  model = hf_export.opened(transformers.CLIPTextModel, tmp_path)
  ids = np.random.default_rng(1).integers(0, 50, (2, 9))
  module = clip_text_model.CLIPText(config)
  embeds = module.apply({"params": params}, ids, method="embed")
  got = jax.jit(module.apply)({"params": params}, embeds)
  with torch.no_grad():
    want = model(torch.from_numpy(ids)).last_hidden_state.numpy()
  hf_compare.assert_outputs_equal(got, want)
  numbers = {"bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 49}
  assert clip_text.read_config(content, **numbers) == config


@pytest.mark.parametrize("heads", [2, (1, 4, 3)])
def test_diffusers_opens_our_denoiser(heads, tmp_path):
  config = unet_model.UNetConfig(
    sample_size=8,
    in_channels=3,
    out_channels=5,
    block_out_channels=(8, 16, 24),
    layers_per_block=1,
    attention=(False, True, True),
    num_attention_heads=heads,
    cross_attention_dim=12,
    norm_num_groups=4,
    use_linear_projection=heads == 2,
    flip_sin_to_cos=False,
    freq_shift=1,
  )
  params = random_params.draw(hf_models.abstract(config))
  table, content = unet.table(config), unet.write_config(config)
  hf_export.publish(tmp_path, content, table, params, files.DIFFUSION)
  assert unet.read_config(content) == config
  model = hf_export.opened(diffusers.UNet2DConditionModel, tmp_path)
  rng = np.random.default_rng(1)
  latents = rng.standard_normal((1, 6, 7, 3)).astype(np.float32)
  context = rng.standard_normal((1, 4, 12)).astype(np.float32)
  timesteps = np.array([321], np.int32)
  got = jax.jit(
    unet_model.UNet(config).apply, compiler_options=hf_compare.FAST
  )({"params": params}, latents, timesteps, context)
  with torch.no_grad():
    want = model(
      hf_compare.channels_first(latents),
      torch.from_numpy(timesteps),
      torch.from_numpy(context),
    ).sample
  hf_compare.assert_outputs_equal(got, hf_compare.channels_last(want))


def test_diffusers_opens_our_autoencoder(tmp_path):
  config = vae_model.VAEConfig(
    in_channels=2,
    out_channels=4,
    latent_channels=3,
    block_out_channels=(6, 9, 12),
    layers_per_block=2,
    norm_num_groups=3,
    scaling_factor=0.5,
  )
  params = random_params.draw(hf_models.abstract(config))
  content = vae.write_config(config, sample_size=16)
  hf_export.publish(tmp_path, content, vae.table(), params, files.DIFFUSION)
  assert vae.read_config(content) == config
  model = hf_export.opened(diffusers.AutoencoderKL, tmp_path)
  assert (model.config.scaling_factor, model.config.sample_size) == (0.5, 16)
  photos = np.random.default_rng(1).uniform(-1, 1, (1, 8, 8, 2))
  photos = photos.astype(np.float32)
  got = jax.jit(vae_model.VAE(config).apply, compiler_options=hf_compare.FAST)(
    {"params": params}, photos
  )
  with torch.no_grad():
    want = model(hf_compare.channels_first(photos)).sample
  hf_compare.assert_outputs_equal(got, hf_compare.channels_last(want))
