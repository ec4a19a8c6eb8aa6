"""Dialogues or photos -> batches: a pure function of (seed, stage, step).

Every (dialogue, side) is tokenised and aligned once (`data.index`), when a
`Pipeline` is made; a batch only copies arrays into place. Which examples stand
in which row is the plan of `data.packing`, so the whole state of the input is
one integer. A pipeline has one shape of batch, so a stage compiles one program.

Axis legend: B rows, L tokens, P photos in and Q photos out of a row, n caption
positions, m text-encoder slots, h x w x C latents.
"""

import collections
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from photochat_jax.data import index as index_lib
from photochat_jax.data import packing, schema
from photochat_jax.data.loading import Loader, Moments, PhotoCache
from photochat_jax.data.spec import (
  KINDS,
  PACKED,
  DataSpec,
  Shapes,
  element_spec,
)

# Batches made at a time: decoding lets go of Python's lock.
_THREADS = min(max((os.cpu_count() or 2) // 2, 2), 16)


class Part(NamedTuple):
  """A set of dialogues that is mixed in.

  Attributes:
    name: for counts.
    weight: how many rows it has to one of the main set.
    dialogues: of one split.
  """

  name: str
  weight: float
  dialogues: Sequence[schema.Dialogue]


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
    example_id     uint32[Q]    unique for (set, dialogue, side, photo)

  Kind 'descriptions' has the same arrays: short dialogues in which a photo is
  shown and the model says its fullest caption.

  Kinds 'captions' and 'photos' have one photo a row: photos_out,
  photos_out_mask and example_id with Q = 1, and for 'captions' clip_tokens of
  the fullest caption there is.

  Where the spec says `moments`, float32 moments[Q, h, w, 2 C] take the place
  of photos_out.

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
    rows: Sequence[int] | None = None,
    photo_cache: PhotoCache | None = None,
    mix: Sequence[Part] = (),
    moments: Moments | None = None,
    name: str = "main",
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
      rows: those of each batch that this host makes; all of them by default.
        Every host must find the same files.
      photo_cache: shared between pipelines, or None for a new one.
      mix: further sets (`packing.Mixture`); `dialogues` have weight 1. One
        that gives no example is left out, and counted.
      moments: of the photos to draw, where the spec wants them.
      name: of `dialogues`, for counts.

    Raises:
      ValueError: no example can be made.
    """
    if kind not in KINDS:
      raise ValueError(f"kind is {kind!r}; it must be one of {KINDS}.")
    self.kind, self.spec = kind, spec
    self._llm, self._clip = llm_tokenizer, clip_tokenizer
    self._rows = tuple(range(spec.batch_size) if rows is None else rows)
    self._packed = kind in PACKED
    key = (seed, packing.stage_number(stage))
    self._loader = Loader(spec, key, photo_cache or PhotoCache(), moments)
    self._examples: list[Any] = []
    self._counts: collections.Counter = collections.Counter()
    self._parts: list[tuple[str, float, int]] = []
    first_id = 0
    for part in (Part(name, 1.0, dialogues), *mix):
      examples, counts, first_id = self._index(part.dialogues, first_id)
      self._examples += examples
      self._counts.update(counts)
      if examples:
        self._parts.append((part.name, part.weight, len(examples)))
      elif mix:
        self._counts[f"sets_without_examples/{part.name}"] = 1
    if not self._examples:
      raise ValueError(
        f"None of {self._counts['dialogues']} dialogues gives an example of "
        f"kind {kind!r} ({dict(self._counts)}); look at the data's folder."
      )
    if moments is not None and spec.moments:
      drawn = [photo for e in self._examples for photo in self._drawn(e)]
      self._counts["moments_missing"] = sum(
        p.path is not None and p.id not in moments for p in drawn
      )
    self.plan = self._make_plan(seed, stage)

  def _index(self, dialogues, first_id):
    """A set's examples, their counts, and the first number left."""
    if self.kind == "descriptions":
      dialogues = index_lib.as_questions(dialogues)
    if self._packed:
      return index_lib.build_index(
        dialogues, self.spec, self._llm, self._clip, first_id
      )
    captioned = self.kind == "captions"
    pictures = index_lib.list_pictures(dialogues, captioned, first_id)
    counts = {"dialogues": len(dialogues), "examples": len(pictures)}
    last = max((picture.number for picture in pictures), default=first_id - 1)
    return pictures, counts, last + 1

  def _make_plan(self, seed, stage) -> packing.Plan | packing.Mixture:
    spec = self.spec
    limits = (spec.length, spec.photos_in, spec.photos_out)
    if self._packed:
      sizes = np.asarray(
        [
          (len(e.example.tokens), len(e.example.photos), len(e.caption_ids))
          for e in self._examples
        ]
      )
    else:
      limits, sizes = (1,), np.ones((len(self._examples), 1), np.int64)
    self._sizes, self._limits = sizes, np.asarray(limits)
    if len(self._parts) == 1:
      return packing.Plan(
        sizes, limits, spec.batch_size, seed, stage, spec.drop_remainder
      )
    _, weights, counts = zip(*self._parts, strict=True)
    return packing.Mixture(
      np.split(sizes, np.cumsum(counts)[:-1]),
      weights, limits, spec.batch_size, seed, stage,
    )  # fmt: skip

  def _drawn(self, example) -> Sequence[schema.Photo]:
    if self._packed:
      return [caption.photo for caption in example.example.captions]
    return [example.photo]

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """This host's rows of a step's batch."""
    whole = self.plan.batch(step)
    rows = [whole[row] for row in self._rows]
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

  def names(self, step: int) -> list[str]:
    """What the whole batch of a step, of all hosts, is made of."""
    return [
      self._examples[i].name
      if self._packed
      else f"photo {self._examples[i].photo.id}"
      for row in self.plan.batch(step)
      for i in row
    ]

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
        num_parallel_calls=_THREADS,
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

  @property
  def broken_photos(self) -> dict[str, str]:
    """Id of each photo met so far that cannot be used -> why."""
    return dict(self._loader.broken)

  def describe(self) -> dict[str, float]:
    """Counts of what the data hold and of what was left out or cut.

    `row_fill`, `photos_in_fill` and `photos_out_fill` are the shares of
    tokens and photos of an epoch's rows that hold something. Of a mixture,
    `share/NAME` is a set's share of rows, and `batches_per_epoch/NAME` how
    many batches it takes to use all of the set once.
    """
    out = dict(self._counts) | {"photos_broken": len(self._loader.broken)}
    size = self.spec.batch_size
    if isinstance(self.plan, packing.Plan):
      rows = self.plan.rows_of_epoch(0)
      out["batches_per_epoch"] = len(rows) // size
      out["examples_per_epoch"] = sum(map(len, rows))
      fill = self._fill(rows)
    else:
      fill, first = 0.0, 0
      for (name, _, count), share, plan in zip(
        self._parts, self.plan.shares, self.plan.plans, strict=True
      ):
        rows = [first + row for row in plan.rows_of_epoch(0)]
        out[f"share/{name}"] = share
        out[f"examples/{name}"] = count
        out[f"batches_per_epoch/{name}"] = len(rows) / share / size
        fill, first = fill + share * self._fill(rows), first + count
    if self._packed:
      names = ("row_fill", "photos_in_fill", "photos_out_fill")
      out |= dict(zip(names, map(float, fill), strict=True))
    return out

  def _fill(self, rows: Sequence[np.ndarray]) -> np.ndarray:
    used = self._sizes[np.concatenate(rows)].sum(axis=0)
    # Of a limit of 0 nothing is used.
    return used / np.maximum(len(rows) * self._limits, 1)

  @functools.cached_property
  def _empty_caption(self) -> np.ndarray:
    return self._clip.encode_padded("")

  def _load_out(self, row, q, photo, number, step) -> None:
    """Writes a photo to draw, and its mask where there is one."""
    row["example_id"][q] = number
    array = self._loader.drawn(photo, number, step)
    if array is not None:
      row[self._loader.target][q] = array
      row["photos_out_mask"][q] = True

  def _write_picture(self, row, pictures, step) -> None:
    for picture in pictures:
      self._load_out(row, 0, picture.photo, picture.number, step)
      if self.kind == "captions":
        row["clip_tokens"][0] = self._clip.encode_padded(picture.caption)

  def _write_dialogue(self, row, examples, step) -> None:
    """Lays examples after one another in a row."""
    start = p = q = 0
    for segment, indexed in enumerate(examples, start=1):
      example, aligned, photo_ids, caption_ids, _ = indexed
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
        pixels = self._loader.seen(photo, number, step)
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


def _tensorflow() -> Any:
  """TensorFlow, off every accelerator: they belong to JAX."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  # It only moves arrays here; with oneDNN on it tells every user of it.
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  import tensorflow as tf

  for device in ("GPU", "TPU"):
    tf.config.set_visible_devices([], device)
  return tf
