"""CLIP's two towers against transformers' `CLIPModel`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.checkpoints import clip as table_lib
from photochat_jax.checkpoints import files, tables
from photochat_jax.models import clip, vit

torch = pytest.importorskip("torch")
import hf_compare  # noqa: E402
import hf_models  # noqa: E402

TOKENS = {"bos_token_id": 60, "eos_token_id": 61, "pad_token_id": 61}


def original(act):
  transformers = hf_models.transformers
  tower = {
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": act,
  }
  config = transformers.CLIPConfig(
    text_config=tower
    | TOKENS
    | {"hidden_size": 24, "vocab_size": 62, "max_position_embeddings": 11},
    vision_config=tower
    | {"hidden_size": 32, "image_size": 24, "patch_size": 8},
    projection_dim=20,
  )
  return hf_models.randomise(transformers.CLIPModel(config))


def abstract(config):
  c = config.vision.image_size
  return jax.eval_shape(
    clip.CLIP(config).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, c, c, 3), jnp.uint8),
    jax.ShapeDtypeStruct((1, 3), jnp.int32),
  )["params"]


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_both_embeddings_equal_the_originals(act, tmp_path):
  model = original(act)
  model.save_pretrained(tmp_path)
  config = table_lib.read_config(
    files.read_json(tmp_path / "config.json"), **TOKENS
  )
  assert config.vision.hidden_act == act and config.projection_dim == 20
  params = tables.read(
    table_lib.table(config), abstract(config), files.Tensors(tmp_path)
  )
  rng = np.random.default_rng(0)
  photos = rng.integers(0, 256, (3, 24, 24, 3), np.uint8)
  tokens = rng.integers(0, 60, (3, 11))
  # One ends early, and what comes after must not be read; one is full.
  tokens[0, 4:], tokens[1, 9], tokens[2, 10] = 61, 61, 61
  seen, read = jax.jit(clip.CLIP(config).apply)(
    {"params": params}, photos, tokens
  )
  with torch.no_grad():
    out = model(
      input_ids=torch.from_numpy(tokens),
      pixel_values=hf_compare.channels_first(np.asarray(vit.normalise(photos))),
    )
  np.testing.assert_allclose(seen, out.image_embeds.numpy(), atol=1e-5)
  np.testing.assert_allclose(read, out.text_embeds.numpy(), atol=1e-5)
  np.testing.assert_allclose(
    read @ seen.T, (out.text_embeds @ out.image_embeds.T).numpy(), atol=1e-5
  )


def test_the_published_checkpoint_has_its_names_and_shapes():
  """openai/clip-vit-base-patch32, whose config is transformers' default."""
  transformers = hf_models.transformers
  with torch.device("meta"):
    model = transformers.CLIPModel(transformers.CLIPConfig())
  found = json.loads(transformers.CLIPConfig().to_json_string())
  config = table_lib.read_config(found, bos_token_id=49406, eos_token_id=49407)
  assert config == clip.CLIPConfig.vit_b32()
  state = {k: np.broadcast_to(np.float32(0), v.shape)
           for k, v in model.state_dict().items()}  # fmt: skip
  wanted, _ = tables.match(table_lib.table(config), abstract(config), state)
  assert len(wanted) == len([k for k in state if "position_ids" not in k]) - 1
