r"""The paper's run: Llama 2 7B, BLIP-2 and Stable Diffusion on PhotoChat.

python -m photochat_jax.main --workdir=runs/photochat --config=\
configs/photochat.py:llm=DIR,blip2=DIR,diffusion=DIR

The folders are Hugging Face checkpoints (or hub ids); sizes, tokenizers and
scheduler are theirs. `run=DIR` in their place starts from a run, such as
tools/convert_hf.py writes. Without any the sizes are the published ones, with
random weights. The dialogues are looked for in data/photochat, in PhotoChat's
layout; `--config.data.path=DIR` says otherwise.

Settings are those of the paper's released code where they are known: LoRA on
the language model, its tables and the whole UNet trained, text encoder and
autoencoder frozen. It needs accelerators: 7 billion parameters and their
gradients do not fit a laptop.

| argument   | values                                                |
|------------|-------------------------------------------------------|
| llm, blip2, diffusion | folder or hub id                           |
| run        | workdir of a run; excludes the three                  |
| size       | llama2_7b, llama2_13b, llama32_1b, smollm2_135m, tiny |
| generator  | sd21, sd15, tiny                                      |
| perceiver  | qformer, linear (the paper's second version),         |
|            | caption (a pipeline's: a captioner reads photos to it) |
| template   | llama2, llama3, chatml, zephyr, bare                  |
| train      | lora (as in the paper), full                          |
"""

import dataclasses

import ml_collections

from photochat_jax import record
from photochat_jax.checkpoints import pretrained
from photochat_jax.config import StageConfig, StageLosses, default, section
from photochat_jax.data import spec, tokenizers
from photochat_jax.diffusion.schedule import ScheduleConfig
from photochat_jax.models.clip_text import CLIPTextConfig
from photochat_jax.models.llama import LlamaConfig
from photochat_jax.models.lora import LoRAConfig
from photochat_jax.models.qformer import QFormerConfig
from photochat_jax.models.unet import UNetConfig
from photochat_jax.models.vae import VAEConfig
from photochat_jax.models.vit import ViTConfig

_ARGUMENTS = {
  "llm": "",
  "blip2": "",
  "diffusion": "",
  "run": "",
  "size": "llama2_7b",
  "generator": "sd21",
  "perceiver": "qformer",
  "template": "",
  "train": "lora",
}
_TRAINABLE = {
  "lora": (
    "language_model/.*/lora_(a|b)",
    "language_model/(embed_tokens|lm_head)/.*",
    # Which of the eyes the paper froze is not known: here the ViT.
    "(qformer|language_projection)/.*",
    "unet/.*",
  ),
  # All that the text and photo losses reach, but for what the generator's
  # text encoder was trained to mean.
  "full": (
    "(vision_model|qformer|language_projection)/.*",
    "(language_model|unet)/.*",
  ),
}
_SIZES = ("llama2_7b", "llama2_13b", "llama32_1b", "smollm2_135m", "tiny")
_TEMPLATES = {"llama32_1b": "llama3", "smollm2_135m": "chatml"}


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """Returns the settings.

  Args:
    argument: `name=value` pairs with commas between them, see above.
  """
  given = _parse(argument)
  config = default()
  model = config.model
  if given["run"]:
    other = record.read(given["run"])
    for field in dataclasses.fields(other.model):
      value = getattr(other.model, field.name)
      if field.name == "bridge":
        config.bridge = section(value)
      elif dataclasses.is_dataclass(value):
        model[field.name] = section(value)
      else:
        model[field.name] = value
    for name in ("llm_tokenizer", "clip_tokenizer", "template"):
      config.data[name] = getattr(other.data, name)
    config.eval.sampler = other.eval.sampler
    config.pretrained.run = given["run"]
  else:
    _set_sizes(config, given)
  if given["template"]:
    config.data.template = given["template"]

  data = config.data
  data.source = "photochat"
  data.path = "data/photochat"
  data.caption_source = "labels"
  data.length = 1024
  # With 4 and 2 a sixth of the tokens would be padding, so it is a twentieth.
  data.photos_in = 5
  data.photos_out = 3
  data.system_prompt = (
    "You are a chatbot that talks and shares photos. The text between [img] "
    "and [/img] describes the photo you share."
  )

  for name in ("vision", "qformer", "language", "text", "unet", "vae"):
    model[name].dtype = "bfloat16"
    model[name].remat = "full"
  config.bridge.draw = "gumbel"
  config.bridge.max_tokens = 96

  # The released code's optimiser; its learning rate fell on a plateau.
  config.optim.learning_rate = 5e-5
  config.optim.warmup_steps = 400
  config.optim.b2 = 0.999
  config.optim.weight_decay = 0.01
  config.ema.decay = 0.0
  config.loss.min_snr_gamma = 0.0
  config.loss.chunk = 128
  config.frozen_dtype = "bfloat16"
  config.stages = ml_collections.ConfigDict(
    {
      "joint": section(
        StageConfig(
          steps=10_000,
          data="dialogues",
          batch_size=16,
          trainable=_TRAINABLE[given["train"]],
          losses=StageLosses(text=1.0, caption=1.0, photo=1.0),
        )
      )
    }
  )
  config.stage_order = ("joint",)
  config.mesh.data = 1
  config.mesh.fsdp = -1

  config.eval.max_dialogues = 0
  config.eval.max_new_tokens = 96
  config.eval.sampler_steps = 20
  config.eval.guidance = 7.5
  config.lock()
  return config


