"""The configs in a Stable Diffusion's folder, part by part and together.

What weights cannot tell is checked here: that the parts can be joined, and
which ids the text encoder was trained with. BOS and EOS are in the tokenizer's
folder, and so is what fills a caption up: EOS in 1.x, `!` in 2.x.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from photochat_jax.checkpoints import clip_text, files, settings, unet, vae
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.diffusion import schedule

_TOKENS = {
  "bos_token": "<|startoftext|>",
  "eos_token": "<|endoftext|>",
  "pad_token": "<|endoftext|>",
}
# Must be numbers within reason before a schedule is made of them; the defaults
# of diffusers.
_SCHEDULE = {
  "_class_name": "",
  "num_train_timesteps": 1000,
  "beta_start": 0.0001,
  "beta_end": 0.02,
  "steps_offset": 0,
}


def read_sizes(folder: epath.Path) -> dict[str, Any]:
  """What the configs say.

  Args:
    folder: with `text_encoder`, `tokenizer`, `unet`, `vae`, `scheduler`.

  Returns:
    A dict with `text`, `unet`, `vae`, `schedule`, the models' dataclasses, and
    `sampler`, the name of the scheduler's sampler.

  Raises:
    WeightsError: a config is missing, damaged or of another architecture, or
      the parts do not belong together.
  """
  text = settings.read_file(folder / "text_encoder", clip_text.read_config)
  ids = _read_ids(folder / "tokenizer", text.vocab_size)
  noise, sampler = settings.read_file(
    folder / "scheduler", _read_schedule, "scheduler_config.json"
  )
  sizes = {
    "text": dataclasses.replace(text, **ids),
    "unet": settings.read_file(folder / "unet", unet.read_config),
    "vae": settings.read_file(folder / "vae", vae.read_config),
    "schedule": noise,
    "sampler": sampler,
  }
  _check_joints(folder, sizes)
  return sizes


def _check_joints(folder: epath.Path, sizes: Mapping[str, Any]) -> None:
  text, denoiser, coder = (sizes[name] for name in ("text", "unet", "vae"))
  latents = "vae's latent_channels", coder.latent_channels
  for name, other, wanted in (
    ("cross_attention_dim", "text_encoder's hidden_size", text.hidden_size),
    ("in_channels", *latents),
    ("out_channels", *latents),
  ):
    value = getattr(denoiser, name)
    if value != wanted:
      raise WeightsError(
        f"In {folder} the unet's {name} is {value} and the {other} {wanted}, "
        "which must be equal; take a whole checkpoint, one that draws from "
        "text alone."
      )
  if (coder.in_channels, coder.out_channels) != (3, 3):
    raise WeightsError(
      f"The vae in {folder} has in_channels={coder.in_channels} and "
      f"out_channels={coder.out_channels}; take one with the 3 of a photo."
    )


def _read_schedule(content: Mapping[str, Any]) -> tuple[Any, str]:
  settings.take(content, _SCHEDULE, "the scheduler")
  for name, value in content.items():
    if name == "trained_betas" and isinstance(value, list):
      plain = all(type(beta) in (int, float) for beta in value)
    else:
      plain = name and not isinstance(value, list | dict)
      plain = plain and (name != "trained_betas" or value is None)
    if not plain:
      raise WeightsError(
        f"The config of the scheduler has {settings.shown(name)}="
        f"{settings.shown(value)}; fetch it again."
      )
  return schedule.read_config(content)


def _read_ids(folder: epath.Path, vocab_size: int) -> dict[str, int]:
  """`bos_token_id`, `eos_token_id` and `pad_token_id`."""
  ids, names = _vocabulary(folder), {}
  for file in ("tokenizer_config.json", "special_tokens_map.json"):
    if (folder / file).exists():
      names |= files.read_json(folder / file)
  found = {}
  for role, default in _TOKENS.items():
    token = names.get(role) or default
    token = token.get("content") if isinstance(token, dict) else token
    number = ids.get(token) if isinstance(token, str) else None
    if number is None:
      raise WeightsError(
        f"The tokenizer in {folder} has no {role} {settings.shown(token)}; "
        "fetch its files again."
      )
    if type(number) is not int or not 0 <= number < vocab_size:
      raise WeightsError(
        f"The tokenizer in {folder} gives its {role} {settings.shown(token)} "
        f"the id {settings.shown(number)}, and the text_encoder beside it has "
        f"{vocab_size} tokens; take both from one checkpoint."
      )
    found[f"{role}_id"] = number
  return found


def _vocabulary(folder: epath.Path) -> Mapping[str, int]:
  if (folder / "vocab.json").exists():
    return files.read_json(folder / "vocab.json")
  path = folder / "tokenizer.json"
  content = files.read_json(path)
  try:
    vocabulary = dict(content["model"]["vocab"])
    for token in content.get("added_tokens") or ():
      vocabulary[token["content"]] = token["id"]
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise WeightsError(
      f"{path} is not that of a CLIP tokenizer; fetch it again."
    ) from error
  return vocabulary
