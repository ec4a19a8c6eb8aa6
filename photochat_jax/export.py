"""A run's weights to folders that transformers and diffusers open."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from photochat_jax import inputs, record
from photochat_jax.checkpoints import files, lora_peft, pretrained
from photochat_jax.checkpoints import lora as adapters
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.config import RunConfig
from photochat_jax.data import tokenizer_files
from photochat_jax.models import lora
from photochat_jax.models.photochat import PhotoChat

PARTS = ("llm", "blip2", "diffusion")
"""The folders that `export` writes."""


def export(
  workdir: epath.PathLike,
  out: epath.PathLike,
  parts: Sequence[str] = PARTS,
  dtype: Any = np.float32,
  vocab_size: int | None = None,
  average: bool = True,
  with_adapters: bool = False,
) -> None:
  """Writes a run's newest weights as Hugging Face folders.

  Args:
    workdir: of the run.
    out: a new folder; gets one folder for each part.
    parts: of `PARTS`: `llm` opens as `LlamaForCausalLM`, `blip2` (with the
      language model once more) as `Blip2ForConditionalGeneration`,
      `diffusion` as `StableDiffusionPipeline`.
    dtype: of the tensors.
    vocab_size: rows of the language model in `llm`; all without. The
      original's undoes the growth by the photo marks.
    average: write the averaged weights of the parts that have them.
    with_adapters: write LoRA as adapters of its own, `adapters/`, and leave
      the kernels as they were; otherwise it is merged into them.

  Raises:
    ValueError: there is no checkpoint, a part does not exist, or the folder
      already holds weights.
  """
  unknown = [part for part in parts if part not in PARTS]
  if unknown:
    raise WeightsError(
      f"There is no part {unknown[0]!r} to write; choose of {PARTS}."
    )
  out = epath.Path(out)
  run = record.read(workdir)
  model = PhotoChat(run.model)
  state = inputs.read_weights(run, workdir, model)
  params = {**state.params, **(state.ema if average else {})}
  llm_tokenizer, clip_tokenizer = inputs.load_tokenizers(run)
  tokens = {
    "bos_token_id": llm_tokenizer.bos_id,
    "eos_token_id": llm_tokenizer.eos_id,
    "pad_token_id": llm_tokenizer.pad_id,
  }
  if with_adapters:
    # The tables were trained with it, at least by the photo marks.
    saved = lora_peft.TABLES
    adapters.write(run.model, params, out / "adapters", saved, vocab_size)
    params = lora.strip(params)
  else:
    params = lora.merge(params)
  if "llm" in parts:
    pretrained.write_llm(
      run.model, params, out / "llm", vocab_size, dtype, **tokens
    )
    _write_llm_tokenizer(run, llm_tokenizer, out / "llm", vocab_size)
  if "blip2" in parts:
    pretrained.write_blip2(run.model, params, out / "blip2", dtype, **tokens)
    _write_llm_tokenizer(run, llm_tokenizer, out / "blip2")
  if "diffusion" in parts:
    folder = out / "diffusion"
    pretrained.write_diffusion(
      run.model, params, folder, run.eval.sampler, dtype
    )
    _write_clip_tokenizer(run, clip_tokenizer, folder / "tokenizer")


def _write_clip_tokenizer(
  run: RunConfig, tokenizer: Any, folder: epath.Path
) -> None:
  """The tokenizer's files, with what a pipeline asks them."""
  tokenizer_files.copy(run.data.clip_tokenizer or tokenizer.path, folder)
  path = folder / "tokenizer_config.json"
  content = files.read_json(path) if path.exists() else {}
  content |= {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": tokenizer.max_length,
    "pad_token": tokenizer.piece(tokenizer.pad_id),
  }
  files.write_json(path, content)


def _write_llm_tokenizer(
  run: RunConfig,
  tokenizer: Any,
  folder: epath.Path,
  vocab_size: int | None = None,
) -> None:
  """The tokenizer's files, with `[img]` and `[/img]` as its own tokens."""
  tokenizer_files.copy(run.data.llm_tokenizer or tokenizer.path, folder)
  path = folder / "tokenizer.json"
  content = json.loads(path.read_text())
  added = content.setdefault("added_tokens", [])
  known = {token["content"] for token in added}
  for name, number in (
    ("[img]", tokenizer.img_id),
    ("[/img]", tokenizer.end_img_id),
  ):
    if name not in known and number < (vocab_size or math.inf):
      added.append(
        {
          "id": number,
          "content": name,
          "single_word": False,
          "lstrip": False,
          "rstrip": False,
          "normalized": False,
          "special": True,
        }
      )
  path.write_text(json.dumps(content, ensure_ascii=False))
