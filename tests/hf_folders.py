"""Three tiny Hugging Face folders as the originals' own classes write them.

`llm`, `blip2` and `diffusion` are laid out like Llama-2-7b-hf, blip2-opt-2.7b
and Stable Diffusion 1.5, with random numbers.
"""

import json
import pathlib
import re
import shutil

import pytest

from photochat_jax.checkpoints import pretrained
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.diffusion.schedule import ScheduleConfig
from photochat_jax.models import bridge, clip_text, llama, qformer, unet, vae
from photochat_jax.models.photochat import PhotoChatConfig
from photochat_jax.models.vit import ViTConfig

LLAMA = dict(
  vocab_size=100,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
)
VISION = dict(
  image_size=16,
  patch_size=4,
  hidden_size=12,
  intermediate_size=20,
  num_hidden_layers=2,
  num_attention_heads=2,
)
QFORMER = dict(
  vocab_size=30,
  hidden_size=8,
  intermediate_size=10,
  num_hidden_layers=2,
  num_attention_heads=2,
)
OPT = dict(
  model_type="opt",
  vocab_size=40,
  hidden_size=6,
  word_embed_proj_dim=6,
  ffn_dim=8,
  num_hidden_layers=1,
  num_attention_heads=1,
  max_position_embeddings=16,
)
TEXT = dict(
  vocab_size=600,
  hidden_size=16,
  intermediate_size=20,
  num_hidden_layers=2,
  num_attention_heads=2,
  max_position_embeddings=12,
)
UNET = dict(
  sample_size=8,
  block_out_channels=(8, 16),
  layers_per_block=1,
  norm_num_groups=4,
  cross_attention_dim=16,
  attention_head_dim=2,
  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
VAE = dict(
  block_out_channels=(8, 16),
  norm_num_groups=4,
  sample_size=16,
  down_block_types=("DownEncoderBlock2D",) * 2,
  up_block_types=("UpDecoderBlock2D",) * 2,
)
# Stable Diffusion 1.5's.
SCHEDULER = dict(
  beta_start=0.00085,
  beta_end=0.012,
  beta_schedule="scaled_linear",
  num_train_timesteps=1000,
  set_alpha_to_one=False,
  skip_prk_steps=True,
  steps_offset=1,
)


CONFIGS = (
  "llm/config.json",
  "blip2/config.json",
  "diffusion/text_encoder/config.json",
  "diffusion/unet/config.json",
  "diffusion/vae/config.json",
  "diffusion/scheduler/scheduler_config.json",
)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"


def write(
  folder: pathlib.Path, vocab_size: int = LLAMA["vocab_size"]
) -> dict[str, object]:
  """Writes the three folders and returns the originals, by folder.

  Args:
    folder: which holds them.
    vocab_size: of the language model.
  """
  numbers = LLAMA | {"vocab_size": vocab_size}
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  diffusers = pytest.importorskip("diffusers")
  torch.manual_seed(0)
  eyes = transformers.Blip2Config(
    vision_config=VISION,
    qformer_config=QFORMER,
    text_config=OPT,
    num_query_tokens=3,
  )
  models = {
    "llm": transformers.LlamaForCausalLM(transformers.LlamaConfig(**numbers)),
    "blip2": transformers.Blip2ForConditionalGeneration(eyes),
    "diffusion/text_encoder": transformers.CLIPTextModel(
      transformers.CLIPTextConfig(**TEXT)
    ),
    "diffusion/unet": diffusers.UNet2DConditionModel(**UNET),
    "diffusion/vae": diffusers.AutoencoderKL(**VAE),
  }
  for name, model in models.items():
    # Fresh tables of positions and queries are zeros.
    for value in model.parameters():
      torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(folder / name)
  diffusers.PNDMScheduler(**SCHEDULER).save_pretrained(
    folder / "diffusion" / "scheduler"
  )
  write_tokenizer(folder / "diffusion" / "tokenizer")
  return models


def write_tokenizer(folder: pathlib.Path, pad: str = "<|endoftext|>") -> None:
  """A CLIP tokenizer in the files of Stable Diffusion's, `!` at 0.

  Args:
    folder: a new one.
    pad: the token that fills captions up.
  """
  tokenizers = pytest.importorskip("tokenizers")
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  words = [*letters, *(f"{letter}</w>" for letter in letters), "do", "dog</w>"]
  words += ["<|startoftext|>", "<|endoftext|>"]
  names = {
    "bos_token": {"content": "<|startoftext|>", "lstrip": False},
    "eos_token": {"content": "<|endoftext|>", "lstrip": False},
    "pad_token": pad,
  }
  folder.mkdir(parents=True)
  for name, content in (
    ("vocab.json", {word: number for number, word in enumerate(words)}),
    ("special_tokens_map.json", names),
    ("tokenizer_config.json", {**names, "tokenizer_class": "CLIPTokenizer"}),
  ):
    (folder / name).write_text(json.dumps(content))
  (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")


def folders(root: pathlib.Path, *names: str) -> pretrained.Folders:
  """The folders under a root, all three where none is named."""
  names = names or ("llm", "blip2", "diffusion")
  return pretrained.Folders(**{name: str(root / name) for name in names})


def config(sizes: dict, **changes) -> PhotoChatConfig:
  """A model of these sizes, whose other parts are toys."""
  toys = {
    "vision": ViTConfig.tiny(),
    "qformer": qformer.QFormerConfig.tiny(),
    "language": llama.LlamaConfig.tiny(),
    "text": clip_text.CLIPTextConfig.tiny(),
    "unet": unet.UNetConfig.tiny(),
    "vae": vae.VAEConfig.tiny(),
    "schedule": ScheduleConfig.tiny(),
    "bridge": bridge.BridgeConfig(),
  }
  sizes = {name: part for name, part in sizes.items() if name != "sampler"}
  return PhotoChatConfig(**toys | sizes | changes)


def copy(sound: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """A copy to damage."""
  return pathlib.Path(shutil.copytree(sound, folder))


_ADVICE = re.compile(
  r"\b(fetch|take|must|give|set|run|convert|choose|use|remove|see to it|"
  r"check)\b"
)


def assert_sentence(
  error: ValueError, root: pathlib.Path, most: int = 600
) -> None:
  """The message is one short sentence: where, and what to do."""
  message = str(error)
  assert "\n" not in message
  assert message.endswith(".")
  assert str(root) in message
  assert _ADVICE.search(message), message
  assert len(message.replace(str(root), "")) < most, message


def complaint(root: pathlib.Path, *names: str) -> str:
  """What `read_sizes` says about the folders under a root."""
  with pytest.raises(WeightsError) as error:
    pretrained.read_sizes(folders(root, *names))
  assert_sentence(error.value, root)
  return str(error.value)


def read(root: pathlib.Path, *names: str) -> dict:
  """The parameters in the folders under a root, at the sizes they say."""
  found = folders(root, *names)
  return pretrained.read_params(config(pretrained.read_sizes(found)), found)


def weights_complaint(
  root: pathlib.Path, *names: str, kind: type = WeightsError, most: int = 600
) -> str:
  """What `read_params` says about folders under a root, an error of `kind`."""
  with pytest.raises(WeightsError) as error:
    read(root, *names)
  assert type(error.value) is kind
  assert_sentence(error.value, root, most)
  return str(error.value)


def edit(path: pathlib.Path, **changes) -> None:
  """Changes fields of a JSON file; `...` removes one, a dict is merged."""
  content = json.loads(path.read_text())
  for name, value in changes.items():
    if value is ...:
      del content[name]
    elif isinstance(value, dict) and isinstance(content.get(name), dict):
      content[name] |= value
    else:
      content[name] = value
  path.write_text(json.dumps(content))
