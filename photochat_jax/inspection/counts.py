"""Counts of a split: what it holds, and what training makes of it.

A word stands between white space. Tokens of a turn are those of its text by
itself, of a dialogue the sum over its turns, without the template. A photo's
turn is counted from 0; its place is the share of the other turns that stand
before it. An example is a dialogue from one side, as training reads it, with
template, captions and visual slots.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from photochat_jax.data import dialogue as dialogue_lib
from photochat_jax.data import packing, records, schema
from photochat_jax.data.spec import DataSpec, LeftOut
from photochat_jax.inspection import layout

NAMED = 20
"""How many missing photos, or broken records, are told."""
BINS = 24
"""Most bins of a histogram."""

_ROWS = 6  # Rows of a batch that are drawn.
_STEPS = (1, 2, 5)  # Times a power of ten: widths of a bin.


class Segment(NamedTuple):
  """An example in a row: whose, and its tokens as (kind, how many)."""

  dialogue: str
  speaker: int
  runs: tuple[tuple[str, int], ...]


def summarise(values: Sequence[float]) -> dict[str, float | None]:
  """Count, sum, mean, median, 95th percentile and maximum; None of nothing."""
  if not len(values):
    empty = dict.fromkeys(("mean", "median", "p95", "max"))
    return {"count": 0, "sum": 0} | empty
  array = np.asarray(values)
  return {
    "count": len(array),
    "sum": array.sum().item(),
    "mean": float(array.mean()),
    "median": float(np.median(array)),
    "p95": float(np.percentile(array, 95)),
    "max": array.max().item(),
  }


def histogram(values: Sequence[float], share: bool = False) -> dict[str, Any]:
  """Counts of values in bins of one width.

  Args:
    values: whole numbers; with `share`, numbers from 0 to 1.
    share: take ten bins, the last of which holds 1 too.

  Returns:
    `start` of the first bin, `step`, and the `counts` of the bins.
  """
  if share:
    counts, _ = np.histogram(values, 10, (0, 1))
    return {"start": 0.0, "step": 0.1, "counts": counts.tolist()}
  if not len(values):
    return {"start": 0, "step": 1, "counts": []}
  array = np.asarray(values)
  low, high = int(array.min()), int(array.max())
  widths = (s * 10**power for power in range(20) for s in _STEPS)
  step = next(w for w in widths if high // w - low // w < BINS)
  counts = np.bincount(array // step - low // step)
  return {
    "start": low // step * step, "step": step, "counts": counts.tolist()
  }  # fmt: skip


def common(things: Iterable[Any]) -> dict[Any, int]:
  """How often each thing is there, commonest first."""
  return dict(collections.Counter(things).most_common())


def count_captions(captions: Sequence[str | None]) -> dict[str, Any]:
  """Captions of the photos that a split shares, each time counted."""
  there = [caption for caption in captions if caption is not None]
  return {
    "with": len(there),
    "without": len(captions) - len(there),
    "words": summarise([len(caption.split()) for caption in there]),
  }


def count_labels(
  photos: Iterable[schema.Photo], labels: records.Captions
) -> dict[str, Any]:
  """Labels of the photos whose description is a list of them.

  Args:
    photos: of a split; one that is shared twice counts once.
    labels: `records.Captions` of source 'labels'.
  """
  counts, sizes = collections.Counter(), []
  for photo in {photo.id: photo for photo in photos}.values():
    listed = labels(photo.id, None, photo.description)
    # What has no words before it is a sentence and not a list.
    if listed is None or listed == photo.description.strip():
      continue
    names = {name.strip() for name in listed.split(",")} - {""}
    counts.update(sorted(names))
    sizes.append(len(names))
  return {
    "per_photo": summarise(sizes),
    "counts": dict(counts.most_common()),
  }


class Split:
  """Counts the dialogues of a split.

  Attributes:
    values: what histograms are drawn of, by name.
  """

  def __init__(
    self,
    dialogues: Sequence[schema.Dialogue],
    llm_tokenizer: Any,
    clip_tokenizer: Any,
    spec: DataSpec,
    advance: Callable[[], None] = lambda: None,
  ):
    """Counts.

    Args:
      dialogues: of the split.
      llm_tokenizer: the language model's.
      clip_tokenizer: the text encoder's.
      spec: the layout.
      advance: called after each dialogue.
    """
    self._dialogues, self._spec = dialogues, spec
    self._tokenizers = {"llm": llm_tokenizer, "clip": clip_tokenizer}
    self._counts: collections.Counter = collections.Counter()
    self.values: dict[str, list] = collections.defaultdict(list)
    self._sides: dict[int, collections.Counter] = {}
    self._sizes: list[tuple[int, int, int]] = []
    self._whose: list[tuple[int, int]] = []
    for number, dialogue in enumerate(dialogues):
      self._count_dialogue(dialogue)
      for side in sorted({turn.speaker for turn in dialogue.turns}):
        self._count_side(number, side)
      advance()

  def _count_dialogue(self, dialogue):
    turns, values = dialogue.turns, self.values
    words = [len(turn.text.split()) for turn in turns]
    values["turns"].append(len(turns))
    values["words"].append(sum(words))
    values["words/turn"] += [n for n in words if n]
    for name, tokenizer in self._tokenizers.items():
      sizes = [len(tokenizer.encode(t.text)) for t in turns if t.text.strip()]
      values[f"{name}/turn"] += sizes
      values[f"{name}/dialogue"].append(sum(sizes))
    shared = [(i, turn) for i, turn in enumerate(turns) if turn.photo]
    values["photos"].append(len(shared))
    for i, turn in shared:
      values["photo/turn"].append(i)
      values["photo/place"].append(i / max(len(turns) - 1, 1))
      self._counts[f"shared/{turn.speaker}"] += 1
      if turn.photo.caption is None:
        continue
      for name, limit in self._caption_limits().items():
        tokenizer = self._tokenizers[name]
        size = len(tokenizer.encode(turn.photo.caption.strip()))
        values[f"{name}/caption"].append(size)
        self._counts[f"captions_cut/{name}"] += size > limit

  def _caption_limits(self) -> dict[str, int]:
    """Tokens of a caption that are kept; CLIP's has two control tokens."""
    clip = self._tokenizers["clip"].max_length - 2
    return {"llm": self._spec.caption_tokens, "clip": clip}

  def _count_side(self, number, side):
    counts = self._sides.setdefault(side, collections.Counter())
    turns = self._dialogues[number].turns
    try:
      example = dialogue_lib.encode_example(
        turns, side, self._tokenizers["llm"], self._spec
      )
    except LeftOut as e:
      counts[f"left_out/{e.reason}"] += 1
      return
    counts["examples"] += 1
    kinds = np.bincount(
      layout.kinds(example), minlength=len(layout.KINDS)
    )
    for name, count in zip(
      layout.KINDS, kinds.tolist(), strict=True
    ):
      counts[f"tokens/{name}"] += count
    counts["photos_in"] += len(example.photos)
    counts["photos_out"] += len(example.captions)
    counts["photos_out_missing"] += sum(
      c.photo.path is None for c in example.captions
    )
    counts["captions_cut"] += sum(c.cut for c in example.captions)
    counts["turns_cut"] += example.cut_turns
    counts["examples_cut"] += example.cut_turns > 0
    size = len(example.tokens)
    self.values["example"].append(size)
    self.values[f"example/{side}"].append(size)
    self._sizes.append((size, len(example.photos), len(example.captions)))
    self._whose.append((number, side))

  def report(self, seed: int) -> dict[str, Any]:
    """All counts, as JSON."""
    values, counts = self.values, self._counts
    photos = records.list_photos(self._dialogues)
    return {
      "dialogues": len(self._dialogues),
      "turns": summarise(values["turns"]),
      "words": summarise(values["words"]),
      "words_per_turn": summarise(values["words/turn"]),
      "tokens": {
        name: {
          part: summarise(values[f"{name}/{part}"])
          for part in ("dialogue", "turn", "caption")
        }
        | {"captions_cut": counts[f"captions_cut/{name}"]}
        for name in self._tokenizers
      },
      "photos": {
        "shared": len(photos),
        "different": len({photo.id for photo in photos}),
        "per_dialogue": common(values["photos"]),
        "by_speaker": {
          str(s): counts[f"shared/{s}"] for s in sorted(self._sides)
        },
        "turn": summarise(values["photo/turn"]),
        "place": summarise(values["photo/place"]),
      },
      "sides": {
        str(s): self._side(s, counts) for s, counts in self._sides.items()
      },
      "rows": self._fill(seed),
    }

  def _side(self, side, counts) -> dict[str, Any]:
    names = (
      *("examples", "photos_in", "photos_out", "photos_out_missing"),
      *("captions_cut", "turns_cut", "examples_cut"),
    )
    left_out = [n for n in counts if n.startswith("left_out/")]
    return {name: counts[name] for name in names} | {
      "left_out": {
        n.partition("/")[2]: counts[n]
        for n in sorted(left_out, key=lambda n: -counts[n])
      },
      "tokens": summarise(self.values[f"example/{side}"]),
      "tokens_of": {
        kind: counts[f"tokens/{kind}"] for kind in layout.KINDS
      },
    }

  def _packed(self, seed) -> list[np.ndarray]:
    """The rows of the first epoch, by number of the example."""
    if not self._sizes:
      return []
    plan = packing.Plan(np.asarray(self._sizes), self._limits, 1, seed, 0)
    return plan.rows_of_epoch(0)

  @property
  def _limits(self) -> tuple[int, int, int]:
    spec = self._spec
    return spec.length, spec.photos_in, spec.photos_out

  def _fill(self, seed) -> dict[str, float | int | None]:
    """How full rows of a batch are, each of their limits."""
    rows = self._packed(seed)
    names = ("row_fill", "photos_in_fill", "photos_out_fill")
    if not rows:
      return {"rows": 0, "examples_per_row": None} | dict.fromkeys(names)
    used = np.asarray(self._sizes).sum(axis=0)
    fill = used / (len(rows) * np.asarray(self._limits))
    return {
      "rows": len(rows),
      "examples_per_row": len(self._sizes) / len(rows),
    } | dict(zip(names, fill.tolist(), strict=True))

  def rows(self, seed: int) -> tuple[tuple[Segment, ...], ...]:
    """Some rows of a batch, as segments."""
    rows = self._packed(seed)[:_ROWS]
    return tuple(tuple(self._segment(int(i)) for i in row) for row in rows)

  def _segment(self, place) -> Segment:
    number, side = self._whose[place]
    dialogue = self._dialogues[number]
    example = dialogue_lib.encode_example(
      dialogue.turns, side, self._tokenizers["llm"], self._spec
    )
    runs = layout.runs(layout.kinds(example))
    kinds = layout.KINDS
    return Segment(dialogue.id, side, tuple((kinds[k], n) for k, n in runs))


