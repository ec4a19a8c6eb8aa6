"""Photos to look at while training: each above what the model makes of it."""

import functools
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from photochat_jax import generate, sharding
from photochat_jax.config import RunConfig, StageConfig
from photochat_jax.models.photochat import Params, PhotoChat, to_uint8
from photochat_jax.progress import Progress, sheet
from photochat_jax.runtime import cluster
from photochat_jax.state import TrainState


def kind_of(stage: StageConfig) -> str | None:
  """The kind of batch a stage's samples need; None if it makes no photo."""
  if stage.losses.autoencoder:
    return "photos"
  return "captions" if stage.losses.photo else None


def write(
  model: PhotoChat,
  run: RunConfig,
  stage: StageConfig,
  state: TrainState,
  batch: dict[str, np.ndarray],
  empty_tokens: np.ndarray,
  workdir: epath.Path,
  progress: Progress,
) -> None:
  """Writes a sheet to TensorBoard and `WORKDIR/samples/<step>/<stage>.png`.

  Every process must ask; process 0 writes.

  Args:
    model: the model.
    run: the run's settings.
    stage: an autoencoder's sheet shows reconstructions, a generator's what it
      draws from the captions.
    state: the weights.
    batch: of the kind that `kind_of` says, whole on every process.
    empty_tokens: int32[m], the empty caption for the text encoder.
    workdir: the run's folder.
    progress: where TensorBoard is.
  """
  gold = batch["photos_out"][:, 0]
  mesh = sharding.mesh_of(state.params)
  if kind_of(stage) == "photos":
    made = _reconstruct(model, state.params, sharding.place_rows(gold, mesh))
  else:
    made = generate.draw(
      model,
      generate.drawing_parts(state.params, state.ema),
      sharding.place_rows(batch["clip_tokens"][:, 0], mesh),
      empty_tokens,
      sharding.place_rows(np.arange(len(gold), dtype=np.uint32), mesh),
      state.latent_scale,
      run.eval.sampler_steps,
      run.eval.guidance,
      run.eval.sampler,
    )
  step = int(state.step)
  photos = np.concatenate([gold, sharding.to_host(made)])
  progress.photos(step, f"samples/{stage.name}", photos)
  if cluster.is_first():
    folder = workdir / "samples" / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{stage.name}.png").open("wb") as file:
      Image.fromarray(sheet(photos, len(gold))).save(file, "PNG")


@functools.partial(jax.jit, static_argnames="model")
def _reconstruct(model: PhotoChat, params: Params, photos: Any) -> jax.Array:
  mean, _ = model.encode_photo(params, photos)
  return to_uint8(model.decode_photo(params, mean))
