"""How the autoencoder's latents are scaled for the generator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from photochat_jax import sharding
from photochat_jax.data import pipeline
from photochat_jax.models.photochat import Params, PhotoChat

MEASURED_PHOTOS = 512
"""Photos that the scale is measured on, at most."""


def measure_scale(
  model: PhotoChat,
  params: Params,
  data: pipeline.Pipeline,
  limit: int = MEASURED_PHOTOS,
) -> jax.Array:
  """1 / the standard deviation of the latents, as for Stable Diffusion.

  Every process must ask.

  Args:
    model: the model.
    params: its parameters.
    data: of photos, whole on every process.
    limit: photos to measure, of which there may be fewer.

  Returns:
    A float32 scalar on every device.

  Raises:
    ValueError: none of the photos can be used.
  """
  mesh = sharding.mesh_of(params)
  count, mean, spread = 0.0, 0.0, 0.0
  photos = min(limit, int(data.describe()["examples"]))
  for batch in data.batches(0, -(-photos // data.spec.batch_size)):
    there = {name: batch[name] for name in ("photos_out", "photos_out_mask")}
    found = _moments(model, params, sharding.place_rows(there, mesh))
    more, its_mean, its_spread = map(float, found)
    if more:
      # Chan, Golub and LeVeque 1983, eq. 2.1.
      apart = its_mean - mean
      spread += its_spread + apart**2 * count * more / (count + more)
      mean += apart * more / (count + more)
      count += more
  if not count:
    raise ValueError(
      "The scale of the latents cannot be measured: none of the photos can be "
      "used, see quarantine.jsonl."
    )
  scale = np.float32(np.sqrt(count / spread))
  logging.info("The latents' scale is %.4f.", scale)
  return jnp.asarray(sharding.place_rows(scale, mesh))


@functools.partial(jax.jit, static_argnames="model")
def _moments(
  model: PhotoChat, params: Params, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """How many numbers latents are, their mean, and its summed squared error."""
  photos = batch["photos_out"]
  photos = photos.reshape(-1, *photos.shape[2:])
  latents, _ = model.encode_photo(params, photos)
  latents = latents.astype(jnp.float32)
  mask = batch["photos_out_mask"].reshape(-1, 1, 1, 1)
  count = jnp.sum(mask) * latents[0].size
  mean = jnp.sum(jnp.where(mask, latents, 0.0)) / jnp.maximum(count, 1)
  return count, mean, jnp.sum(jnp.where(mask, (latents - mean) ** 2, 0.0))
