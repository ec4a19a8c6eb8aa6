"""Formulas against the products in the jaxprs of the real modules."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import pytest

from photochat_jax import captions, objective, optim
from photochat_jax.config import DataConfig, RunConfig, StageConfig, StageLosses
from photochat_jax.data import spec
from photochat_jax.diffusion.schedule import ScheduleConfig
from photochat_jax.models.bridge import BridgeConfig
from photochat_jax.models.clip_text import CLIPTextConfig
from photochat_jax.models.llama import Llama, LlamaConfig
from photochat_jax.models.lora import LoRAConfig
from photochat_jax.models.photochat import PhotoChat, PhotoChatConfig
from photochat_jax.models.qformer import QFormerConfig
from photochat_jax.models.unet import UNetConfig
from photochat_jax.models.vae import VAEConfig
from photochat_jax.models.vit import ViTConfig
from photochat_jax.ops import partition
from photochat_jax.runtime import flops

LENGTH = 1024
FULL = PhotoChatConfig(
  vision=ViTConfig.eva_g(),
  qformer=QFormerConfig.blip2(),
  language=LlamaConfig.llama2_7b(),
  text=CLIPTextConfig.sd21(),
  unet=UNetConfig.sd21(),
  vae=VAEConfig.sd15(),
  schedule=ScheduleConfig.sd21(),
  bridge=BridgeConfig(draw="gumbel", max_tokens=96),
)
# performance.md's table, GFLOP; a row's tokens for the language model.
PUBLISHED = {
  "vision_model": 521,
  "qformer": 12.7,
  "language_model": 13.5 * LENGTH,
  "text_model": 45.1,
  "unet": 804,
  "vae_encoder": 1117,
  "vae_decoder": 2515,
}
SD15 = dataclasses.replace(
  FULL, text=CLIPTextConfig.sd15(), unet=UNetConfig.sd15()
)
# All that the published sizes do not have.
ODD = PhotoChatConfig(
  vision=ViTConfig.tiny(),
  qformer=QFormerConfig.tiny(
    num_hidden_layers=6, cross_attention_frequency=3
  ),
  language=LlamaConfig.tiny(
    vocab_size=600, tie_word_embeddings=True, head_dim=48
  ),
  text=CLIPTextConfig.tiny(),
  unet=UNetConfig.tiny(
    sample_size=14,
    block_out_channels=(32, 64, 96),
    layers_per_block=2,
    attention=(False, True, True),
    num_attention_heads=(1, 2, 4),
    transformer_layers_per_block=2,
  ),
  vae=VAEConfig.tiny(layers_per_block=2, tile_size=32),
  schedule=ScheduleConfig(),
  bridge=BridgeConfig(),
  lora=LoRAConfig(rank=8, targets=("language_model/.*/(q_proj|down_proj)",)),
)


def count(function, *args, causal=None):
  """FLOPs of the matrix products and convolutions in a function's jaxpr.

  Args:
    function: traced, not run.
    *args: shapes of arrays.
    causal: tokens of a row; products of activations along them count half.
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr, causal)


def _count(jaxpr, causal):
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "conv_general_dilated"):
      left, right = (v.aval.shape for v in equation.invars)
      made = 2.0 * math.prod(equation.outvars[0].aval.shape)
      if name == "dot_general":
        (contracted, _), (batched, _) = params["dimension_numbers"]
        made *= math.prod(left[axis] for axis in contracted)
        if batched and causal in (*left, *right):
          made /= 2
      else:
        axes = params["dimension_numbers"].rhs_spec[1:]
        made *= math.prod(right[axis] for axis in axes)
        # Zeros between pixels, in the gradient of a stride, are no work.
        made /= math.prod(params["lhs_dilation"])
      total += made
      continue
    assert name not in ("while", "cond")
    times = params["length"] if name == "scan" else 1
    for value in params.values():
      for inner in value if isinstance(value, tuple | list) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          total += times * _count(inner, causal)
  return total