def _parse(argument: str) -> dict[str, str]:
  given = dict(_ARGUMENTS)
  for pair in filter(None, argument.split(",")):
    name, equals, value = pair.partition("=")
    if not equals or name not in given:
      raise ValueError(
        f"configs/photochat.py takes {', '.join(given)} as name=value, not "
        f"{pair!r}."
      )
    given[name] = value
  if given["run"] and (given["llm"] or given["blip2"] or given["diffusion"]):
    raise ValueError("run= is a whole model; leave llm, blip2, diffusion out.")
  for name, values in (
    ("size", _SIZES),
    ("generator", ("sd21", "sd15", "tiny")),
    ("perceiver", ("qformer", "linear", "caption")),
    ("train", tuple(_TRAINABLE)),
  ):
    if given[name] not in values:
      raise ValueError(
        f"{name} is {given[name]!r}; choose one of {', '.join(values)}."
      )
  return given


def _set_sizes(config: ml_collections.ConfigDict, given: dict[str, str]):
  """The model's numbers: those of the folders, or the published ones."""
  folders = pretrained.Folders(
    given["llm"], given["blip2"], given["diffusion"]
  )
  small = given["generator"] == "tiny"
  generator = "tiny" if small else given["generator"]
  language = getattr(LlamaConfig, given["size"])()
  sizes = {
    # The photo marks come on top of the checkpoint's vocabulary.
    "language": dataclasses.replace(
      language, vocab_size=language.vocab_size + 2
    ),
    "vision": ViTConfig.tiny() if small else ViTConfig.eva_g(),
    "qformer": QFormerConfig.tiny() if small else QFormerConfig.blip2(),
    "text": getattr(CLIPTextConfig, generator)(),
    "unet": getattr(UNetConfig, generator)(),
    "vae": VAEConfig.tiny() if small else VAEConfig.sd15(),
    "schedule": getattr(ScheduleConfig, generator)(),
    "sampler": "ddim",
  }
  sizes |= pretrained.read_sizes(folders)
  config.data.template = _TEMPLATES.get(given["size"], "llama2")
  if folder := folders.path("llm"):
    tokenizer = tokenizers.load_llm_tokenizer(folder)
    sizes["language"] = dataclasses.replace(
      sizes["language"], vocab_size=tokenizer.vocab_size
    )
    config.data.llm_tokenizer = str(folder)
    config.data.template = spec.template_of(tokenizer)
  if folder := folders.path("diffusion"):
    config.data.clip_tokenizer = str(folder / "tokenizer")
  config.eval.sampler = sizes.pop("sampler")
  for name, part in sizes.items():
    config.model[name] = section(part)
  config.model.perceiver = given["perceiver"]
  if given["train"] == "lora":
    config.model.lora = section(LoRAConfig(rank=32, alpha=32.0))
  for name in ("llm", "blip2", "diffusion"):
    config.pretrained[name] = given[name]
