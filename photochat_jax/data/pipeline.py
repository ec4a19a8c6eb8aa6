"""Dialogues or photos -> batches: a pure function of (seed, stage, step).

Every (dialogue, side) is tokenised and aligned once (`data.index`), when a
`Pipeline` is made; a batch only copies arrays into place. Which examples stand
in which row is the plan of `data.packing`, so the whole state of the input is
one integer.

Axis legend: B rows, L tokens, P photos in and Q photos out of a row, n caption
positions, m text-encoder slots.
"""

import collections
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from photochat_jax.data import images, packing, schema
from photochat_jax.data import index as index_lib
from photochat_jax.data.spec import DataSpec

Shapes = dict[str, tuple[tuple[int, ...], Any]]
_PACKED = ("dialogues", "descriptions")

KINDS = ("dialogues", "descriptions", "captions", "photos")

# Decoded photos that are kept in memory, in bytes of pixels.
PHOTO_CACHE_BYTES = 2 << 30


class PhotoCache:
  """Decoded photos, kept while there is room; the first ones stay."""

  def __init__(self, max_bytes: int = PHOTO_CACHE_BYTES):
    self._room = max_bytes
    self._photos: dict[tuple, np.ndarray | None] = {}

  def get(self, photo: schema.Photo, load: Callable, size: int):
    """uint8[size, size, 3], or None for a file that is no photo."""
    key = (str(photo.path), load.__name__, size)
    if key in self._photos:
      return self._photos[key]
    try:
      pixels = load(photo.path, size)
    except images.ImageError as e:
      logging.warning("Photo %s is left out: %s", photo.id, e)
      pixels = None
    cost = 0 if pixels is None else pixels.nbytes
    if cost <= self._room:
      self._room -= cost
      self._photos[key] = pixels
    return pixels


