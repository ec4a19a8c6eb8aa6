"""The composition against the originals' own compositions.

A photo-sharing agent is a `Blip2ForConditionalGeneration` around a Llama, and
what it draws with a `StableDiffusionPipeline`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.checkpoints import files, llama, tables
from photochat_jax.diffusion import schedule
from photochat_jax.models import (
  bridge,
  clip_text,
  photochat,
  qformer,
  unet,
  vae,
  vit,
)
from photochat_jax.models.llama import LlamaConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
import hf_compare  # noqa: E402
import hf_models  # noqa: E402


def agent(**parts):
  """A `PhotoChat` of the given configs; the parts not given are toys."""
  toys = {
    "vision": vit.ViTConfig.tiny(),
    "qformer": qformer.QFormerConfig.tiny(),
    "language": LlamaConfig.tiny(),
    "text": clip_text.CLIPTextConfig.tiny(),
    "unet": unet.UNetConfig.tiny(),
    "vae": vae.VAEConfig.tiny(),
    "schedule": schedule.ScheduleConfig.tiny(),
    "bridge": bridge.BridgeConfig(),
  }
  return photochat.PhotoChat(photochat.PhotoChatConfig(**toys | parts))


IMAGE = 69  # Where a visual token comes; no word.


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
  """(original, our agent, a function from tensors to our parameters)."""
  pair = hf_models.blip2(
    tmp_path_factory.mktemp("blip2"),
    vision={"num_hidden_layers": 2},
    queries={"num_hidden_layers": 2},
    language={"vocab_size": 70, "num_hidden_layers": 2},
    image_token_index=IMAGE,
  )
  vision, queries = pair.config
  settings = files.read_json(pair.folder / "config.json")
  language = llama.read_config(settings["text_config"])

  def read(tensors):
    start = "language_model."
    words = {
      key.removeprefix(start): tensors[key]
      for key in tensors
      if key.startswith(start)
    }
    table, shapes = llama.table(language), hf_models.abstract(language)
    return {
      **tables.read(pair.table, pair.shapes, tensors),
      "language_model": tables.read(table, shapes, words),
    }

  ours = agent(vision=vision, qformer=queries, language=language)
  return pair, ours, read


def test_scores_after_photos_and_all_gradients_equal_blip2s(speaker):
  pair, ours, read = speaker
  params = read(files.Tensors(pair.folder))
  # Two photos in the first row; one in the second, after left padding.
  seen = np.array(
    [
      [-1, 0, 1, 2, -1, -1, 3, 4, 5, -1, -1],
      [-1, -1, -1, 0, 1, 2, -1, -1, -1, -1, -1],
    ]
  )
  segments = np.ones((2, 11), np.int32)
  segments[1, :2] = 0
  positions = np.maximum(np.arange(11) - np.array([[0], [2]]), 0)
  rng = np.random.default_rng(2)
  words = rng.integers(0, IMAGE, seen.shape)
  photos = rng.integers(0, 256, (2, 2, 18, 18, 3), np.uint8)
  weights = hf_compare.cotangent((2, 11, 70), 3) * segments[..., None]

  pixels = np.asarray(vit.normalise(photos[[0, 0, 1], [0, 1, 0]]))
  want = pair.oracle(
    pixel_values=hf_compare.channels_first(pixels),
    input_ids=torch.from_numpy(np.where(seen >= 0, IMAGE, words)),
    attention_mask=torch.from_numpy(segments),
  ).logits
  (want * torch.from_numpy(weights)).sum().backward()

  def loss(params):
    visual = ours.perceive(params, photos)
    hidden, _ = ours.converse(
      params, words, positions, segments, visual, seen
    )
    got = ours.logits(params, hidden)[..., :70]
    return jnp.vdot(got, weights), got

  grads, got = jax.jit(
    jax.grad(loss, has_aux=True), compiler_options=hf_compare.FAST
  )(params)
  hf_compare.assert_outputs_equal(
    got[segments == 1], want.detach().numpy()[segments == 1]
  )
  # Down to the vision model's first layer: `assert` refuses faint ones.
  hf_compare.assert_gradients_equal(
    grads, read(hf_compare.arrays(pair.oracle, grad=True))
  )


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
  """The three pairs that draw: text encoder, UNet, autoencoder."""
  new = tmp_path_factory.mktemp
  return (
    hf_models.text(new("text"), num_hidden_layers=2),
    hf_models.denoiser(
      new("unet"), block_out_channels=(8, 16), cross_attention_dim=24
    ),
    hf_models.autoencoder(new("vae")),
  )


@pytest.mark.parametrize(
  "prediction,guidance", [("epsilon", 7.5), ("v_prediction", 1.0)]
)
def test_a_photo_drawn_is_the_pipelines(
  painter, prediction, guidance, monkeypatch
):
  text, denoiser, autoencoder = painter
  ours = agent(
    text=text.config,
    unet=denoiser.config,
    vae=autoencoder.config,
    schedule=schedule.ScheduleConfig.sd15(prediction_type=prediction),
  )
  params = {
    "text_model": text.params,
    "unet": denoiser.params,
    "vae": autoencoder.params,
  }
  rng = np.random.default_rng(4)
  captions = rng.integers(0, 50, (2, 9))
  empty = rng.integers(0, 50, 9)
  keys = jax.random.split(jax.random.key(5), 2)

  scheduler = diffusers.DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    prediction_type=prediction,
  )
  pipeline = diffusers.StableDiffusionPipeline(
    vae=autoencoder.oracle,
    text_encoder=text.oracle,
    tokenizer=None,
    unet=denoiser.oracle,
    scheduler=scheduler,
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
  )
  pipeline.set_progress_bar_config(disable=True)
  # `draw` makes its first noise so; the pipeline is given the same.
  noise = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 4)))(keys)
  with torch.no_grad():
    context, uncond = (
      text.oracle(torch.from_numpy(ids)).last_hidden_state
      for ids in (captions, np.stack([empty, empty]))
    )
  want = pipeline(
    prompt_embeds=context,
    negative_prompt_embeds=uncond,
    latents=hf_compare.channels_first(np.asarray(noise)),
    num_inference_steps=5,
    guidance_scale=guidance,
    output_type="pt",
  ).images

  # Before rounding to 256 levels, and cut to the range of the pipeline's.
  monkeypatch.setattr(photochat, "to_uint8", lambda x: x)
  got = jax.jit(
    lambda params: ours.draw(
      params,
      captions,
      empty,
      keys,
      autoencoder.config.scaling_factor,
      num_steps=5,
      guidance_scale=guidance,
    ),
    compiler_options=hf_compare.FAST,
  )(params)
  assert 0.2 < np.mean(np.abs(got) < 1)
  got = np.clip(got / 2 + 0.5, 0, 1)
  hf_compare.assert_outputs_equal(got, hf_compare.channels_last(want), 1e-3)
