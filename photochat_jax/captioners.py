"""Who writes captions, and how: here a run of this package.

A captioner brings a photo to the form it reads (`prepare`, in any thread) and
writes the captions of a few (`write`); `caption_blip2` has another. All decode
greedily, by beam search or from the nucleus, with the same options. Samples
are keyed by (seed, photo id): no caption depends on the photos beside it.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath
from PIL import Image

from photochat_jax import config as config_lib
from photochat_jax import decoding, generate, record, writing
from photochat_jax.data import dialogue, images, schema
from photochat_jax.decoding_options import Options
from photochat_jax.ops import partition

SEES = ("vision_model", "qformer", "language_projection", "language_model")
"""The parts of `PhotoChat` that a caption comes from."""


class CaptionError(ValueError):
  """Something the user can put right; the message is one sentence."""


class Written(NamedTuple):
  """A caption; `cut` says that it was the longest and had not ended."""

  text: str
  cut: bool


class Captioner(Protocol):
  """What `caption.caption_photos` asks of one.

  Attributes:
    model: a name, the first digits of the weights' SHA-256, and the options.
    batch_size: most photos of one `write`.
  """

  model: str
  batch_size: int

  def prepare(self, image: Image.Image) -> Any:
    """An RGB photo as the model reads it."""

  def write(self, ids: Sequence[str], photos: Sequence[Any]) -> list[Written]:
    """The captions of at most `batch_size` prepared photos with these ids."""


def weights_digest(params: Mapping[str, Any]) -> str:
  """SHA-256 of the parts of `SEES` in hexadecimal, names and dtypes included.

  It does not depend on how the arrays are laid out over devices.
  """
  whole = hashlib.sha256()
  parts = {part: params[part] for part in SEES if part in params}
  for path, leaf in sorted(partition.flatten(parts).items()):
    array = np.ascontiguousarray(leaf)
    whole.update(f"{path} {array.dtype} {array.shape} ".encode())
    whole.update(array.reshape(-1).view(np.uint8))
  return whole.hexdigest()


def model_name(name: str, digest: str, options: Options, longest: int) -> str:
  """What a caption's row says of who wrote it."""
  return f"{name}@{digest[:12]} {options} <={longest}"


class OwnCaptioner:
  """A model of this package, asked as `descriptions` data teach it.

  The other side shows the photo and says nothing; what the model says then is
  the caption (`data.index.as_questions`). All prompts have one length, so that
  each of the two programs is compiled once.
  """

  def __init__(
    self, generator: generate.Generator, options: Options, name: str
  ):
    """Takes the model, tokenizer and layout of a generator.

    Args:
      generator: of a trained model; its `batch_size` photos are captioned at a
        time.
      options: see there; the longest caption is the bridge's by default.
      name: of the model, for `model`.

    Raises:
      LeftOut: a row of the run's length has no room for a photo.
    """
    self.batch_size = generator.settings.batch_size
    self._generator, self._options = generator, options
    self._longest = options.max_tokens or generator.spec.caption_tokens
    self._spec = dataclasses.replace(generator.spec, photos_in=1)
    photo = schema.Photo("", "", None, epath.Path("shown"))
    self._prompt = dialogue.encode_context(
      [schema.Turn(1, "", photo)], 0, generator.tokenizer, self._spec
    )
    self._rules = decoding.Rules.of_text(generator.tokenizer)
    self.model = model_name(
      name, weights_digest(generator.params), options, self._longest
    )

  def prepare(self, image: Image.Image) -> np.ndarray:
    """uint8[vision_size, vision_size, 3]."""
    return images.squeeze(image, self._spec.vision_size)

  def write(
    self, ids: Sequence[str], photos: Sequence[np.ndarray]
  ) -> list[Written]:
    """See `Captioner`; spare rows repeat the first photo."""
    rows = self.batch_size
    spare, tokenizer = rows - len(ids), self._generator.tokenizer
    shown = iter([*photos, *[photos[0]] * spare])
    length = len(self._prompt.tokens)
    batch = dialogue.left_pad(
      [self._prompt] * rows,
      length,
      tokenizer,
      self._spec,
      lambda _: next(shown),
    )
    numbers = [schema.number(i) for i in ids] + [0] * spare
    written, _ = writing.write(
      self._generator.model,
      self._generator.params,
      self._rules,
      self._options,
      self._longest,
      batch,
      np.arange(rows) >= len(ids),
      np.asarray(numbers, np.uint32),
      length + self._longest,
    )
    return [self._parse(row) for row in np.asarray(written)[: len(ids)]]

  def _parse(self, ids: np.ndarray) -> Written:
    ids, end = ids.tolist(), self._rules.eos
    cut = end not in ids
    ids = ids if cut else ids[: ids.index(end)]
    return Written(self._generator.tokenizer.decode(ids), cut)


def open_own(
  workdir: epath.PathLike, options: Options, batch_size: int
) -> tuple[OwnCaptioner, str]:
  """The captioner of a run's newest checkpoint.

  Args:
    workdir: the run's.
    options: how to decode.
    batch_size: photos at a time.

  Returns:
    It, and what the user should know about it: '' or one sentence.

  Raises:
    ValueError: the folder is no run, or has no checkpoint that can be read.
  """
  run = record.read(workdir)
  generator, step = generate.open_generator(run, workdir, batch_size)
  name = epath.Path(workdir).resolve().name
  return OwnCaptioner(generator, options, name), _advice(run, step)


def _advice(run: config_lib.RunConfig, step: int) -> str:
  """A warning, where what the model learnt last is not to describe."""
  last = "nothing to do with words"
  for stage in run.stages:
    if step > 0 and stage.data == "descriptions":
      last = ""
    elif step > 0 and stage.data == "dialogues":
      last = "to chat"
    step -= stage.steps
  return last and (
    f"Note: what this checkpoint learnt last is {last}, not to describe what "
    "it is shown; expect little of its captions, or take a run whose newest "
    "checkpoint ends a stage of data='descriptions'."
  )