class Pipeline:
  """Batches of one kind of example from some dialogues.

  Kind 'dialogues' packs dialogues, each from each side, into rows; the
  arrays of a batch, each with B first:

    tokens, segments (0 is padding), positions (restart per segment)  int32[L]
    loss_kind      int8[L]   of the token that is the target
    visual_index   int32[L]  p * K + k into the row's visual tokens, or -1
    photos_in      uint8[P, Hv, Wv, 3]    photos_in_mask   bool[P]
    photos_out     uint8[Q, Ho, Wo, 3]    photos_out_mask  bool[Q]
    caption_index  int32[Q, n]  the position that predicts each caption token
    caption_tokens int32[Q, n]            caption_mask, caption_final bool[Q, n]
    clip_tokens    int32[Q, m]            alignment        float32[Q, m, n]
    example_id     uint32[Q]    unique for (dialogue, side, photo)

  Kind 'descriptions' has the same arrays: short dialogues in which a photo is
  shown and the model says its fullest caption.

  Kinds 'captions' and 'photos' have one photo a row: photos_out,
  photos_out_mask and example_id with Q = 1, and for 'captions' clip_tokens of
  the fullest caption there is.

  A file that is no photo is masked where it is met (its visual slots become
  padding), and counted by `describe`.
  """

  def __init__(
    self,
    dialogues: Sequence[schema.Dialogue],
    kind: str,
    spec: DataSpec,
    llm_tokenizer: Any,
    clip_tokenizer: Any,
    seed: int = 0,
    stage: str | int = 0,
    shard: tuple[int, int] = (0, 1),
    photo_cache: PhotoCache | None = None,
  ):
    """Indexes the dialogues.

    Args:
      dialogues: of one split.
      kind: one of `KINDS`.
      spec: shapes; `spec.batch_size` is that of all hosts together.
      llm_tokenizer: the language model's.
      clip_tokenizer: the text encoder's.
      seed: of the run.
      stage: of the training; stages see the data in different orders.
      shard: (host, hosts): which slice of each batch this one makes; every
        host must find the same files.
      photo_cache: shared between pipelines, or None for a new one.

    Raises:
      ValueError: no example can be made, or hosts do not divide the batch.
    """
    if kind not in KINDS:
      raise ValueError(f"kind is {kind!r}; it must be one of {KINDS}.")
    if spec.batch_size % shard[1]:
      raise ValueError(
        f"A batch of {spec.batch_size} does not divide by {shard[1]} hosts; "
        "choose a batch size that does."
      )
    self.kind, self.spec = kind, spec
    self._llm, self._clip = llm_tokenizer, clip_tokenizer
    self._key = (seed, packing.stage_number(stage))
    share = spec.batch_size // shard[1]
    self._rows = slice(shard[0] * share, (shard[0] + 1) * share)
    self._photos = photo_cache or PhotoCache()
    self._broken: set[str] = set()
    if kind == "descriptions":
      dialogues = index_lib.as_questions(dialogues)
    self._packed = kind in _PACKED
    if self._packed:
      self._examples, self._counts = index_lib.build_index(
        dialogues, spec, llm_tokenizer, clip_tokenizer
      )
      sizes = [
        (len(e.example.tokens), len(e.example.photos), len(e.caption_ids))
        for e in self._examples
      ]
      limits = (spec.length, spec.photos_in, spec.photos_out)
    else:
      self._examples = index_lib.list_pictures(dialogues, kind == "captions")
      self._counts = collections.Counter(
        dialogues=len(dialogues), examples=len(self._examples)
      )
      sizes, limits = [(1,)] * len(self._examples), (1,)
    if not self._examples:
      raise ValueError(
        f"None of {len(dialogues)} dialogues gives an example of kind "
        f"{kind!r} ({dict(self._counts)}); look at the data's folder."
      )
    self.plan = packing.Plan(
      np.asarray(sizes), limits, spec.batch_size, seed, stage,
      spec.drop_remainder,
    )  # fmt: skip

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """This host's rows of a step's batch."""
    rows = self.plan.batch(step)[self._rows]
    out = {
      name: np.zeros((len(rows), *shape), dtype)
      for name, (shape, dtype) in self.element_spec().items()
    }
    write = (
      self._write_dialogue if self._packed else self._write_picture
    )
    for name in ("tokens", "caption_tokens"):
      if name in out:
        out[name].fill(self._llm.pad_id)
    if "visual_index" in out:
      out["visual_index"].fill(-1)
    if "clip_tokens" in out:
      out["clip_tokens"][:] = self._empty_caption
    for b, items in enumerate(rows):
      row = {name: array[b] for name, array in out.items()}
      write(row, [self._examples[i] for i in items], step)
    return out

  def batches(
    self, start: int = 0, num: int | None = None
  ) -> Iterator[dict[str, np.ndarray]]:
    """Batches of steps start, start + 1, ... (`num` of them, or for ever).

    They are made ahead of their use, by tf.data's threads.
    """
    tf = _tensorflow()
    spec = self.element_spec()
    failed: list[Exception] = []

    def make(step):
      try:
        batch = self.batch(int(step))
      except Exception as e:  # tf.data would wrap it in an error of its own.
        failed.append(e)
        raise
      return [batch[name] for name in spec]

    stop = np.iinfo(np.int64).max if num is None else start + num
    dtypes = [dtype for _, dtype in spec.values()]
    dataset = (
      tf.data.Dataset.range(start, stop)
      .map(
        lambda step: tf.numpy_function(make, [step], dtypes),
        num_parallel_calls=2,
        deterministic=True,
      )
      .prefetch(2)
    )
    try:
      for arrays in dataset.as_numpy_iterator():
        yield dict(zip(spec, arrays, strict=True))
    except tf.errors.OpError:
      if failed:
        raise failed[0] from None
      raise

  def element_spec(self) -> Shapes:
    """Shape without B, and dtype, of every array of a batch."""
    return element_spec(self.spec, self.kind, self._clip.max_length)

  def describe(self) -> dict[str, float]:
    """Counts of what the data hold and of what was left out or cut."""
    rows = self.plan.rows_of_epoch(0)
    used = [i for row in rows for i in row]
    out = dict(self._counts) | {
      "batches_per_epoch": len(rows) // self.spec.batch_size,
      "examples_per_epoch": len(used),
      "photos_broken": len(self._broken),
    }
    if self._packed:
      tokens = sum(len(self._examples[i].example.tokens) for i in used)
      out["row_fill"] = tokens / (len(rows) * self.spec.length)
    return out

  @functools.cached_property
  def _empty_caption(self) -> np.ndarray:
    return self._clip.encode_padded("")

  def _load(self, photo, load, size, number, step) -> np.ndarray | None:
    pixels = self._photos.get(photo, load, size)
    if pixels is None:
      self._broken.add(photo.id)
    elif self.spec.augment:
      bits = packing.random_bits(1, *self._key, step, number)
      if bits[0] & 1:
        return pixels[:, ::-1]
    return pixels

  def _load_out(self, row, q, photo, number, step) -> None:
    """Writes a photo to draw, and its mask where there is one."""
    row["example_id"][q] = number
    if photo.path is None:
      return
    size = self.spec.photo_size
    pixels = self._load(photo, images.load_photo, size, number, step)
    if pixels is not None:
      row["photos_out"][q] = pixels
      row["photos_out_mask"][q] = True

  def _write_picture(self, row, pictures, step) -> None:
    for picture in pictures:
      self._load_out(row, 0, picture.photo, picture.number, step)
      if self.kind == "captions":
        row["clip_tokens"][0] = self._clip.encode_padded(picture.caption)

  def _write_dialogue(self, row, examples, step) -> None:
    """Lays examples after one another in a row."""
    start = p = q = 0
    for segment, (example, aligned, photo_ids, caption_ids) in enumerate(
      examples, start=1
    ):
      count = len(example.tokens)
      here = slice(start, start + count)
      row["tokens"][here] = example.tokens
      row["segments"][here] = segment
      row["positions"][here] = np.arange(count)
      row["loss_kind"][here] = example.loss_kind
      k = self.spec.num_visual_tokens
      visual = example.visual_index
      row["visual_index"][here] = np.where(visual < 0, -1, visual + p * k)
      for photo, number in zip(example.photos, photo_ids, strict=True):
        pixels = self._load(
          photo, images.load_vision, self.spec.vision_size, number, step
        )
        if pixels is None:
          slots = row["visual_index"] // k == p
          row["visual_index"][slots] = -1
        else:
          row["photos_in"][p] = pixels
          row["photos_in_mask"][p] = True
        p += 1
      for caption, bridge, number in zip(
        example.captions, aligned, caption_ids, strict=True
      ):
        n = len(caption.tokens)
        first = start + caption.start - 1
        row["caption_index"][q, :n] = np.arange(first, first + n)
        row["caption_mask"][q, :n] = True
        row["caption_tokens"][q, :n] = caption.tokens
        row["caption_final"][q, :n] = bridge.final
        row["clip_tokens"][q] = bridge.clip_tokens
        slots = len(bridge.alignment)
        row["alignment"][q, :slots, :n] = bridge.alignment
        self._load_out(row, q, caption.photo, number, step)
        q += 1
      start += count


