"""CLIP's two towers against transformers' `CLIPModel`."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from photochat_jax import judges
from photochat_jax.checkpoints import clip as table_lib
from photochat_jax.checkpoints import files, tables
from photochat_jax.data import tokenizers
from photochat_jax.models import clip, vit

torch = pytest.importorskip("torch")
import hf_compare  # noqa: E402
import hf_models  # noqa: E402

TOKENS = {"bos_token_id": 60, "eos_token_id": 61, "pad_token_id": 61}


def original(act, **text):
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
    | {"hidden_size": 24, "vocab_size": 62, "max_position_embeddings": 11}
    | text,
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


def test_the_judge_prepares_as_the_originals_processor_and_tokenizer(tmp_path):
  transformers = hf_models.transformers
  ours = tokenizers.CLIPTokenizer(max_length=11)
  # A toy's vocabulary has an EOS of its own.
  model = original(
    "quick_gelu", vocab_size=ours.vocab_size, eos_token_id=ours.eos_id
  )
  model.save_pretrained(tmp_path)
  shutil.copy(ours.path, tmp_path / "tokenizer.json")
  judge = judges.CLIPJudge(str(tmp_path), batch_size=2)
  rng = np.random.default_rng(0)
  photos = [
    rng.integers(0, 256, (*size, 3), np.uint8)
    for size in ((24, 24), (40, 30), (31, 77))
  ]
  texts = ["A Ball on grass", "", "a " * 40]
  processor = transformers.CLIPImageProcessorPil(
    size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
  )
  pixels = processor([Image.fromarray(p) for p in photos], return_tensors="np")
  learned = json.loads(ours.path.read_text())["model"]
  tokenizer = transformers.CLIPTokenizer(
    vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]]
  )
  tokens = tokenizer(
    texts, padding="max_length", truncation=True, max_length=11
  )["input_ids"]
  tokens = np.array(tokens)
  with torch.no_grad():
    out = model(
      input_ids=torch.from_numpy(tokens),
      pixel_values=torch.from_numpy(np.asarray(pixels["pixel_values"])),
    )
  np.testing.assert_allclose(
    judge.see(photos), out.image_embeds.numpy(), atol=1e-4
  )
  np.testing.assert_allclose(
    judge.read(texts), out.text_embeds.numpy(), atol=1e-5
  )
  (tmp_path / "tokenizer.json").unlink()
  with pytest.raises(files.WeightsError, match="no tokenizer"):
    judges.CLIPJudge(str(tmp_path))


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
