"""Hugging Face folders to a run's workdir.

What comes out is a run that has not trained yet: chat and evaluation open it
like any other, and training starts from it (`config.pretrained.run`).
`export.py` is the way back.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from photochat_jax import inputs, record
from photochat_jax.checkpoints import lora as adapters
from photochat_jax.checkpoints import pretrained
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.checkpoints.manager import Checkpoints
from photochat_jax.config import RunConfig
from photochat_jax.data import bars, tokenizer_files
from photochat_jax.models import lora
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.ops import partition
from photochat_jax.state import TrainState


def convert(
  run: RunConfig,
  workdir: epath.PathLike,
  dtype: Any = None,
  llm_lora: epath.PathLike = "",
  unet_lora: epath.PathLike = "",
  merge: bool = True,
) -> list[str]:
  """Reads the folders of `run.pretrained` and writes a run of no steps.

  The tokenizers are copied, so that the workdir can be moved. `meta` of the
  checkpoint has a digest of each array and the SHA-256 of each source file.

  Args:
    run: settings whose sizes are those of the folders.
    workdir: a new folder.
    dtype: of the parameters; None keeps the files'. Parts without a file are
      initialised, in float32.
    llm_lora: peft's folder of an adapter of the language model.
    unet_lora: diffusers' or kohya's file of an adapter of the UNet.
    merge: add the adapters into the kernels; otherwise they are the run's
      LoRA, to be trained on.

  Returns:
    What was done, a line for each part: how many parameters were read, and
    what of the files was ignored.

  Raises:
    ValueError: a folder or an adapter cannot be used, or the workdir has a
      checkpoint.
  """
  workdir = epath.Path(workdir)
  if (workdir / "checkpoints").exists():
    raise WeightsError(
      f"{workdir} already holds checkpoints; give a new folder."
    )
  llm_tokenizer, _ = inputs.load_tokenizers(run)
  lines = []

  def ignored(where: str, keys: Sequence[str]) -> None:
    tops = collections.Counter(key.split(".")[0] for key in keys)
    lines.extend(
      f"{where}: ignored {top} ({count} tensors)"
      for top, count in tops.items()
    )

  total = _size(run)
  with bars.Bar("Reading", total, counted=False) as bar:

    def place(path: str, array: np.ndarray) -> np.ndarray:
      bar.advance(array.size, f"Reading {path[:48]:48}")
      return array

    params = inputs.read_folders(run, llm_tokenizer, dtype, place, ignored)
    bar.reach(total, "Read")  # Parts without a folder were not.
  for part, tree in params.items():
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    lines.append(f"{part}: read {count:,} parameters")
  read = list(params)
  if llm_lora or unet_lora:
    fresh = (llm_tokenizer.img_id, llm_tokenizer.end_img_id)
    params = adapters.read(run.model, params, llm_lora, unet_lora, fresh)
    if merge:
      params = lora.merge(params)
    else:
      found = lora.config_of(params)
      run = dataclasses.replace(
        run, model=dataclasses.replace(run.model, lora=found)
      )
  model, loaded = PhotoChat(run.model), partition.flatten(params)
  rest = jax.jit(inputs.init_without(model, loaded))(jax.random.key(run.seed))
  whole = partition.unflatten({**rest, **loaded})
  averaged = run.ema.parts if run.ema.decay else ()
  state = TrainState(
    step=jnp.int32(0),
    params=whole,
    opt_state=(),
    ema={part: whole[part] for part in averaged},
    latent_scale=jnp.float32(run.model.vae.scaling_factor),
  )
  hashes = pretrained.read_hashes(inputs.pretrained_folders(run))
  run = _copy_tokenizers(run, workdir)
  record.write(run, workdir)
  with Checkpoints(workdir, model=run.as_dict()["model"]) as checkpoints:
    checkpoints.save(0, state, {"stage": "", "sources": hashes})
    checkpoints.wait()
  random = [part for part in whole if part not in read]
  lines.extend(f"{part}: new, random" for part in random)
  return lines


def _copy_tokenizers(run: RunConfig, workdir: epath.Path) -> RunConfig:
  """Puts the tokenizers into the workdir and the settings to them."""
  found = {}
  tokenizers = inputs.load_tokenizers(run)
  for name, tokenizer in zip(
    ("llm_tokenizer", "clip_tokenizer"), tokenizers, strict=True
  ):
    folder = record.tokenizer_folder(workdir, name)
    tokenizer_files.copy(getattr(run.data, name) or tokenizer.path, folder)
    found[name] = str(folder)
  return run.with_data(**found)


def _size(run: RunConfig) -> int:
  """Parameters of the model."""
  shapes = jax.eval_shape(PhotoChat(run.model).init, jax.random.key(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