def element_spec(spec: DataSpec, kind: str, slots: int) -> Shapes:
  """Shape without B, and dtype, of every array of a batch.

  Args:
    spec: shapes.
    kind: 'photos', 'captions', 'descriptions' or 'dialogues'.
    slots: of the text encoder, m.
  """
  length, n = spec.length, spec.caption_tokens
  packed = kind in _PACKED
  q = spec.photos_out if packed else 1
  shapes = {
    "photos_out": ((q, spec.photo_size, spec.photo_size, 3), np.uint8),
    "photos_out_mask": ((q,), np.bool_),
    "example_id": ((q,), np.uint32),
  }
  if kind != "photos":
    shapes["clip_tokens"] = ((q, slots), np.int32)
  if packed:
    seen = (spec.photos_in, spec.vision_size, spec.vision_size, 3)
    shapes |= {
      "tokens": ((length,), np.int32),
      "segments": ((length,), np.int32),
      "positions": ((length,), np.int32),
      "loss_kind": ((length,), np.int8),
      "visual_index": ((length,), np.int32),
      "photos_in": (seen, np.uint8),
      "photos_in_mask": ((spec.photos_in,), np.bool_),
      "caption_index": ((q, n), np.int32),
      "caption_mask": ((q, n), np.bool_),
      "caption_tokens": ((q, n), np.int32),
      "caption_final": ((q, n), np.bool_),
      "alignment": ((q, slots, n), np.float32),
    }
  return shapes


def _tensorflow() -> Any:
  """TensorFlow, off every accelerator: they belong to JAX."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  # It only moves arrays here; with oneDNN on it tells every user of it.
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  import tensorflow as tf

  for device in ("GPU", "TPU"):
    tf.config.set_visible_devices([], device)
  return tf
