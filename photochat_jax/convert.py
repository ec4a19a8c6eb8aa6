"""Hugging Face folders to a run's workdir, and a run's weights to folders.

What `convert` writes is a run that has not trained yet: chat and evaluation
open it like any other, and training starts from it (`config.pretrained.run`).
What `export` writes is opened by transformers and diffusers.
"""

import collections
import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from rich import progress as rich_progress

from photochat_jax import inputs, record
from photochat_jax.checkpoints import files, pretrained
from photochat_jax.checkpoints import lora as adapters
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.checkpoints.manager import Checkpoints
from photochat_jax.config import RunConfig
from photochat_jax.models import lora
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.ops import partition
from photochat_jax.state import TrainState

PARTS = ("llm", "blip2", "diffusion")
"""The folders that `export` writes."""
_TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "vocab.json",
  "merges.txt",
)


def convert(
  run: RunConfig, workdir: epath.PathLike, dtype: Any = None
) -> list[str]:
  """Reads the folders of `run.pretrained` and writes a run of no steps.

  The tokenizers are copied, so that the workdir can be moved. `meta` of the
  checkpoint has a digest of each array and the SHA-256 of each source file.

  Args:
    run: settings whose sizes are those of the folders.
    workdir: a new folder.
    dtype: of the parameters; None keeps the files'. Parts without a file are
      initialised, in float32.

  Returns:
    What was done, a line for each part: how many parameters were read, and
    what of the files was ignored.

  Raises:
    WeightsError: a folder cannot be used, or the workdir has a checkpoint.
  """
  workdir = epath.Path(workdir)
  if (workdir / "checkpoints").exists():
    raise WeightsError(
      f"{workdir} already holds checkpoints; give a new folder."
    )
  model = PhotoChat(run.model)
  abstract = partition.flatten(jax.eval_shape(model.init, jax.random.key(0)))
  llm_tokenizer, _ = inputs.load_tokenizers(run)
  total = sum(math.prod(leaf.shape) for leaf in abstract.values())
  lines = []

  def ignored(where: str, keys: Sequence[str]) -> None:
    tops = collections.Counter(key.split(".")[0] for key in keys)
    lines.extend(
      f"{where}: ignored {top} ({count} tensors)"
      for top, count in tops.items()
    )

  with _progress("Reading", total) as advance:

    def place(path: str, array: np.ndarray) -> np.ndarray:
      advance(path, array.size)
      return array

    params = inputs.read_folders(run, llm_tokenizer, dtype, place, ignored)
  for part, tree in params.items():
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    lines.append(f"{part}: read {count:,} parameters")
  loaded = partition.flatten(params)
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
  random = [part for part in state.params if part not in params]
  lines.extend(f"{part}: new, random" for part in random)
  return lines


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
    adapters.write(run.model, params, out / "adapters")
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


def _copy_tokenizers(run: RunConfig, workdir: epath.Path) -> RunConfig:
  """Puts the tokenizers into the workdir and the settings to them."""
  found = {}
  tokenizers = inputs.load_tokenizers(run)
  for name, tokenizer in zip(
    ("llm_tokenizer", "clip_tokenizer"), tokenizers, strict=True
  ):
    folder = record.tokenizer_folder(workdir, name)
    _copy_files(getattr(run.data, name), tokenizer, folder)
    found[name] = str(folder)
  return run.with_data(**found)


def _copy_files(source: str, tokenizer: Any, folder: epath.Path) -> None:
  """Copies what a tokenizer was read from; '' is the shipped one."""
  path = epath.Path(source or tokenizer.path)
  folder.mkdir(parents=True, exist_ok=True)
  if not path.is_dir():
    shutil.copyfile(path, folder / "tokenizer.json")
    return
  for name in _TOKENIZER_FILES:
    if (path / name).exists():
      shutil.copyfile(path / name, folder / name)


def _write_clip_tokenizer(
  run: RunConfig, tokenizer: Any, folder: epath.Path
) -> None:
  """The tokenizer's files, with what a pipeline asks them."""
  _copy_files(run.data.clip_tokenizer, tokenizer, folder)
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
  _copy_files(run.data.llm_tokenizer, tokenizer, folder)
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


@contextlib.contextmanager
def _progress(
  verb: str, total: int
) -> Iterator[Callable[[str, int], None]]:
  """A bar with the time left; gives a function (what, how much of it)."""
  columns = (
    rich_progress.TextColumn("{task.description}"),
    rich_progress.BarColumn(),
    rich_progress.TaskProgressColumn(),
    rich_progress.TimeRemainingColumn(),
  )
  with rich_progress.Progress(*columns) as bar:
    task = bar.add_task(verb, total=total)

    def advance(what: str, count: int) -> None:
      bar.update(task, advance=count, description=f"{verb} {what[:48]:48}")

    yield advance
    bar.update(task, completed=total, description=f"{verb} done")
