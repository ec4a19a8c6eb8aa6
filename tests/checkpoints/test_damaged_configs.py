"""A config that cannot be used says which field, where, and what to do.

The fields of sound configs, as transformers and diffusers write them, are
changed one by one; then many at once, at random.
"""

import json

import hf_folders
import hypothesis
import pytest
from hypothesis import strategies as st

from photochat_jax.checkpoints import pretrained
from photochat_jax.checkpoints.files import WeightsError

LLM, BLIP2, TEXT, UNET, VAE, SCHEDULER = hf_folders.CONFIGS

# What is wrong: (file, fields, what is said).
FIELDS = {
  "another model": (LLM, {"model_type": "mistral"}, "model_type 'mistral'"),
  "no model": (LLM, {"model_type": ...}, "model_type None"),
  "a list of models": (LLM, {"model_type": ["llama"]}, "model_type ['llama']"),
  "quantised": (
    LLM,
    {"quantization_config": {"bits": 4, "quant_method": "gptq"}},
    "quantization_config={'bits': 4, 'quant_method': 'gptq'}",
  ),
  "gelu": (LLM, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
  "biases": (LLM, {"attention_bias": True}, "attention_bias=True"),
  "tied by words": (
    LLM,
    {"tie_word_embeddings": "no"},
    "tie_word_embeddings='no'; it must be of type bool",
  ),
  "no width": (LLM, {"hidden_size": ...}, "lacks hidden_size"),
  "width null": (LLM, {"hidden_size": None}, "lacks hidden_size"),
  "width in words": (LLM, {"hidden_size": "16"}, "hidden_size='16'"),
  "width negative": (LLM, {"hidden_size": -16}, "hidden_size=-16"),
  "width zero": (LLM, {"hidden_size": 0}, "hidden_size=0"),
  "width a float": (LLM, {"hidden_size": 16.0}, "hidden_size=16.0"),
  "width true": (LLM, {"hidden_size": True}, "hidden_size=True"),
  "width a list": (LLM, {"hidden_size": [16]}, "hidden_size=[16]"),
  "width absurd": (LLM, {"hidden_size": 10**12}, "to 16777216"),
  "width of 4000 digits": (LLM, {"hidden_size": 10**4000}, "to 16777216"),
  "layers absurd": (LLM, {"num_hidden_layers": 10**9}, "to 1024"),
  "groups of heads in words": (
    LLM,
    {"num_key_value_heads": "2"},
    "num_key_value_heads='2'",
  ),
  "groups of heads negative": (
    LLM,
    {"num_key_value_heads": -2},
    "num_key_value_heads=-2",
  ),
  "heads in no groups": (LLM, {"num_attention_heads": 3}, "multiple of"),
  "an odd head": (LLM, {"head_dim": 5}, "even head_dim"),
  "a head in words": (LLM, {"head_dim": "4"}, "head_dim='4'"),
  "epsilon in words": (LLM, {"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'"),
  "epsilon zero": (LLM, {"rms_norm_eps": 0}, "a positive number"),
  "epsilon infinite": (LLM, {"rms_norm_eps": float("inf")}, "rms_norm_eps=inf"),
  "epsilon of 400 digits": (LLM, {"rms_norm_eps": 10**400}, "rms_norm_eps=1"),
  "yarn": (
    LLM,
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "rope_type 'yarn'",
  ),
  "yarn, as older files have it": (
    LLM,
    {"rope_parameters": ..., "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "rope_type 'yarn'",
  ),
  "rope in words": (LLM, {"rope_parameters": "default"}, "JSON object"),
  "rope without its factor": (
    LLM,
    {"rope_parameters": {"rope_type": "linear"}},
    "'factor'",
  ),
  "rope with factor 0": (
    LLM,
    {"rope_parameters": {"rope_type": "linear", "factor": 0}},
    "factor=0",
  ),
  "rope with base in words": (
    LLM,
    {"rope_parameters": {"rope_theta": "high"}},
    "rope_theta='high'",
  ),
  "rope beyond all numbers": (
    LLM,
    {"rope_parameters": {"rope_type": "linear", "factor": 1e-45}},
    "give no angles",
  ),
  "rope in a part of the head": (
    LLM,
    {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "partial_rotary_factor=0.5",
  ),
  "other eyes": (BLIP2, {"model_type": "instructblip"}, "'instructblip'"),
  "eyes in a list": (BLIP2, {"vision_config": [1]}, "vision_config=[1]"),
  "eyes with quick_gelu": (
    BLIP2,
    {"vision_config": {"hidden_act": "quick_gelu"}},
    "hidden_act='quick_gelu'",
  ),
  "patches that do not fit": (
    BLIP2,
    {"vision_config": {"patch_size": 5}},
    "patch_size=5",
  ),
  "layers in no groups": (
    BLIP2,
    {"qformer_config": {"cross_attention_frequency": 3}},
    "cross_attention_frequency=3",
  ),
  "no queries": (BLIP2, {"num_query_tokens": 0}, "num_query_tokens=0"),
  "photos too large": (
    BLIP2,
    {"vision_config": {"image_size": 2**20}},
    "image_size=1048576",
  ),
  "a vision model to read": (
    TEXT,
    {"model_type": "clip_vision_model"},
    "'clip_text_model'",
  ),
  "an unknown activation": (TEXT, {"hidden_act": "tanh"}, "choose one of"),
  "no room for a caption": (
    TEXT,
    {"max_position_embeddings": 2},
    "max_position_embeddings=2",
  ),
  "heads that do not fit": (TEXT, {"num_attention_heads": 3}, "multiple of"),
  "more width than the UNet reads": (
    TEXT,
    {"hidden_size": 24},
    "cross_attention_dim is 16 and the text_encoder's hidden_size 24",
  ),
  "less width than the UNet reads": (
    UNET,
    {"cross_attention_dim": 12},
    "cross_attention_dim is 12 and the text_encoder's hidden_size 16",
  ),
  "SDXL": (
    UNET,
    {"addition_embed_type": "text_time"},
    "addition_embed_type='text_time'",
  ),
  "SDXL's depths": (
    UNET,
    {"transformer_layers_per_block": [1, 2]},
    "transformer_layers_per_block=[1, 2]",
  ),
  "classes": (UNET, {"class_embed_type": "timestep"}, "class_embed_type="),
  "inpainting": (UNET, {"in_channels": 9}, "in_channels is 9"),
  "learned variance": (UNET, {"out_channels": 8}, "out_channels is 8"),
  "unknown blocks": (
    UNET,
    {"down_block_types": ["DownBlock2D", "KDownBlock2D"]},
    "'KDownBlock2D'",
  ),
  "blocks in a list": (
    UNET,
    {"down_block_types": [["DownBlock2D"], {}]},
    "down_block_types=",
  ),
  "a number of blocks": (UNET, {"up_block_types": 2}, "up_block_types=2"),
  "no blocks": (UNET, {"up_block_types": ...}, "up_block_types=None"),
  "other blocks on the way up": (
    UNET,
    {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]},
    "way up",
  ),
  "channels in words": (
    UNET,
    {"block_out_channels": "8, 16"},
    "block_out_channels='8, 16'",
  ),
  "channels true": (
    UNET,
    {"block_out_channels": [8, True]},
    "block_out_channels=(8, True)",
  ),
  "no channels": (UNET, {"block_out_channels": []}, "1 to 16 whole numbers"),
  "a thousand levels": (
    UNET,
    {"block_out_channels": [8] * 1000},
    "1 to 16 whole numbers",
  ),
  "more levels than blocks": (
    UNET,
    {"block_out_channels": [8, 16, 16]},
    "one entry for each of the 3",
  ),
  "no heads": (UNET, {"attention_head_dim": 0}, "attention_head_dim=0"),
  "heads in words": (
    UNET,
    {"num_attention_heads": ["2", 2]},
    "num_attention_heads=('2', 2)",
  ),
  "latents that cannot be halved": (UNET, {"sample_size": 7}, "sample_size=7"),
  "latents of no size": (UNET, {"sample_size": None}, "lacks sample_size"),
  "another autoencoder": (
    VAE,
    {"_class_name": "AutoencoderTiny"},
    "'AutoencoderKL'",
  ),
  "no quant_conv": (VAE, {"use_quant_conv": False}, "use_quant_conv=False"),
  "sixteen channels": (VAE, {"latent_channels": 16}, "latent_channels 16"),
  "groups that do not fit": (VAE, {"norm_num_groups": 3}, "multiple of"),
  "a negative scale": (VAE, {"scaling_factor": -1}, "scaling_factor=-1"),
  "grey photos": (VAE, {"in_channels": 1}, "in_channels=1"),
  "a number of encoders": (VAE, {"down_block_types": 2}, "down_block_types=2"),
  "no decoders": (VAE, {"up_block_types": ...}, "up_block_types=None"),
  "an unknown scheduler": (
    SCHEDULER,
    {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "'FlowMatchEulerDiscreteScheduler'",
  ),
  "a scheduler in a list": (SCHEDULER, {"_class_name": []}, "_class_name=[]"),
  "an unknown field": (SCHEDULER, {"shift": 3.0}, "shift"),
  "a field without a name": (SCHEDULER, {"": 1}, "''=1"),
  "betas in words": (SCHEDULER, {"beta_start": "low"}, "beta_start='low'"),
  "betas of another kind": (
    SCHEDULER,
    {"beta_schedule": "sigmoid"},
    "'sigmoid'",
  ),
  "betas in lists": (
    SCHEDULER,
    {"trained_betas": [[0.1]]},
    "trained_betas",
  ),
  "too few betas": (SCHEDULER, {"trained_betas": [0.1]}, "trained_betas"),
  "a number for betas": (SCHEDULER, {"trained_betas": 3}, "trained_betas"),
  "no steps": (
    SCHEDULER,
    {"num_train_timesteps": 0},
    "num_train_timesteps=0",
  ),
  "more steps than memory": (
    SCHEDULER,
    {"num_train_timesteps": 10**15},
    "num_train_timesteps=1000000000000000",
  ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_that_cannot_be_used(root, case):
  file, changes, said = FIELDS[case]
  hf_folders.edit(root / file, **changes)
  name, *_ = file.split("/")
  message = hf_folders.complaint(root, name)
  assert said in message
  assert str(root / name) in message


# ---------------------------------------------------------------------- random

NUMBERS = st.one_of(
  st.integers(-3, 40),
  st.integers(-(10**30), 10**30),
  st.floats(),
)
# Surrogates and control characters too.
TEXTS = st.text(st.characters(), max_size=8)
VALUES = st.recursive(
  st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
  lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)
  ),
  max_leaves=8,
)
# Fields that files have and those above do not.
MORE = (
  "rope_scaling",
  "rope_theta",
  "attention_head_dim",
  "num_attention_heads",
  "trained_betas",
  "timestep_spacing",
  "",
)


@pytest.fixture(scope="module")
def scratch(sound, tmp_path_factory):
  return hf_folders.copy(sound, tmp_path_factory.mktemp("random") / "hub")


def reads_or_complains(root, file, content):
  path = root / file
  before = path.read_bytes()
  # As Python writes it: lone surrogates, NaN and Infinity included.
  path.write_text(json.dumps(content))
  try:
    pretrained.read_sizes(hf_folders.folders(root, file.split("/")[0]))
  except WeightsError as error:
    hf_folders.assert_sentence(error, root, 1000)
  finally:
    path.write_bytes(before)


@pytest.mark.parametrize("file", hf_folders.CONFIGS)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_random_fields_are_read_or_complained_about(scratch, file, data):
  content = json.loads((scratch / file).read_text())
  for _ in range(data.draw(st.integers(1, 3))):
    inner = [value for value in content.values() if isinstance(value, dict)]
    place = data.draw(st.sampled_from([content, *inner]))
    place[data.draw(st.sampled_from([*place, *MORE]) | TEXTS)] = data.draw(
      VALUES
    )
  reads_or_complains(scratch, file, content)


@pytest.mark.parametrize("file", hf_folders.CONFIGS)
@hypothesis.given(content=VALUES)
@hypothesis.settings(max_examples=25)
def test_random_json_is_complained_about(scratch, file, content):
  reads_or_complains(scratch, file, content)
