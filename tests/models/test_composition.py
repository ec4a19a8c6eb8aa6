"""The composition: what stands between photos and words, and the tiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import toy_agent

from photochat_jax import config as config_lib
from photochat_jax import inputs, optim, sharding, train_step
from photochat_jax.data import pipeline
from photochat_jax.models import vae
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.state import TrainState

# Compiling is nearly all the time of these tests: do it half as well.
FAST = {"xla_backend_optimization_level": 0}


def toy(**changes):
  return PhotoChat(dataclasses.replace(toy_agent.config(), **changes))


def test_linear_perceiver_projects_the_patches_of_transformers():
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  import hf_models
  import hf_parts

  model = toy(perceiver="linear")
  numbers = dataclasses.asdict(model.config.vision)
  for name in ("dtype", "remat", "scan_unroll"):
    del numbers[name]
  eyes = transformers.Blip2VisionModel(
    transformers.Blip2VisionConfig(**numbers, attn_implementation="eager")
  )
  hf_models.randomise(eyes, 0)
  linear = hf_models.randomise(torch.nn.Linear(16, 32), 1)
  params = {
    "vision_model": hf_parts.vit_params(eyes),
    "language_projection": {
      "kernel": linear.weight.detach().numpy().T,
      "bias": linear.bias.detach().numpy(),
    },
  }
  photos = np.random.default_rng(2).integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
  mean = np.array([0.48145466, 0.4578275, 0.40821073])
  std = np.array([0.26862954, 0.26130258, 0.27577711])
  pixels = ((photos / 255 - mean) / std).reshape(6, 8, 8, 3)
  with torch.no_grad():
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
    features = eyes(pixels).last_hidden_state
    want = linear(features[:, 1:]).reshape(2, 3, 4, 32).numpy()
  assert model.config.num_visual_tokens == 4
  got = jax.jit(model.perceive, compiler_options=FAST)(params, photos)
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
  "perceiver, tokens, width", [("qformer", 2, 20), ("linear", 4, 24)]
)
def test_parts_and_shapes_are_those_of_the_perceiver(perceiver, tokens, width):
  c = toy_agent.config()
  model = toy(
    perceiver=perceiver,
    vision=dataclasses.replace(c.vision, hidden_size=24),
    qformer=dataclasses.replace(
      c.qformer, hidden_size=20, encoder_hidden_size=24
    ),
  )
  params = jax.eval_shape(model.init, jax.random.key(0))
  assert set(params) == set(model.parts)
  assert ("qformer" in params) == (perceiver == "qformer")
  assert params["language_projection"]["kernel"].shape == (width, 32)
  photos = jnp.zeros((3, 2, 8, 8, 3), jnp.uint8)
  seen = jax.eval_shape(model.perceive, params, photos)
  assert seen.shape == (3, 2, tokens, 32)
  assert model.config.num_visual_tokens == tokens
  # The photo's tokens fit the batch that is laid out for them.
  base = small_run.run_config()
  run = dataclasses.replace(base, model=model.config)
  assert inputs.data_spec(run, 1).num_visual_tokens == tokens


def test_other_parts_begin_the_same_without_a_qformer():
  def words(perceiver):
    model = toy(perceiver=perceiver)
    return jax.jit(
      lambda key: model.init(key)["text_model"], compiler_options=FAST
    )(jax.random.key(3))

  jax.tree.map(
    np.testing.assert_array_equal, words("linear"), words("qformer")
  )


def test_linear_perceiver_learns_from_words(tmp_path):
  stage = dataclasses.replace(
    small_run.stages(6)[2],
    trainable=(small_run.EYES,),
    losses=config_lib.StageLosses(text=1.0, caption=1.0),
  )
  run = small_run.run_config()
  run = dataclasses.replace(
    run,
    model=dataclasses.replace(run.model, perceiver="linear"),
    stages=(stage,),
    optim=dataclasses.replace(
      run.optim, learning_rate=1e-2, warmup_steps=0, weight_decay=0.0
    ),
  )
  run = config_lib.build(run.as_dict())
  model = PhotoChat(run.model)
  llm, clip = inputs.load_tokenizers(run)
  data = pipeline.Pipeline(
    small_run.train_dialogues(tmp_path),
    "dialogues",
    inputs.data_spec(run, 2),
    llm,
    clip,
  )
  batch = next(
    b for b in map(data.batch, range(20)) if (b["visual_index"] >= 0).any()
  )
  # Each photo of a row takes as many of its places as it has patches.
  assert ((batch["visual_index"] >= 0).sum(1) % 4 == 0).all()

  params = toy_agent.random_params(model)
  trainable, _ = optim.split(params, stage.trainable)
  optimizer = optim.make_optimizer(run.optim, run.health, stage, trainable)
  state = TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(trainable),
    ema={},
    latent_scale=jnp.float32(1),
  )
  mesh = sharding.make_mesh()
  nats = []
  with jax.set_mesh(mesh):
    step = jax.jit(
      train_step.make_train_step(
        model, run, 0, 0, optimizer, clip.encode_padded(""), None, None, mesh
      ),
      compiler_options=FAST,
    )
    for _ in range(6):
      state, metrics = step(state, batch)
      nats.append(float(metrics["text_nats"] + metrics["caption_nats"]))
  assert nats[-1] < nats[0] - 1
  # Without weight decay only a gradient moves a parameter.
  for part in ("vision_model", "language_projection"):
    jax.tree.map(
      lambda old, new: np.testing.assert_array_less(
        0, np.abs(new - old).max()
      ),
      params[part],
      state.params[part],
    )


@pytest.mark.parametrize("tile_size", [0, 8])
def test_photos_larger_than_a_tile_are_those_of_diffusers(tile_size):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  import hf_models
  import hf_parts

  config = vae.VAEConfig.tiny(
    block_out_channels=(8, 8), norm_num_groups=4, tile_size=tile_size
  )
  oracle = diffusers.AutoencoderKL(
    block_out_channels=(8, 8),
    norm_num_groups=4,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    sample_size=tile_size,
  )
  hf_models.randomise(oracle, 5)
  if tile_size:
    oracle.enable_tiling()
  model = toy(vae=config)
  params = {"vae": hf_parts.conv_params(oracle.state_dict())}
  rng = np.random.default_rng(6)
  photos = rng.integers(0, 256, (2, 10, 8, 3), np.uint8)
  latents = rng.normal(size=(2, 5, 4, 4)).astype(np.float32)

  def channels_first(x):
    return torch.tensor(x.transpose(0, 3, 1, 2).astype(np.float32))

  with torch.no_grad():
    known = oracle.encode(channels_first(photos) / 127.5 - 1).latent_dist
    drawn = oracle.decode(channels_first(latents)).sample
  got = jax.jit(
    lambda p: (*model.encode_photo(p, photos), model.decode_photo(p, latents)),
    compiler_options=FAST,
  )(params)
  for ours, theirs in zip(
    got, (known.mean, known.logvar, drawn), strict=True
  ):
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
