"""Three Hugging Face folders and one model, both ways.

* `llm`: a Llama, `LlamaForCausalLM` -> `language_model`.
* `blip2`: any `Blip2*`; its own language model is ignored -> `vision_model`,
  `qformer`.
* `diffusion`: a Stable Diffusion 1.x or 2.x with the folders `text_encoder`,
  `tokenizer`, `unet`, `vae`, `scheduler` -> `text_model`, `unet`, `vae`.

Any of the three may be left out; the parts it would give are then as the model
initialises them, and so is `language_projection`, which no checkpoint has.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from photochat_jax.checkpoints import (
  blip2,
  clip_text,
  files,
  llama,
  pipeline,
  settings,
  tables,
  unet,
  vae,
)
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.diffusion import schedule
from photochat_jax.models import lora
from photochat_jax.models.photochat import Params, PhotoChat, PhotoChatConfig
from photochat_jax.models.vit import interpolate_positions

_TEXTS = ("*.json", "*.txt", "*.model")
# Beside the parts of a diffusion model a hub has them all again in one file.
_WEIGHTS = {
  "llm": ("*.safetensors",),
  "blip2": ("*.safetensors",),
  "diffusion": tuple(
    f"{part}/*.safetensors" for part in ("text_encoder", "unet", "vae")
  ),
}
Place = Callable[[str, np.ndarray], Any]
Ignored = Callable[[str, Sequence[str]], None]


@dataclasses.dataclass(frozen=True)
class Folders:
  """Where pretrained weights are: local folders or hub ids; '' is none."""

  llm: str = ""
  blip2: str = ""
  diffusion: str = ""

  def path(self, name: str) -> epath.Path | None:
    """The local folder of one of the three, None where it is left out.

    Raises:
      WeightsError: there is no such folder.
    """
    value = getattr(self, name)
    patterns = (*_TEXTS, *_WEIGHTS[name])
    return files.find_folder(value, patterns) if value else None


def read_sizes(folders: Folders) -> dict[str, Any]:
  """What the folders' configs say.

  Returns:
    A dict with, for the folders there are: `language` (with the file's own
    vocabulary), `vision`, `qformer`, `text`, `unet`, `vae`, `schedule`, the
    models' dataclasses; and `sampler`, the name of the scheduler's sampler.

  Raises:
    WeightsError: a config is missing, damaged or of another architecture.
  """
  sizes: dict[str, Any] = {}
  if folder := folders.path("llm"):
    sizes["language"] = settings.read_file(folder, llama.read_config)
  if folder := folders.path("blip2"):
    eyes = settings.read_file(folder, blip2.read_config)
    sizes["vision"], sizes["qformer"] = eyes
  if folder := folders.path("diffusion"):
    sizes |= pipeline.read_sizes(folder)
  return sizes


def read_params(
  config: PhotoChatConfig,
  folders: Folders,
  fresh: Sequence[int] = (),
  dtype: Any = None,
  place: Place = lambda path, array: array,
  ignored: Ignored = lambda where, keys: None,
) -> Params:
  """Reads the parameters that the folders hold.

  Args:
    config: of the model; its vocabulary may be larger than the file's.
    folders: where they are.
    fresh: ids of `[img]` and `[/img]`, whose rows start as the mean.
    dtype: of the parameters; None keeps the files'.
    place: what becomes of each parameter, with its path in the whole model.
    ignored: told the keys of each folder that the model has no use for.

  Returns:
    Nested dict of the parts that were found.

  Raises:
    WeightsError: files are missing or damaged, or do not fit the config.
  """
  abstract = jax.eval_shape(PhotoChat(config).init, jax.random.key(0))
  abstract = lora.strip(abstract)
  params: Params = {}

  def part(name, folder, table, stem):
    tensors = files.Tensors(folder, stem)
    ignored(name, [key for key in tensors if table.ignores(key)])
    params[name] = tables.read(
      _located(table, folder),
      abstract[name],
      tensors,
      dtype,
      lambda path, array: place(f"{name}/{path}", array),
    )

  if folder := folders.path("llm"):
    rows = settings.read_file(folder, llama.read_config).vocab_size
    part(
      "language_model",
      folder,
      llama.table(config.language, rows, fresh),
      files.MODEL,
    )
  if "vision_model" in abstract and (folder := folders.path("blip2")):
    params |= _read_eyes(config, abstract, folder, dtype, place, ignored)
  if folder := folders.path("diffusion"):
    part(
      "text_model",
      folder / "text_encoder",
      clip_text.table(config.text),
      files.MODEL,
    )
    for name, table in (
      ("unet", unet.table(config.unet)),
      ("vae", vae.table()),
    ):
      part(name, folder / name, table, files.DIFFUSION)
  return params


def _read_eyes(config, abstract, folder, dtype, place, ignored) -> Params:
  """`vision_model`, `qformer`, and the projection where it is ours."""
  stored, _ = settings.read_file(folder, blip2.read_config)
  # Read at the size it was trained for, whatever ours is.
  wanted = {
    name: abstract[name]
    for name in ("vision_model", "qformer")
    if name in abstract
  }
  vision = dict(wanted["vision_model"])
  table_shape = (1, stored.num_tokens, config.vision.hidden_size)
  vision["position_embedding"] = jax.ShapeDtypeStruct(table_shape, np.float32)
  wanted["vision_model"] = vision
  text = files.read_json(folder / "config.json").get("text_config")
  # Around a Llama of our width it is one that `write_blip2` made.
  ours = config.perceiver == "qformer" and isinstance(text, Mapping)
  ours = ours and text.get("model_type") == "llama"
  ours = ours and text.get("hidden_size") == config.language.hidden_size
  if ours:
    wanted["language_projection"] = abstract["language_projection"]
  table = blip2.table(config.vision, config.qformer, ours)
  if config.perceiver == "linear":
    table = blip2.without_qformer(table)

  def put(path, array):
    if path == "vision_model/position_embedding":
      resized = interpolate_positions(array, config.vision.num_tokens)
      array = np.asarray(resized, array.dtype)
    return place(path, array)

  tensors = files.Tensors(folder)
  ignored("blip2", [key for key in tensors if table.ignores(key)])
  return tables.read(_located(table, folder), wanted, tensors, dtype, put)


def _located(table: tables.Table, folder: epath.Path) -> tables.Table:
  """The table, whose errors say which folder it is about."""
  return dataclasses.replace(table, name=f"{table.name} in {folder}")


def read_hashes(folders: Folders) -> dict[str, dict[str, str]]:
  """SHA-256 of every weight file read, by folder and file name."""
  hashes: dict[str, dict[str, str]] = {}
  for name in ("llm", "blip2"):
    if folder := folders.path(name):
      hashes[name] = files.Tensors(folder).hashes()
  if folder := folders.path("diffusion"):
    for part, stem in (
      ("text_encoder", files.MODEL),
      ("unet", files.DIFFUSION),
      ("vae", files.DIFFUSION),
    ):
      found = files.Tensors(folder / part, stem).hashes()
      hashes[f"diffusion/{part}"] = found
  return hashes


def write_llm(
  config: PhotoChatConfig,
  params: Params,
  folder: epath.PathLike,
  vocab_size: int | None = None,
  dtype: Any = np.float32,
  **tokens: Any,
) -> None:
  """Writes the language model as a `LlamaForCausalLM`.

  Args:
    config: of the model.
    params: with the part `language_model`.
    folder: a new one.
    vocab_size: rows kept; all that have a meaning without. The file's own
      number undoes the growth.
    dtype: of the tensors.
    **tokens: bos_token_id, eos_token_id, pad_token_id.

  Raises:
    WeightsError: the folder already holds weights.
  """
  folder = epath.Path(folder)
  rows = vocab_size or config.language.vocab_size
  table = llama.table(config.language, rows)
  _write(folder, table, params["language_model"], dtype)
  content = llama.write_config(
    config.language, rows, np.dtype(dtype).name, **tokens
  )
  files.write_json(folder / "config.json", content)


def write_blip2(
  config: PhotoChatConfig,
  params: Params,
  folder: epath.PathLike,
  dtype: Any = np.float32,
  **tokens: Any,
) -> None:
  """Writes eyes, projection and language model as one `Blip2` model.

  It opens as transformers' `Blip2ForConditionalGeneration`, with our Llama for
  its language model.

  Args:
    config: of the model, with a Q-Former.
    params: of the model.
    folder: a new one.
    dtype: of the tensors.
    **tokens: bos_token_id, eos_token_id, pad_token_id.

  Raises:
    WeightsError: the model has no Q-Former, or the folder already holds
      weights.
  """
  if config.perceiver != "qformer":
    raise WeightsError(
      "A model without a Q-Former is no BLIP-2; leave `blip2` out."
    )
  folder = epath.Path(folder)
  language = config.language
  eyes = {
    name: params[name]
    for name in ("vision_model", "qformer", "language_projection")
  }

  def tensors():
    table = blip2.table(config.vision, config.qformer, projection=True)
    yield from tables.write(table, eyes)
    for key, array in tables.write(
      llama.table(language), params["language_model"]
    ):
      yield f"language_model.{key}", array

  files.write_tensors(folder, _cast(tensors(), dtype))
  name = np.dtype(dtype).name
  text = llama.write_config(language, language.vocab_size, name, **tokens)
  content = blip2.write_config(config.vision, config.qformer, text, name)
  files.write_json(folder / "config.json", content)


def write_diffusion(
  config: PhotoChatConfig,
  params: Params,
  folder: epath.PathLike,
  sampler: str = "ddim",
  dtype: Any = np.float32,
) -> None:
  """Writes the photo generator as a `StableDiffusionPipeline`.

  The tokenizer's files are the caller's to add, in `tokenizer/`.

  Args:
    config: of the model.
    params: with the parts `text_model`, `unet` and `vae`.
    folder: a new one.
    sampler: named in the scheduler's config.
    dtype: of the tensors.

  Raises:
    WeightsError: the folder already holds weights.
  """
  folder = epath.Path(folder)
  name = np.dtype(dtype).name
  side, _, _ = PhotoChat(config).photo_shape
  for part, table, stem, content in (
    (
      "text_encoder",
      clip_text.table(config.text),
      files.MODEL,
      clip_text.write_config(config.text, name),
    ),
    (
      "unet",
      unet.table(config.unet),
      files.DIFFUSION,
      unet.write_config(config.unet),
    ),
    ("vae", vae.table(), files.DIFFUSION, vae.write_config(config.vae, side)),
  ):
    ours = params["text_model" if part == "text_encoder" else part]
    _write(folder / part, table, ours, dtype, stem)
    files.write_json(folder / part / "config.json", content)
  content = schedule.write_config(config.schedule, sampler)
  (folder / "scheduler").mkdir(parents=True, exist_ok=True)
  files.write_json(folder / "scheduler" / "scheduler_config.json", content)
  files.write_json(
    folder / "model_index.json",
    {
      "_class_name": "StableDiffusionPipeline",
      "feature_extractor": [None, None],
      "requires_safety_checker": False,
      "safety_checker": [None, None],
      "scheduler": ["diffusers", content["_class_name"]],
      "text_encoder": ["transformers", "CLIPTextModel"],
      "tokenizer": ["transformers", "CLIPTokenizer"],
      "unet": ["diffusers", "UNet2DConditionModel"],
      "vae": ["diffusers", "AutoencoderKL"],
    },
  )


def _write(folder, table, params, dtype, stem=files.MODEL):
  files.write_tensors(folder, _cast(tables.write(table, params), dtype), stem)


def _cast(tensors, dtype):
  for key, array in tensors:
    yield key, array.astype(dtype, copy=False)
