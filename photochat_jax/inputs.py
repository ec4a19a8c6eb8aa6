"""What a run reads: tokenizers, splits, shapes of a batch, trained weights.

Training, evaluation and chat ask here, so that they see the same data in the
same form.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from photochat_jax import sharding
from photochat_jax.checkpoints import manager, pretrained
from photochat_jax.config import RunConfig
from photochat_jax.data import (
  records,
  schema,
  sources,
  synthetic,
  tokenizers,
)
from photochat_jax.data.quarantine import Quarantine
from photochat_jax.data.spec import DataSpec
from photochat_jax.models.photochat import Params, PhotoChat
from photochat_jax.ops import partition
from photochat_jax.runtime import cluster
from photochat_jax.state import TrainState


def load_tokenizers(
  run: RunConfig,
) -> tuple[tokenizers.LLMTokenizer, tokenizers.CLIPTokenizer]:
  """The language model's and the text encoder's."""
  text = run.model.text
  return (
    tokenizers.load_llm_tokenizer(run.data.llm_tokenizer or None),
    tokenizers.load_clip_tokenizer(
      run.data.clip_tokenizer or None,
      text.max_position_embeddings,
      text.pad_token_id,
    ),
  )


def data_spec(run: RunConfig, batch_size: int, **changes) -> DataSpec:
  """Shapes of a batch of dialogues; `changes` replace single fields."""
  factor = 2 ** (len(run.model.vae.block_out_channels) - 1)
  side, channels = run.model.unet.sample_size, run.model.vae.latent_channels
  spec = DataSpec(
    batch_size=batch_size,
    length=run.data.length,
    photos_in=run.data.photos_in if run.model.num_visual_tokens else 0,
    photos_out=run.data.photos_out,
    num_visual_tokens=run.model.num_visual_tokens,
    vision_size=run.model.vision.image_size,
    photo_size=side * factor,
    caption_tokens=run.bridge.max_tokens,
    template=run.data.template,
    system_prompt=run.data.system_prompt,
    text_on=run.loss.text_on,
    augment=run.data.flip,
    crop=run.data.crop,
    moments=(side, side, 2 * channels) if run.data.moments else (),
  )
  return dataclasses.replace(spec, **changes)


def main_folder(
  run: RunConfig, workdir: epath.PathLike
) -> tuple[str, epath.PathLike]:
  """Reader and folder of the main data set.

  A synthetic set, which is in PhotoChat's layout, is written first, to
  WORKDIR/data where the config names no folder, by process 0 while the others
  wait: all must ask.
  """
  data = run.data
  if data.source != "synthetic":
    return data.source, data.path
  make = functools.partial(
    synthetic.generate,
    run.seed,
    data.num_train,
    data.num_dev,
    data.num_test,
    data.path or epath.Path(workdir) / "data",
    data.image_size,
    data.told_share,
  )
  cluster.by_first("write the synthetic data", make)
  # The others find it; a machine with a disk of its own has it made there.
  return "photochat", make()


def read_split(
  run: RunConfig, workdir: epath.PathLike, split: str
) -> tuple[list[schema.Dialogue], schema.Coverage]:
  """The dialogues of a split of the main data set, and what was found.

  Raises:
    ValueError: the folder has no such split, or nothing usable in it.
  """
  return read_set(run, *main_folder(run, workdir), split)


def read_set(
  run: RunConfig,
  source: str,
  path: epath.PathLike,
  split: str,
  quarantine: Quarantine | None = None,
) -> tuple[list[schema.Dialogue], schema.Coverage]:
  """The dialogues of a split of any data set, read as the run says.

  Args:
    run: the run.
    source: a name of `data.sources.READERS`.
    path: the set's folder.
    split: 'train', 'dev' or 'test'.
    quarantine: takes the records that are left out.

  Raises:
    ValueError: the folder has no such split, or nothing usable in it, or more
      than `data.max_broken` of its records are broken.
  """
  data = run.data
  dialogues, coverage = sources.read_split(
    source, path, split, data.caption_source, data.max_broken, quarantine
  )
  if run.model.perceiver == "caption":
    captions = records.Captions("written", path)
    dialogues = [_as_read(dialogue, captions) for dialogue in dialogues]
  return dialogues, coverage


def _as_read(
  dialogue: schema.Dialogue, captions: records.Captions
) -> schema.Dialogue:
  """The dialogue with what a captioner says of its photos."""
  turns = tuple(
    dataclasses.replace(
      turn,
      photo=dataclasses.replace(
        turn.photo, seen=captions(turn.photo.id, None, "")
      ),
    )
    if turn.photo
    else turn
    for turn in dialogue.turns
  )
  return dataclasses.replace(dialogue, turns=turns)


def read_weights(
  run: RunConfig, workdir: epath.PathLike, model: PhotoChat
) -> TrainState:
  """The newest checkpoint, without its optimiser, in the dtypes it was saved.

  Raises:
    CheckpointError: there is none, or it is of another config.
  """
  params = jax.eval_shape(model.init, jax.random.key(0))
  averaged = run.ema.parts if run.ema.decay else ()
  state = TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32),
    params=params,
    opt_state=(),
    ema={part: params[part] for part in averaged},
    latent_scale=jax.ShapeDtypeStruct((), jnp.float32),
  )
  mesh = sharding.make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
  where = sharding.state_shardings(state, mesh)
  with manager.Checkpoints(
    workdir, run.checkpoint.keep, run.as_dict()["model"]
  ) as saved:
    dtypes = saved.dtypes()

    def of(path, leaf, place):
      dtype = dtypes.get(partition.path_of(path), leaf.dtype)
      return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place)

    return saved.restore(jax.tree_util.tree_map_with_path(of, state, where))


def read_folders(
  run: RunConfig,
  tokenizer: Any,
  dtype: Any = None,
  place: pretrained.Place = lambda path, array: array,
  ignored: pretrained.Ignored = lambda where, keys: None,
) -> Params:
  """What the Hugging Face folders of `run.pretrained` hold.

  Args:
    run: the run.
    tokenizer: the language model's.
    dtype: of the parameters; None keeps the files'.
    place: what becomes of each parameter, with its path.
    ignored: told the keys of each folder that the model has no use for.

  Returns:
    Nested dict of the parts that were found.

  Raises:
    WeightsError: a folder cannot be used.
  """
  return pretrained.read_params(
    run.model,
    pretrained_folders(run),
    (tokenizer.img_id, tokenizer.end_img_id),
    dtype,
    place,
    ignored,
  )


def pretrained_folders(run: RunConfig) -> pretrained.Folders:
  """The Hugging Face folders that the run names."""
  named = run.pretrained
  return pretrained.Folders(named.llm, named.blip2, named.diffusion)


def init_without(
  model: PhotoChat, have: Iterable[str]
) -> Callable[[jax.Array], dict[str, jax.Array]]:
  """A function (key) -> `{path: random parameter}`, less those we have."""
  have = frozenset(have)

  def init(key):
    leaves = partition.flatten(model.init(key))
    return {path: leaf for path, leaf in leaves.items() if path not in have}

  return init