def count_coverage(coverage: schema.Coverage) -> dict[str, Any]:
  """What a reader found of a split, the long lists cut."""
  return {
    "photos_asked": coverage.photos_asked,
    "photos_found": coverage.photos_found,
    "missing": list(coverage.missing[:NAMED]),
    "records_left_out": len(coverage.broken),
    "reasons": dict(coverage.reasons),
    "left_out": list(coverage.broken[:NAMED]),
  }


def histograms(
  values: Mapping[str, Sequence[float]], spec: DataSpec, clip_slots: int
) -> list[dict[str, Any]]:
  """Histograms over all splits, with the limit that there is of each.

  Args:
    values: of `Split.values`, all splits together.
    spec: the layout.
    clip_slots: of the text encoder, m.
  """
  drawn = (
    ("turns", "turns of a dialogue", None),
    ("llm/dialogue", "LLM tokens of a dialogue's text", None),
    ("example", "tokens of an example, all included", spec.length),
    ("photo/turn", "turn in which a photo is shared", None),
    ("photo/place", "share of the other turns before it", None),
    ("llm/caption", "LLM tokens of a caption", spec.caption_tokens),
    ("clip/caption", "CLIP pieces of a caption", clip_slots - 2),
    ("photos", "photos of a dialogue", None),
  )
  return [
    {"name": name, "title": title, "limit": limit}
    | histogram(values.get(name, ()), share=name == "photo/place")
    | {"summary": summarise(values.get(name, ()))}
    for name, title, limit in drawn
  ]
