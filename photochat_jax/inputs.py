"""What a run reads: tokenizers, splits, shapes of a batch, trained weights.

Training, evaluation and chat ask here, so that they see the same data in the
same form.
"""

import dataclasses

import jax
import jax.numpy as jnp
from etils import epath

from photochat_jax import sharding
from photochat_jax.checkpoints import manager
from photochat_jax.config import RunConfig
from photochat_jax.data import photochat, synthetic, tokenizers
from photochat_jax.data.spec import DataSpec
from photochat_jax.models.photochat import PhotoChat
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
  spec = DataSpec(
    batch_size=batch_size,
    length=run.data.length,
    photos_in=run.data.photos_in,
    photos_out=run.data.photos_out,
    num_visual_tokens=run.model.qformer.num_query_tokens,
    vision_size=run.model.vision.image_size,
    photo_size=run.model.unet.sample_size * factor,
    caption_tokens=run.bridge.max_tokens,
    template=run.data.template,
    system_prompt=run.data.system_prompt,
    text_on=run.loss.text_on,
    augment=run.data.flip,
  )
  return dataclasses.replace(spec, **changes)


def read_split(
  run: RunConfig, workdir: epath.PathLike, split: str
) -> tuple[list[photochat.Dialogue], photochat.Coverage]:
  """One split's dialogues; a synthetic set is written to WORKDIR/data first.

  Raises:
    ValueError: the folder has no such split, or nothing usable in it.
  """
  data = run.data
  path = data.path
  if data.source == "synthetic":
    path = synthetic.generate(
      run.seed,
      data.num_train,
      data.num_dev,
      data.num_test,
      path or epath.Path(workdir) / "data",
      data.image_size,
      data.told_share,
    )
  return photochat.read_split(path, split, data.caption_source)


def read_weights(
  run: RunConfig, workdir: epath.PathLike, model: PhotoChat
) -> TrainState:
  """The newest checkpoint, without its optimiser.

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
  state = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    state,
    sharding.state_shardings(state, mesh),
  )
  with manager.Checkpoints(
    workdir, run.checkpoint.keep, run.as_dict()["model"]
  ) as saved:
    return saved.restore(state)
