"""models/vit.py; `tests/parity/test_perceiver.py` has more of the original."""

import dataclasses

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import vit

torch = pytest.importorskip('torch')
import hf_models  # noqa: E402
import hf_parts  # noqa: E402
import transformers  # noqa: E402
from transformers import image_utils  # noqa: E402

BASE = vit.ViTConfig(
    image_size=18,
    patch_size=6,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
)


def hf_model(config):
  fields = dataclasses.asdict(config)
  for name in ('dtype', 'remat', 'scan_unroll'):
    del fields[name]
  return transformers.Blip2VisionModel(
      transformers.Blip2VisionConfig(**fields, attn_implementation='eager')
  )


def features_of(model, photos, **options):
  pixels = torch.from_numpy(photos.transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    return model(pixels, **options).last_hidden_state.numpy()


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def init_shapes(config):
  size = config.image_size
  return jax.eval_shape(
      vit.ViT(config).init,
      jax.random.key(0),
      jnp.zeros((1, size, size, 3)),
  )['params']


@pytest.fixture(scope='module')
def photos():
  rng = np.random.default_rng(0)
  return rng.standard_normal((2, 18, 18, 3)).astype(np.float32)


@pytest.mark.parametrize('seed', range(4))
def test_features_equal_transformers_at_any_size(seed):
  rng = np.random.default_rng(seed)
  patch, heads = rng.integers(3, 8), rng.integers(1, 6)
  config = vit.ViTConfig(
      image_size=int(patch * rng.integers(1, 8)),
      patch_size=int(patch),
      hidden_size=int(heads * rng.integers(3, 12)),
      intermediate_size=int(rng.integers(7, 50)),
      num_hidden_layers=int(rng.integers(1, 5)),
      num_attention_heads=int(heads),
      qkv_bias=seed % 2 == 0,
      layer_norm_eps=(1e-6, 1e-2)[seed // 2],
  )
  model = hf_models.randomise(hf_model(config), seed)
  params = hf_parts.vit_params(model)
  assert ('bias' in params['layers']['self_attn']['qkv']) == config.qkv_bias
  side = config.image_size
  photos = rng.standard_normal((3, side, side, 3)).astype(np.float32)
  got = vit.ViT(config).apply({'params': params}, photos)
  chex.assert_trees_all_close(got, features_of(model, photos), atol=1e-4)


@pytest.mark.parametrize('side', [6, 12, 24, 42])
def test_photos_of_another_size_equal_transformers(side):
  model = hf_models.randomise(hf_model(BASE), 3)
  params = hf_parts.vit_params(model)
  config = dataclasses.replace(BASE, image_size=side)
  params['position_embedding'] = vit.interpolate_positions(
      params['position_embedding'], config.num_tokens
  )
  rng = np.random.default_rng(4)
  photos = rng.standard_normal((2, side, side, 3)).astype(np.float32)
  got = vit.ViT(config).apply({'params': params}, photos)
  want = features_of(model, photos, interpolate_pos_encoding=True)
  chex.assert_trees_all_close(got, want, atol=1e-4)


@hypothesis.given(st.integers(1, 17), st.integers(1, 33))
def test_positions_are_resized_as_by_torch(old, new):
  rng = np.random.default_rng(100 * old + new)
  table = rng.standard_normal((1, 1 + old**2, 3)).astype(np.float32)
  got = vit.interpolate_positions(table, 1 + new**2)
  square = table[:, 1:].reshape(1, old, old, 3).transpose(0, 3, 1, 2)
  want = torch.nn.functional.interpolate(
      torch.from_numpy(square.copy()), size=(new, new), mode='bicubic'
  )
  want = want.permute(0, 2, 3, 1).reshape(1, -1, 3).numpy()
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got[:, 0], table[:, 0])
  np.testing.assert_allclose(got[:, 1:], want, atol=1e-5)


def test_positions_of_no_square_are_refused():
  with pytest.raises(ValueError, match='one more than a square'):
    vit.interpolate_positions(np.zeros((1, 10, 4)), 12)
  with pytest.raises(ValueError, match='one more than a square'):
    vit.interpolate_positions(np.zeros((1, 9, 4)), 10)


def test_rematerialisation_keeps_less_for_the_backward_pass():
  def kept(config):
    module = vit.ViT(config)

    def backward(params):
      pixels = jnp.zeros((4, 18, 18, 3))
      return jax.vjp(lambda x: module.apply({'params': params}, x), pixels)[1]

    # What the backward pass holds besides the parameters.
    params = init_shapes(config)
    return count(jax.eval_shape(backward, params)) - count(params)

  assert kept(dataclasses.replace(BASE, remat="full")) < kept(BASE) / 2


def test_bfloat16_activations_stay_near_float32(photos):
  params = hf_parts.vit_params(hf_models.randomise(hf_model(BASE), 2))
  want = vit.ViT(BASE).apply({'params': params}, photos)
  config = dataclasses.replace(BASE, dtype='bfloat16')
  got = vit.ViT(config).apply({'params': params}, photos)
  assert got.dtype == jnp.bfloat16
  chex.assert_trees_all_close(got.astype(jnp.float32), want, atol=0.2)


def test_normalise_is_clips():
  assert list(vit.IMAGE_MEAN) == image_utils.OPENAI_CLIP_MEAN
  assert list(vit.IMAGE_STD) == image_utils.OPENAI_CLIP_STD
  photos = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
  got = vit.normalise(photos)
  want = photos / 255.0 - np.array(image_utils.OPENAI_CLIP_MEAN)
  want /= np.array(image_utils.OPENAI_CLIP_STD)
  assert got.dtype == jnp.float32
  chex.assert_trees_all_close(got, want.astype(np.float32), atol=1e-5)


def test_tiny_reads_overrides():
  config = vit.ViTConfig.tiny(image_size=16)
  params = init_shapes(config)
  chex.assert_shape(params['position_embedding'], (1, 5, 96))
  assert config.num_tokens == 5


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='multiple of patch_size=6'):
    dataclasses.replace(BASE, image_size=20)
  with pytest.raises(ValueError, match='num_attention_heads=5'):
    dataclasses.replace(BASE, num_attention_heads=5)
  with pytest.raises(ValueError, match='Resize photos'):
    jax.eval_shape(
        vit.ViT(BASE).init, jax.random.key(0), jnp.zeros((1, 24, 24, 3))
    )
