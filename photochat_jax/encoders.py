"""The two networks that read photos, as functions whose results can be kept.

`tools/precompute.py` fills a store with what they make, and the trainer opens
it: both ask here for the name of the network, so they cannot disagree.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from photochat_jax.config import RunConfig
from photochat_jax.data import images, moments
from photochat_jax.models import vit
from photochat_jax.models.photochat import Params, PhotoChat
from photochat_jax.ops import partition

# What each kind applies: (part, regex of the parameters in it).
_APPLIED = {
  "moments": ("vae", "(encoder|quant_conv)/.*"),
  "features": ("vision_model", ".*"),
}


@dataclasses.dataclass(frozen=True)
class Encoder:
  """How a model makes one kind of array of a photo.

  Attributes:
    model: the composition.
    kind: 'moments' or 'features'.
  """

  model: PhotoChat
  kind: str

  @property
  def part(self) -> str:
    """The part of the parameters that it applies."""
    return _APPLIED[self.kind][0]

  @property
  def size(self) -> int:
    """Side in pixels of the photos that it reads."""
    if self.kind == "moments":
      return self.model.photo_shape[0]
    return self.model.config.vision.image_size

  @property
  def transform(self) -> str:
    """Says how photos are prepared for it."""
    if self.kind == "moments":
      tile_size = self.model.config.vae.tile_size
      return moments.photo_transform(self.size, tile_size)
    return moments.vision_transform(self.size)

  @property
  def settings(self) -> dict[str, Any]:
    """What changes its result and neither a path nor a shape."""
    config = self.model.config
    if self.kind == "moments":
      return {"norm_num_groups": config.vae.norm_num_groups}
    names = ("patch_size", "num_attention_heads", "layer_norm_eps")
    return {name: getattr(config.vision, name) for name in names}

  def applied(self, part: Mapping[str, Any]) -> dict[str, Any]:
    """`{path: leaf}` of what it applies of its part of the parameters."""
    regex = re.compile(_APPLIED[self.kind][1])
    leaves = partition.flatten(part)
    return {p: leaf for p, leaf in leaves.items() if regex.fullmatch(p)}

  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """`{path: leaf}` of what it applies, in the shapes of the model."""
    photo = jax.ShapeDtypeStruct((1, self.size, self.size, 3), jnp.float32)
    network = self.model.parts[self.part]
    made = jax.eval_shape(network.init, jax.random.key(0), photo)
    return self.applied(made["params"])

  def prepare(self, image: Image.Image) -> np.ndarray:
    """A decoded photo -> uint8[size, size, 3].

    As `images.load_photo` and `images.load_vision` do.
    """
    if self.kind == "moments":
      return images.crop_square(image, self.size)
    return images.squeeze(image, self.size)

  def __call__(self, params: Params, photos: jax.Array) -> jax.Array:
    """Photos uint8[X, size, size, 3] -> float16[2, X, ...].

    Of the photos first, then of their mirror images: [h, w, 2 C] for moments,
    the mean before the log-variance, [T, D] for features.
    """

    def encode(photos):
      if self.kind == "moments":
        return jnp.concatenate(self.model.encode_photo(params, photos), -1)
      return self.model.parts[self.part].apply(
        {"params": params[self.part]}, vit.normalise(photos)
      )

    # One after the other: half the memory, and half the program.
    made = jax.lax.map(encode, jnp.stack([photos, photos[:, :, ::-1]]))
    return made.astype(jnp.float16)


def identity(
  run: RunConfig, params: Params, kind: str = "moments"
) -> tuple[str, str]:
  """What `moments.open_store` is to be told: (weights_hash, transform).

  Every process must ask where the parameters are divided among processes.

  Args:
    run: the run.
    params: its parameters; those that the kind applies are enough.
    kind: 'moments' or 'features'.
  """
  encoder = Encoder(PhotoChat(run.model), kind)
  arrays = {
    path: array
    if getattr(array, "is_fully_addressable", True)
    else multihost_utils.process_allgather(array, tiled=True)
    for path, array in encoder.applied(params[encoder.part]).items()
  }
  return moments.weights_hash(arrays, encoder.settings), encoder.transform
