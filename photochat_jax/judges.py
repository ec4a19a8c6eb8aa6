"""Networks that judge photos: CLIP and FID's Inception, from local weights.

Both are read from folders in Hugging Face's form. Without one, the figures
that need it are absent and say which file they want: nothing else can stand in
for these networks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from photochat_jax.checkpoints import clip as clip_files
from photochat_jax.checkpoints import files, settings, tables
from photochat_jax.checkpoints import inception as inception_files
from photochat_jax.data import images, tokenizers
from photochat_jax.models import clip, inception

NEEDS_CLIP = (
  "not computed: needs a folder of openai/clip-vit-base-patch32; "
  "--config.eval.clip=DIR"
)
NEEDS_INCEPTION = (
  "not computed: needs pt_inception-2015-12-05-6726825d as model.safetensors; "
  "--config.eval.inception=DIR"
)


class CLIPJudge:
  """Photos and texts as vectors of one space.

  Attributes:
    size: side in pixels of what it sees.
  """

  def __init__(self, folder: str, batch_size: int = 32):
    """Reads `config.json`, the weights and the tokenizer of a `CLIPModel`.

    Args:
      folder: with these files.
      batch_size: photos or texts at a time.

    Raises:
      WeightsError: a file is missing, damaged or of another model.
    """
    path = files.find_folder(folder)
    config = settings.read_file(path, clip_files.read_config)
    self.size, slots = (
      config.vision.image_size,
      config.text.max_position_embeddings,
    )
    try:
      self._tokenizer = tokenizers.CLIPTokenizer(path, slots)
    except ValueError as error:
      raise files.WeightsError(str(error)) from error
    # The tokenizer's own: old configs have it wrong.
    eos = self._tokenizer.eos_id
    text = dataclasses.replace(config.text, eos_token_id=eos)
    model = clip.CLIP(dataclasses.replace(config, text=text))
    shapes = jax.eval_shape(
      model.init,
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, self.size, self.size, 3), jnp.uint8),
      jax.ShapeDtypeStruct((1, slots), jnp.int32),
    )["params"]
    self._params = tables.read(
      clip_files.table(config), shapes, files.Tensors(path), np.float32
    )
    self._batch_size = batch_size
    self._see, self._read = (
      jax.jit(lambda p, x, do=do: model.apply({"params": p}, x, method=do))
      for do in ("see", "read")
    )

  def see(self, photos: Sequence[np.ndarray]) -> np.ndarray:
    """Photos uint8[H, W, 3] of any size -> float32[N, P], of length 1.

    The shorter side is brought to `size`, bicubic, and the middle kept, as
    CLIP's own image processor does.
    """
    sized = [
      images.crop_square(Image.fromarray(photo), self.size) for photo in photos
    ]
    return _batched(self._see, self._params, sized, self._batch_size)

  def read(self, texts: Sequence[str]) -> np.ndarray:
    """Texts -> float32[N, P], of length 1; long ones are cut."""
    ids = [self._tokenizer.encode_padded(text) for text in texts]
    return _batched(self._read, self._params, ids, self._batch_size)


class InceptionJudge:
  """Photos as FID and the Inception Score see them."""

  def __init__(self, folder: str, batch_size: int = 16):
    """Reads the weights.

    Args:
      folder: with `model.safetensors`.
      batch_size: photos at a time.

    Raises:
      WeightsError: they are missing, damaged or of another network.
    """
    shape = (1, inception.SIZE, inception.SIZE, 3)
    shapes = jax.eval_shape(
      inception.Inception().init,
      jax.random.key(0),
      jax.ShapeDtypeStruct(shape, jnp.float32),
    )["params"]
    self._params = tables.read(
      inception_files.table(),
      shapes,
      files.Tensors(files.find_folder(folder)),
      np.float32,
    )
    self._batch_size = batch_size
    self._look = jax.jit(
      lambda p, x: inception.Inception().apply(
        {"params": p}, inception.prepare(x)
      )
    )

  def look(self, photos: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Photos uint8[H, W, 3] of one size -> [N, 2048], [N, 1008].

    Features, and logits without their bias.
    """
    return _batched(self._look, self._params, photos, self._batch_size)


def _batched(
  program: Callable[..., Any], params: Any, items: Sequence[Any], rows: int
) -> Any:
  """Runs a program over items, `rows` at a time; at least one item."""
  found = []
  for start in range(0, len(items), rows):
    some = np.stack(items[start : start + rows])
    spare = [(0, rows - len(some))] + [(0, 0)] * (some.ndim - 1)
    found.append(program(params, np.pad(some, spare)))
  return jax.tree.map(lambda *x: np.concatenate(x)[: len(items)], *found)
