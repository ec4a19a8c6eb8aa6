"""Words and photos out of a trained model, in batches of a fixed size.

Where the parameters are divided among processes, all of them make the same
calls and get the same answers.

Axis legend: B rows, L prompt tokens, N tokens to write, X photos, m
text-encoder slots.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from photochat_jax import decoding, inputs, sharding, writing
from photochat_jax.config import RunConfig
from photochat_jax.data import dialogue, images, schema
from photochat_jax.data.spec import DataSpec
from photochat_jax.decoding_options import GREEDY, Options
from photochat_jax.models.photochat import PhotoChat

PHOTOS_KEPT = 4096
"""Photos kept in memory as the model sees them."""


class Reply(NamedTuple):
  """What the model wrote in one go.

  Attributes:
    tokens: the ids as written, with `[img]`, `[/img]` and `</s>`.
    text: what it said before the photo, or all it said.
    caption: the caption of the photo it shares; None if it shares none. A
      block which the limit left open is closed there.
    ended: whether it closed its turn with `</s>`.
    photo_score: the highest probability of `[img]` on the way there: with a
      threshold on it, "does it share a photo?" is decided more or less often.
  """

  tokens: tuple[int, ...]
  text: str
  caption: str | None
  ended: bool
  photo_score: float = 0.0


class Generator:
  """A trained model that answers and draws.

  Attributes:
    model: the composition.
    params: its parameters.
    tokenizer: the language model's.
    spec: how a dialogue becomes tokens, as in training.
    settings: `batch_size` (rows decoded, or photos drawn, at a time),
      `max_new_tokens`, `sampler`, `sampler_steps` and `guidance`, as in
      `EvalConfig`.
  """

  def __init__(
    self,
    model: PhotoChat,
    params: dict[str, Any],
    llm_tokenizer: Any,
    clip_tokenizer: Any,
    spec: DataSpec,
    settings: Any,
    latent_scale: Any = 1.0,
    ema: dict[str, Any] | None = None,
  ):
    """Keeps what is needed.

    Args:
      model: the composition.
      params: its parameters, as trained.
      llm_tokenizer: `data.tokenizers.LLMTokenizer`.
      clip_tokenizer: `data.tokenizers.CLIPTokenizer`.
      spec: how a dialogue becomes tokens, as in training.
      settings: see the attributes.
      latent_scale: what latents are multiplied by.
      ema: averaged parts, which draw instead of those in `params`.
    """
    self.model = model
    self.params = params
    self.tokenizer = llm_tokenizer
    self.spec = spec
    self.settings = settings
    self._clip_tokenizer = clip_tokenizer
    self._latent_scale = latent_scale
    self._drawing = drawing_parts(params, ema or {})
    self._mesh = sharding.mesh_of(params)
    self._rules = decoding.Rules.of(llm_tokenizer, spec.caption_tokens)
    self._photos: dict[str, np.ndarray] = {}

  def see(self, photo: schema.Photo) -> np.ndarray:
    """A photo as the model sees it, uint8[vision_size, vision_size, 3].

    It is read once: what a user shows may be gone at the next turn.

    Raises:
      images.ImageError: it cannot be read.
    """
    path = str(photo.path)
    if path not in self._photos:
      if len(self._photos) >= PHOTOS_KEPT:
        self._photos.pop(next(iter(self._photos)))
      self._photos[path] = images.load_vision(path, self.spec.vision_size)
    return self._photos[path]

  def respond(
    self,
    contexts: Sequence[dialogue.Context],
    length: int | None = None,
    options: Options = GREEDY,
    numbers: Sequence[int] | None = None,
  ) -> list[Reply]:
    """Goes on where each context ends.

    Args:
      contexts: any number, from `dialogue.encode_context`.
      length: prompts are padded to it; `spec.length` by default. Each length
        is compiled once.
      options: how to decode.
      numbers: below 2**32, one for each context: its samples follow from it
        and the options' seed. By default its place.
    """
    rows = self.settings.batch_size
    if numbers is None:
      numbers = range(len(contexts))
    replies = []
    for start in range(0, len(contexts), rows):
      chunk = list(contexts[start : start + rows])
      spare = rows - len(chunk)
      batch = dialogue.left_pad(
        chunk + [chunk[0]] * spare,
        self.spec.length if length is None else length,
        self.tokenizer,
        self.spec,
        self.see,
      )
      done = np.arange(rows) >= len(chunk)
      keys = np.pad(
        np.asarray(numbers[start : start + rows], np.uint32), (0, spare)
      )
      written = self.run(self._write, batch, options, done, keys)
      replies.extend(map(self._parse, *(x[: len(chunk)] for x in written)))
    return replies

  def run(self, program: Callable[..., Any], batch: Any, *args) -> Any:
    """Runs a program on the devices that hold the parameters.

    Args:
      program: called with the batch and `args`.
      batch: tree of arrays with the rows first, the same on every process.
      *args: passed on.

    Returns:
      The program's result in numpy arrays, whole on every process.
    """
    with sharding.on_mesh(self._mesh):
      batch = sharding.place_rows(batch, self._mesh)
      return sharding.to_host(program(batch, *args))

  def _write(self, batch, options, done, numbers):
    """What `writing.write` gives for a padded batch."""
    new = options.max_tokens or self.settings.max_new_tokens
    slots = max(batch["tokens"].shape[1], self.spec.length) + new
    return writing.write(
      self.model,
      self.params,
      self._rules,
      options,
      new,
      batch,
      done,
      numbers,
      slots,
    )

  def _parse(self, ids: np.ndarray, photo_score: np.ndarray) -> Reply:
    rules, ids = self._rules, ids.tolist()
    stops = [i for i, t in enumerate(ids) if t in (rules.eos, rules.end_img)]
    ids = ids[: stops[0] + 1] if stops else ids
    text, caption = ids, None
    if rules.img in ids:
      start = ids.index(rules.img)
      text, caption = ids[:start], self.tokenizer.decode(ids[start:]).strip()
    return Reply(
      tokens=tuple(ids),
      text=self.tokenizer.decode(text).strip(),
      caption=caption,
      ended=bool(ids) and ids[-1] == rules.eos,
      photo_score=float(photo_score),
    )

  def draw(self, captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """Draws a photo of each caption, re-tokenised for the text encoder.

    Args:
      captions: X texts.
      seeds: X numbers below 2**32; a photo depends on its caption and its
        seed alone.

    Returns:
      uint8[X, H, W, 3].
    """
    rows = self.settings.batch_size
    encode = self._clip_tokenizer.encode_padded
    photos = [np.zeros((0, *self.model.photo_shape), np.uint8)]
    for start in range(0, len(captions), rows):
      ids = np.stack([encode(c) for c in captions[start : start + rows]])
      some = np.asarray(seeds[start : start + rows], np.uint32)
      spare = (0, rows - len(ids))
      batch = np.pad(ids, (spare, (0, 0)), "edge"), np.pad(some, spare)
      photos.append(self.run(self._paint, batch)[: len(ids)])
    return np.concatenate(photos)

  def _paint(self, batch):
    """Photos uint8[X, H, W, 3] of (clip_tokens int32[X, m], seeds [X])."""
    clip_tokens, seeds = batch
    return draw(
      self.model,
      self._drawing,
      clip_tokens,
      self._clip_tokenizer.encode_padded(""),
      seeds,
      self._latent_scale,
      self.settings.sampler_steps,
      self.settings.guidance,
      self.settings.sampler,
    )


def open_generator(
  run: RunConfig,
  workdir: epath.PathLike,
  batch_size: int | None = None,
) -> tuple[Generator, int]:
  """The model of a run's newest checkpoint, and its step.

  Args:
    run: the run's settings.
    workdir: its folder.
    batch_size: rows at a time; `run.eval.batch_size` by default.

  Raises:
    CheckpointError: there is no checkpoint, or it is of another config.
  """
  model = PhotoChat(run.model)
  state = inputs.read_weights(run, workdir, model)
  settings = run.eval
  if batch_size is not None:
    settings = dataclasses.replace(settings, batch_size=batch_size)
  generator = Generator(
    model,
    state.params,
    *inputs.load_tokenizers(run),
    inputs.data_spec(run, settings.batch_size, augment=False),
    settings,
    latent_scale=state.latent_scale,
    ema=state.ema,
  )
  return generator, int(state.step)


def drawing_parts(
  params: dict[str, Any], ema: dict[str, Any]
) -> dict[str, Any]:
  """The parts that draw, averaged where there is an average."""
  parts = {**params, **ema}
  return {part: parts[part] for part in ("text_model", "unet", "vae")}


@functools.partial(
  jax.jit, static_argnames=("model", "num_steps", "guidance_scale", "sampler")
)
def draw(
  model: PhotoChat,
  params: dict[str, Any],
  clip_tokens: jax.Array,
  empty_tokens: jax.Array,
  seeds: jax.Array,
  latent_scale: jax.Array,
  num_steps: int,
  guidance_scale: float,
  sampler: str = "ddim",
) -> jax.Array:
  """`PhotoChat.draw` as one program, with seeds uint32[X] for keys."""
  return model.draw(
    params,
    clip_tokens,
    empty_tokens,
    jax.vmap(jax.random.key)(seeds),
    latent_scale,
    num_steps,
    guidance_scale,
    sampler,
  )
