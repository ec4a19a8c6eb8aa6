"""What a data set holds: statistics, and dialogues to look at.

`inspect` reads every split and gives a report that is plain JSON
(`inspection.counts` says what is counted how). `inspection.tables` prints it
and `inspection.page` shows it, beside random dialogues with every token that
training would see (`inspection.layout`). `tools/inspect_data.py` is the command
line.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
from etils import epath

from photochat_jax.data import bars, packing, records, schema, sources
from photochat_jax.data.quarantine import count_reasons
from photochat_jax.data.spec import DataSpec, make_template
from photochat_jax.inspection import counts, layout, page, table
from photochat_jax.inspection import tables as tables_lib

# Texts whose tokens are remembered: both sides of a dialogue read them.
_REMEMBERED = 4096
# Where two sources have as many captions, the first of these is taken.
_PREFERRED = ("written", "given", "labels", "description")


@dataclasses.dataclass(frozen=True)
class Inspection:
  """What was found.

  Attributes:
    report: the statistics, as JSON.
    shown: random dialogues; more of them begin with the same ones.
    rows: some rows of a batch, as segments.
  """

  report: dict[str, Any]
  shown: tuple[layout.Shown, ...]
  rows: tuple[tuple[counts.Segment, ...], ...]


class _Remembering:
  """A tokenizer that encodes a text once, for a while."""

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    self.encode = functools.lru_cache(_REMEMBERED)(tokenizer.encode)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._tokenizer, name)


def inspect(
  source: str,
  path: epath.PathLike,
  llm_tokenizer: Any,
  clip_tokenizer: Any,
  spec: DataSpec,
  caption_source: str = "",
  dialogues: int = 20,
  seed: int = 0,
  console: rich.console.Console | None = None,
) -> Inspection:
  """Reads a data set and counts.

  Args:
    source: a name of `sources.READERS`.
    path: its folder.
    llm_tokenizer: the language model's.
    clip_tokenizer: the text encoder's.
    spec: the layout.
    caption_source: one of `records.CAPTION_SOURCES`; '' takes the one with the
      most captions.
    dialogues: how many to show.
    seed: chooses them, and the order in which rows are packed.
    console: for the progress bar; none without.

  Raises:
    ValueError: nothing can be read, there is no such source of captions, or
      the tokenizer lacks what the template needs.
  """
  make_template(spec, llm_tokenizer)  # Where it cannot, before the work.
  tools = _Remembering(llm_tokenizer), _Remembering(clip_tokenizer), spec
  with bars.Bar("reading", console=console, shown=console is not None) as bar:
    splits, covered, errors = _read(source, path)
    captioners = _captioners(path, caption_source)
    told = {
      source: {name: _captions(some, of) for name, some in splits.items()}
      for source, of in captioners.items()
    }
    chosen = caption_source or _fullest(told)
    splits = {n: _caption(d, captioners[chosen]) for n, d in splits.items()}
    bar.start(sum(map(len, splits.values())))
    counted = {}
    for name, some in splits.items():
      bar.advance(0, f"counting {name}")
      counted[name] = counts.Split(some, *tools, bar.advance)

  shared = schema.shared_photos(splits)
  values = collections.defaultdict(list)
  for split in counted.values():
    for name, numbers in split.values.items():
      values[name] += numbers
  every = [(name, d) for name, some in splits.items() for d in some]
  order = np.argsort(packing.random_bits(len(every), seed), kind="stable")
  random = [every[i] for i in order[:dialogues]]
  report = {
    "source": source,
    "path": str(path),
    "seed": seed,
    "caption_source": chosen,
    "layout": _layout(*tools),
    "splits": {
      name: split.report(seed)
      | counts.count_coverage(covered[name])
      | {
        "photos_in_other_splits": sum(name in s for s in shared.values()),
        "captions": {
          source: counts.count_captions(of[name])
          for source, of in told.items()
        },
        "labels": counts.count_labels(
          records.list_photos(splits[name]), captioners["labels"]
        ),
      }
      for name, split in counted.items()
    },
    "splits_not_read": errors,
    "written_captions_left_out": count_reasons(
      captioners["written"].rows if "written" in captioners else ()
    ),
    "shared_photos": {
      "photos": len(shared),
      "by_splits": counts.common(map("+".join, shared.values())),
      "some": dict(list(shared.items())[: counts.NAMED]),
    },
    "histograms": counts.histograms(
      values, spec, clip_tokenizer.max_length
    ),
    "shown": [[name, dialogue.id] for name, dialogue in random],
  }
  return Inspection(
    report,
    tuple(layout.show(dialogue, *tools) for _, dialogue in random),
    next(filter(None, (s.rows(seed) for s in counted.values())), ()),
  )


def _read(source, path) -> tuple[dict, dict, dict[str, str]]:
  """Dialogues and coverage of each split; why others cannot be read."""
  splits, covered, errors = {}, {}, {}
  names = sources.list_splits(source, path)
  # Where there is no split, reading one says what was expected.
  for name in names or schema.SPLITS[:1]:
    try:
      # The captions are chosen afterwards, and nothing is trained on.
      splits[name], covered[name] = sources.read_split(
        source, path, name, "given", max_broken=1.0
      )
    except ValueError as e:
      if len(names) < 2:
        raise
      errors[name] = str(e)
  if not splits:
    raise ValueError("; ".join(errors.values()))
  return splits, covered, errors


def _captioners(path, asked: str) -> dict[str, records.Captions]:
  """Every source of captions that a folder has."""
  found = {}
  for source in records.CAPTION_SOURCES:
    try:
      found[source] = records.Captions(source, path)
    except ValueError:
      if source == asked:
        raise
  if asked and asked not in found:
    records.Captions(asked, path)  # Says what is wrong with it.
  return found


def _captions(
  dialogues: Sequence[schema.Dialogue], captions: records.Captions
) -> list[str | None]:
  """What a source writes for each photo, in order."""
  return [
    captions(photo.id, photo.caption, photo.description)
    for photo in records.list_photos(dialogues)
  ]


def _fullest(told: Mapping[str, Mapping[str, list]]) -> str:
  """The source with the most captions."""
  return max(
    (source for source in _PREFERRED if source in told),
    key=lambda s: sum(c is not None for some in told[s].values() for c in some),
  )


def _caption(
  dialogues: Sequence[schema.Dialogue], captions: records.Captions
) -> list[schema.Dialogue]:
  """The dialogues with the captions of a source."""

  def write(turn):
    if not turn.photo:
      return turn
    photo = turn.photo
    caption = captions(photo.id, photo.caption, photo.description)
    photo = dataclasses.replace(photo, caption=caption)
    return dataclasses.replace(turn, photo=photo)

  return [
    dataclasses.replace(d, turns=tuple(map(write, d.turns))) for d in dialogues
  ]


def _layout(llm_tokenizer, clip_tokenizer, spec) -> dict[str, Any]:
  """What examples were laid out by."""
  names = (
    *("template", "length", "num_visual_tokens", "photos_in", "photos_out"),
    *("caption_tokens", "system_prompt", "text_on"),
  )
  return {name: getattr(spec, name) for name in names} | {
    "llm_tokenizer": str(llm_tokenizer.path),
    "llm_vocabulary": llm_tokenizer.vocab_size,
    "clip_tokenizer": str(clip_tokenizer.path),
    "clip_vocabulary": clip_tokenizer.vocab_size,
    "clip_slots": clip_tokenizer.max_length,
  }


def inspect_data(
  *args: Any,
  out: epath.PathLike,
  console: rich.console.Console | None = None,
  **kwargs: Any,
) -> Inspection:
  """Inspects a data set, prints the tables and writes them, and a page.

  Args:
    *args: of `inspect`.
    out: the folder of `inspect.json` and `inspect.html`, made here.
    console: where progress and tables go; standard output without.
    **kwargs: of `inspect`.

  Raises:
    ValueError: nothing can be read, or the folder cannot be written.
  """
  console = console or rich.console.Console()
  out = epath.Path(out)
  _write(out)  # Before the work.
  found = inspect(*args, console=console, **kwargs)
  tables = tables_lib.tables(found.report)
  for one in tables:
    console.print(table.to_rich(one))
  written = {
    "inspect.json": json.dumps(found.report, indent=2) + "\n",
    "inspect.html": page.render(
      found.report, tables, found.shown, found.rows
    ),
  }
  _write(out, written)
  for name in written:
    console.print(
      f"Wrote {out / name}", highlight=False, markup=False, soft_wrap=True
    )
  return found


def _write(folder: epath.Path, texts: Mapping[str, str] | None = None) -> None:
  """Makes a folder, and files in it."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (texts or {}).items():
      # A path may hold what is no Unicode.
      (folder / name).write_bytes(text.encode("utf-8", "replace"))
  except OSError as e:
    raise ValueError(
      f"{folder} cannot be written, choose another folder: {e}."
    ) from e
