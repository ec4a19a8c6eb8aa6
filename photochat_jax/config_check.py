"""What the settings of a run must fulfil together."""

import dataclasses
import math
import operator
import re
from typing import Any

from photochat_jax.decoding_options import Options
from photochat_jax.diffusion import samplers
from photochat_jax.ops import remat


class ConfigError(ValueError):
  """A setting which cannot be used; the message is one sentence."""


# Those of data/sources.py.
_SOURCES = ("photochat", "dialogcc", "photochat_plus", "mmdialog", "tfds")
_CHOICES = {
  "model.perceiver": ("qformer", "linear", "caption"),
  **{
    f"model.{part}.remat": tuple(remat.POLICIES)
    for part in ("vision", "qformer", "language", "text", "unet", "vae")
  },
  "data.source": ("synthetic", *_SOURCES),
  "data.caption_source": ("given", "labels", "description", "written"),
  "data.template": ("llama2", "llama3", "chatml", "zephyr", "bare"),
  "loss.text_on": ("model", "all"),
  "frozen_dtype": ("float32", "bfloat16"),
  "optim.schedule": ("cosine", "linear", "constant"),
  "eval.split": ("train", "dev", "test"),
  "eval.speakers": ("model", "both"),
  "eval.sampler": tuple(samplers.SAMPLERS),
}
_EQUAL = {
  "model.qformer.encoder_hidden_size": "model.vision.hidden_size",
  "model.unet.cross_attention_dim": "model.text.hidden_size",
  "model.unet.in_channels": "model.vae.latent_channels",
  "model.unet.out_channels": "model.vae.latent_channels",
}
_POSITIVE = ("data.length", "checkpoint.every_steps", "checkpoint.keep")
_POSITIVE += ("log.every_steps", "eval.batch_size", "eval.sampler_steps")
_POSITIVE += ("log.dev_batches", "health.max_skipped")
# A parameter that photos go through on their way to moments.
_ENCODER = "vae/encoder/conv_in/kernel"
# The batches that hold what a term of the loss needs.
_LOSS_DATA = {
  "text": ("dialogues", "descriptions"),
  "caption": ("dialogues",),
  "photo": ("dialogues", "captions"),
  "autoencoder": ("dialogues", "descriptions", "captions", "photos"),
}


def validate(run: Any) -> None:
  """Checks a `config.RunConfig`.

  Raises:
    ConfigError: values do not fit together.
  """
  for name, allowed in _CHOICES.items():
    value = operator.attrgetter(name)(run)
    if value not in allowed:
      raise ConfigError(
        f"config.{name} must be one of {', '.join(allowed)}, not {value!r}."
      )
  for name, other in _EQUAL.items():
    if name.startswith("model.qformer.") and "qformer" in run.model.absent:
      continue
    value = operator.attrgetter(name)(run)
    wanted = operator.attrgetter(other)(run)
    if value != wanted:
      raise ConfigError(
        f"config.{name} is {value} and must equal config.{other}, {wanted}."
      )
  for name in _POSITIVE:
    value = operator.attrgetter(name)(run)
    if value < 1:
      raise ConfigError(f"config.{name} must be at least 1, not {value}.")
  _validate_data(run)
  try:
    samplers.plan(
      run.model.schedule, run.eval.sampler, run.eval.sampler_steps
    )
  except ValueError as error:
    raise ConfigError(f"config.eval.sampler: {error}") from error
  try:
    Options.of(run.eval, run.seed)
  except ValueError as error:
    raise ConfigError(f"config.eval.{error}") from error
  folders = dataclasses.asdict(run.pretrained)
  folders.pop("captioner")
  if folders.pop("run") and any(folders.values()):
    raise ConfigError(
      "config.pretrained.run is a whole model; give it alone, or llm, blip2 "
      "and diffusion without it."
    )
  every, dev_every = run.checkpoint.every_steps, run.log.dev_every
  if run.checkpoint.keep_best and (not dev_every or every % dev_every):
    raise ConfigError(
      "config.checkpoint.keep_best needs the dev split's loss wherever a "
      f"checkpoint is: set config.log.dev_every to {every}, "
      "checkpoint.every_steps, or a part of it."
    )
  if run.bridge.max_tokens >= run.data.length:
    raise ConfigError(
      "config.bridge.max_tokens must be less than config.data.length, "
      f"{run.data.length}, not {run.bridge.max_tokens}."
    )
  for stage in run.stages:
    where = f"config.stages.{stage.name}"
    if stage.steps < 0 or stage.batch_size < 1:
      raise ConfigError(f"{where} needs steps >= 0 and batch_size >= 1.")
    if stage.accumulate < 1 or stage.batch_size % stage.accumulate:
      raise ConfigError(
        f"{where}.accumulate is {stage.accumulate} and must divide its "
        f"batch_size, {stage.batch_size}."
      )
    kinds = _LOSS_DATA["autoencoder"]
    if stage.data not in kinds:
      raise ConfigError(
        f"{where}.data must be one of {', '.join(kinds)}, not {stage.data!r}."
      )
    if stage.data == "descriptions" and run.model.perceiver == "caption":
      raise ConfigError(
        f"{where} describes photos, which a model of perceiver='caption' does "
        "not see: leave it out of config.stage_order."
      )
    used = {k: v for k, v in dataclasses.asdict(stage.losses).items() if v}
    if not used:
      raise ConfigError(f"{where}.losses are all 0, so it trains nothing.")
    for name in used:
      if stage.data not in _LOSS_DATA[name]:
        raise ConfigError(
          f"{where}.losses.{name} needs data={' or '.join(_LOSS_DATA[name])}, "
          f"and the stage reads {stage.data}."
        )


def _validate_data(run: Any) -> None:
  """Checks what is read, and what is made of photos."""
  data = run.data
  if data.source != "synthetic" and not data.path:
    raise ConfigError(
      f"config.data.source is {data.source!r}, which needs "
      "--config.data.path=DIR, the folder with its files and photos/."
    )
  if not 0 <= data.max_broken <= 1:
    raise ConfigError(
      f"config.data.max_broken is a share, from 0 to 1, not {data.max_broken}."
    )
  if not 0 < data.train_share <= 1:
    raise ConfigError(
      "config.data.train_share is a share, above 0 and at most 1, not "
      f"{data.train_share}."
    )
  for item in data.mix:
    if not _is_set(item):
      raise ConfigError(
        "config.data.mix holds (source, path, weight) with a source of "
        f"{', '.join(_SOURCES)} and a weight above 0, not {item!r}."
      )
  if not data.moments:
    return
  if data.crop:
    raise ConfigError(
      "config.data.moments are of whole photos, so config.data.crop must be "
      "False; flips are among them."
    )
  for stage in run.stages:
    trains = any(re.fullmatch(rule, _ENCODER) for rule in stage.trainable)
    if stage.steps and (stage.losses.autoencoder or trains):
      raise ConfigError(
        f"config.stages.{stage.name} trains the autoencoder, whose moments "
        "would be stale: leave config.data.moments empty, or train it before, "
        "in a run of its own, and leave 'vae/.*' out of trainable."
      )


def _is_set(item: Any) -> bool:
  """Whether it is (source, path, weight)."""
  if not isinstance(item, tuple) or len(item) != 3:
    return False
  source, path, weight = item
  is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
  named = source in _SOURCES and isinstance(path, str) and bool(path)
  return named and is_number and 0 < weight < math.inf