def array(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


@functools.cache
def parameters(config):
  return jax.eval_shape(PhotoChat(config).init, jax.random.key(0))


def in_jaxpr(config, part):
  """FLOPs of one photo, row or caption through a part."""
  c, model, params = config, PhotoChat(config), parameters(config)
  side, slots = c.unet.sample_size, c.text.max_position_embeddings
  latents = array(1, side, side, c.vae.latent_channels)
  if part == "vae_encoder":
    photo = array(1, *model.photo_shape, dtype=jnp.uint8)
    return count(model.encode_photo, params, photo)
  if part == "vae_decoder":
    return count(model.decode_photo, params, latents)
  seen = array(1, c.vision.num_tokens, c.vision.hidden_size)
  pixels = array(1, c.vision.image_size, c.vision.image_size, 3)
  row = array(1, LENGTH, c.language.hidden_size)
  ids = array(1, LENGTH, dtype=jnp.int32)
  queries = array(1, c.qformer.num_query_tokens, c.qformer.hidden_size)
  context = array(1, slots, c.text.hidden_size)

  def apply(*args, **kwargs):
    module = model.parts[part]
    return count(
      lambda p, *a: module.apply({"params": p}, *a, **kwargs),
      params[part],
      *args,
      causal=LENGTH if part == "language_model" else None,
    )

  if part == "language_model":
    return apply(row, ids, ids) + apply(row, method=Llama.logits)
  args = {
    "vision_model": (pixels,),
    "qformer": (seen,),
    "language_projection": (
      seen if c.perceiver == "linear" else queries,
    ),
    "text_model": (context,),
    "unet": (latents, array(1, dtype=jnp.int32), context),
  }
  return apply(*args[part])


@pytest.mark.parametrize("part", flops.forward_flops(FULL, LENGTH))
def test_full_size_counts_as_the_modules_do(part):
  found = flops.forward_flops(FULL, LENGTH)[part]
  assert found == pytest.approx(in_jaxpr(FULL, part), rel=1e-6)
  if part in PUBLISHED:
    assert found == pytest.approx(PUBLISHED[part] * 1e9, rel=5e-3)


def test_stable_diffusion_1_counts_as_published():
  found = flops.forward_flops(SD15, LENGTH)
  assert found["unet"] == pytest.approx(803e9, rel=2e-3)
  assert found["text_model"] == pytest.approx(13.3e9, rel=2e-3)


@pytest.mark.parametrize("part", flops.forward_flops(ODD, LENGTH))
def test_odd_sizes_count_as_the_modules_do(part):
  found = flops.forward_flops(ODD, LENGTH)[part]
  assert found == pytest.approx(in_jaxpr(ODD, part), rel=1e-6)


def test_without_a_qformer_every_patch_is_projected():
  linear = dataclasses.replace(FULL, perceiver="linear")
  found = flops.forward_flops(linear, LENGTH)
  assert "qformer" not in found
  assert found["language_projection"] == 2 * 1408 * 4096 * 256


def test_what_is_read_is_not_looked_at():
  reads = dataclasses.replace(FULL, perceiver="caption")
  found = flops.forward_flops(reads, LENGTH)
  whole = flops.forward_flops(FULL, LENGTH)
  eyes = {"vision_model", "qformer", "language_projection"}
  assert set(whole) - set(found) == eyes
  assert found["language_model"] == whole["language_model"]


@pytest.mark.parametrize("config", [FULL, ODD], ids=["full", "odd"])
def test_every_kernel_is_counted_by_its_path(config):
  leaves = partition.flatten(parameters(config))
  costs = flops.forward_costs(config, LENGTH)
  counted = {path for cost in costs.values() for path in cost.kernels}
  assert counted <= set(leaves)
  small = ("bias", "scale", "lora_scale")
  assert {p for p in leaves if p.rpartition("/")[2] not in small} == counted


# ------------------------------------------------------------------ training

JOINT = StageLosses(text=1.0, caption=1.0, photo=1.0)
# As in configs/photochat.py.
EYES = "(qformer|language_projection)/.*"
PAPER = (
  "language_model/.*/lora_(a|b)",
  "language_model/(embed_tokens|lm_head)/.*",
  EYES,
  "unet/.*",
)
LORA = dataclasses.replace(FULL, lora=LoRAConfig(rank=32))
# Long enough that the two ends of a network do not matter.
SMALL = PhotoChatConfig(
  vision=ViTConfig.tiny(image_size=64, num_hidden_layers=12),
  qformer=QFormerConfig.tiny(num_hidden_layers=8, cross_attention_frequency=4),
  language=LlamaConfig.tiny(hidden_size=64, num_hidden_layers=16),
  text=CLIPTextConfig.tiny(num_hidden_layers=8, max_position_embeddings=16),
  unet=UNetConfig.tiny(),
  vae=VAEConfig.tiny(),
  schedule=ScheduleConfig(),
  bridge=BridgeConfig(max_tokens=24),
)


def a_run(model, stage, **data):
  """A run of one stage."""
  given = {"length": 192, "photos_in": 2, "photos_out": 2} | data
  return RunConfig(model=model, data=DataConfig(**given), stages=(stage,))


def step_in_jaxpr(run):
  """FLOPs of the gradient of the real loss of a run's stage."""
  model, (stage,), c = PhotoChat(run.model), run.stages, run.model
  data, slots = run.data, c.text.max_position_embeddings
  shape = spec.DataSpec(
    batch_size=stage.batch_size,
    length=data.length,
    photos_in=data.photos_in,
    photos_out=data.photos_out,
    num_visual_tokens=c.num_visual_tokens,
    vision_size=c.vision.image_size,
    photo_size=model.photo_shape[0],
    caption_tokens=c.bridge.max_tokens,
  )
  batch = {
    name: array(stage.batch_size, *shape, dtype=dtype)
    for name, (shape, dtype) in spec.element_spec(
      shape, stage.data, slots
    ).items()
  }
  for name in ("caption_tokens", "clip_tokens", "alignment", "caption_final"):
    if name in batch:  # As the first of two passes gives them.
      rows, photos, *rest = batch[name].shape
      batch[name] = array(
        rows, photos * c.bridge.num_samples, *rest, dtype=batch[name].dtype
      )
  entries = {
    "rows": array(50, dtype=jnp.int32),
    "cols": array(50, dtype=jnp.int32),
    "weights": array(50),
  }
  names = ("static", "final", "internal")
  table = dict.fromkeys(names, entries) | {"specials": array(3, dtype=int)}
  trainable, frozen = optim.split(parameters(c), stage.trainable)

  def loss(trainable, frozen, batch, table):
    keys = captions.photo_keys(run, 0, 0, batch["example_id"].reshape(-1))
    return objective.loss_terms(
      model, run, stage, optim.merge(trainable, frozen), jnp.float32(1),
      batch, keys, jnp.int32(0), jnp.zeros(slots, jnp.int32), table,
    )[0]  # fmt: skip

  return count(
    jax.grad(loss), trainable, frozen, batch, table, causal=data.length
  )


def read_again(run, times):
  """FLOPs of the captions' logits, which the bridge reads once more."""
  language, (stage,) = run.model.language, run.stages
  positions = stage.batch_size * run.data.photos_out * run.bridge.max_tokens
  one = 2 * language.hidden_size * language.padded_vocab_size * positions
  return times * one


def test_the_papers_step_counts_as_its_gradient_does():
  stage = StageConfig(
    name="joint", batch_size=4, trainable=PAPER, losses=JOINT
  )
  # No other number of tokens or pixels, so that attention is told apart.
  run = a_run(LORA, stage, length=1000, photos_in=5, photos_out=3)
  found = flops.train_flops(run, stage)
  wanted = step_in_jaxpr(run) - read_again(run, 3)
  assert sum(found.values()) == pytest.approx(wanted, rel=5e-3)


GENERATOR = ("(unet|text_model)/.*",)
TALKERS = ("(qformer|language_projection|language_model)/.*",)
BOTH = {"text": 1, "photo": 1}
STAGES = {
  # name: data, losses, trainable, bridge's choices, logits read again.
  "autoencoder": ("photos", {"autoencoder": 1}, ("vae/.*",), {}, 0),
  "decoder": ("photos", {"autoencoder": 1}, ("vae/decoder/.*",), {}, 0),
  "generator": ("captions", {"photo": 1}, GENERATOR, {}, 0),
  "latents": ("captions", {"photo": 1}, ("vae/encoder/.*",), {}, 0),
  "eyes": ("descriptions", {"text": 1}, (EYES,), {}, 0),
  "language": ("dialogues", {"text": 1}, ("language_model/.*",), {}, 0),
  "static": ("dialogues", BOTH, TALKERS, {"matrix": "static"}, 3),
  "photos alone": ("dialogues", {"photo": 1}, TALKERS, {}, 0),
  "pipeline": ("dialogues", BOTH, (*TALKERS, "unet/.*"), {"matrix": "none"}, 0),
  "samples": (
    "dialogues",
    BOTH,
    (*TALKERS, "unet/.*"),
    {"draw": "gumbel", "estimator": "rloo", "rloo_samples": 3},
    3,
  ),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_step_counts_as_its_gradient_does(name):
  data, losses, trainable, choices, again = STAGES[name]
  bridge = dataclasses.replace(SMALL.bridge, **choices)
  stage = StageConfig(
    name="stage",
    data=data,
    batch_size=2,
    trainable=trainable,
    losses=StageLosses(**losses),
  )
  run = a_run(dataclasses.replace(SMALL, bridge=bridge), stage)
  found = flops.train_flops(run, stage)
  wanted = step_in_jaxpr(run) - read_again(run, again)
  # What a first layer's gradient leaves out, the formulas do not.
  assert sum(found.values()) == pytest.approx(wanted, rel=0.02)


def test_the_parts_that_a_stage_trains_crosses_and_reads():
  """Worked out by hand from performance.md's table, in GFLOP."""
  stage = StageConfig(batch_size=16, trainable=PAPER, losses=JOINT)
  run = a_run(LORA, stage, length=LENGTH, photos_in=5, photos_out=3)
  found = flops.train_flops(run, stage)
  assert found == pytest.approx(
    {
      "vision_model": 16 * 5 * 521e9,
      "qformer": 16 * 5 * 12.75e9 * 3,
      "language_projection": 16 * 5 * 3 * 2 * 32 * 768 * 4096,
      # Kernels twice, the head three times, attention three times, and
      # adapters of q, k and v: 32 layers x 3 x 32 x (4096 + 4096).
      "language_model": 16 * 1024 * (
        2 * 2 * 6.476e9
        + 3 * 2 * 4096 * 32000
        + 3 * 2 * 32 * 4096 * 1024
        + 3 * 2 * 32 * 3 * 32 * 8192
      ),
      "bridge": 16 * 3 * 2 * 96 * 32000 * 2 * 1024,
      "text_model": 16 * 3 * (2 * 45.13e9 + 4 * 77 * 77 * 1024 * 23),
      "unet": 16 * 3 * 804.26e9 * 3,
      "vae_encoder": 16 * 3 * 1116.7e9,
    },
    rel=1e-3,
  )


def test_photos_with_moments_are_not_encoded():
  stage = StageConfig(
    data="captions", trainable=("unet/.*",), losses=StageLosses(photo=1.0)
  )
  found = flops.train_flops(a_run(FULL, stage, moments="folder"), stage)
  assert set(found) == {"text_model", "unet"}


# -------------------------------------------------------------------- chips


def devices(kind, coords):
  return [
    types.SimpleNamespace(device_kind=kind, id=i, coords=at, slice_index=0)
    for i, at in enumerate(coords)
  ]


def test_utilisation_of_the_published_peak():
  two = devices("NVIDIA H200", [None, None])
  # 989 TFLOP in a second on two chips of 989 TFLOP/s each.
  assert flops.mfu(989e12, 1.0, two) == pytest.approx(0.5)
  assert flops.mfu(989e12, 2.0, two) == pytest.approx(0.25)


def test_two_cores_of_a_chip_are_one_chip():
  cores = [[x, 0, 0] for x in range(4) for _ in range(2)]
  assert flops.count_chips(devices("TPU v4", cores)) == 4
  found = flops.mfu(275e12, 1.0, devices("TPU v4", cores))
  assert found == pytest.approx(0.25)


def test_slices_of_a_pod_have_the_same_coordinates():
  two = devices("TPU v5 lite", [[0, 0, 0], [0, 0, 0]])
  two[1].slice_index = 1
  assert flops.count_chips(two) == 2


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "TPU v3"])
def test_no_utilisation_where_the_peak_is_not_known(kind):
  assert flops.mfu(1e12, 1.0, devices(kind, [None])) is None


def test_real_devices_are_counted():
  assert flops.count_chips(jax.devices()) == len(jax.devices())
