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

from photochat_jax import beam, chat, decoding, generate, record
from photochat_jax import config as config_lib
from photochat_jax.data import dialogue, images, schema
from photochat_jax.ops import partition

METHODS = ("greedy", "beam", "nucleus")
SEES = ("vision_model", "qformer", "language_projection", "language_model")
"""The parts of `PhotoChat` that a caption comes from."""


class CaptionError(ValueError):
  """Something the user can put right; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Options:
  """How a caption is decoded; the defaults are those of LAVIS's BLIP-2.

  Attributes:
    method: 'greedy', 'beam' (the best whole caption of several) or 'nucleus'
      (sampled from the likeliest tokens).
    num_beams: captions followed at a time, of 'beam'; 1 is greedy.
    length_penalty: of 'beam', power of the length that divides a caption's
      log-probability; 0 or above.
    top_p: of 'nucleus', probability of the tokens that may be sampled.
    temperature: of 'nucleus', above 0; logits are divided by it.
    seed: of 'nucleus'.
    max_tokens: longest caption; None takes the captioner's own.
  """

  method: str = "beam"
  num_beams: int = 5
  length_penalty: float = 1.0
  top_p: float = 0.9
  temperature: float = 1.0
  seed: int = 0
  max_tokens: int | None = None

  def __post_init__(self):
    longest = self.max_tokens
    for name, is_right, what in (
      ("method", self.method in METHODS, f"one of {', '.join(METHODS)}"),
      ("num_beams", self.num_beams >= 1, "1 or more"),
      ("length_penalty", self.length_penalty >= 0, "0 or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("temperature", self.temperature > 0, "above 0"),
      ("seed", 0 <= self.seed < 2**32, "in 0 ... 2**32 - 1"),
      ("max_tokens", longest is None or longest >= 1, "1 or more"),
    ):
      if not is_right:
        value = getattr(self, name)
        raise CaptionError(f"{name} is {value!r}; it must be {what}.")

  @property
  def beams(self) -> int:
    """Captions followed at a time; 1 where there is no beam search."""
    return self.num_beams if self.method == "beam" else 1

  def __str__(self):
    if self.beams > 1:
      return f"beam {self.num_beams} penalty {self.length_penalty:g}"
    if self.method == "nucleus":
      heat = f" t{self.temperature:g}" if self.temperature != 1 else ""
      return f"nucleus {self.top_p:g}{heat} seed {self.seed}"
    return "greedy"


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


def photo_number(photo_id: str) -> int:
  """A number below 2**32 that keys what is sampled for a photo."""
  return int.from_bytes(hashlib.sha256(photo_id.encode()).digest()[:4])


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
    rows, options = self.batch_size, self._options
    spare, tokenizer = rows - len(ids), self._generator.tokenizer
    model, params = self._generator.model, self._generator.params
    shown = iter([*photos, *[photos[0]] * spare])
    length = len(self._prompt.tokens)
    batch = dialogue.left_pad(
      [self._prompt] * rows,
      length,
      tokenizer,
      self._spec,
      lambda _: next(shown),
    )
    logits, cache = decoding.prefill(
      model, params, batch, length + self._longest
    )
    positions = batch["positions"][:, -1] + 1
    if options.beams > 1:
      written, _ = beam.decode(
        model,
        params,
        self._rules,
        self._longest,
        options.beams,
        logits,
        cache,
        positions,
        np.float32(options.length_penalty),
      )
    else:
      sampled = options.method == "nucleus"
      numbers = [photo_number(i) for i in ids] + [0] * spare
      written, _ = decoding.decode(
        model,
        params,
        self._rules,
        self._longest,
        logits,
        cache,
        positions,
        np.arange(rows) >= len(ids),
        np.float32(options.temperature if sampled else 0),
        np.uint32(options.seed),
        np.asarray(numbers, np.uint32),
        np.float32(options.top_p),
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
  generator, step = chat.open_generator(run, workdir, batch_size)
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
