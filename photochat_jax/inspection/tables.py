"""What of the report of `inspect_data` stands in which table."""

from collections.abc import Mapping
from typing import Any

from photochat_jax.inspection.layout import KINDS
from photochat_jax.inspection.table import Table, number, percent

_STATISTICS = ("mean", "median", "p95", "max")
_TOKENIZERS = {"llm": "LLM tokens", "clip": "CLIP pieces"}
_REASONS = {
  "missing_photo": "a photo of the other speaker has no file",
  "no_caption": "a photo of this speaker has no caption",
  "too_long": "not even the last turn fits",
  "silent": "the speaker says nothing",
}
_LABELS = 20  # Labels that are shown.
_MANY = 3  # So many photos of a dialogue, and more, are one row.


def tables(report: Mapping[str, Any]) -> list[Table]:
  """All tables of a report."""
  found = [
    _size(report),
    _photos(report),
    _lengths(report),
    _tokens(report),
    _captions(report),
    *(_side(report, speaker) for speaker in _speakers(report)),
    _rows(report),
    _labels(report),
    _shared(report),
    _left_out(report),
  ]
  return [table for table in found if table.rows]


def _by_split(report, title, rows, note="") -> Table:
  """A table with a column for each split; rows are (name, its cell)."""
  splits = report["splits"]
  return Table(
    title,
    ("", *splits),
    [(name, *map(cell, splits.values())) for name, cell in rows],
    note=note,
  )


def _statistics(report, title, things, note) -> Table:
  """A table of summaries; things are (name, of a split its summary)."""
  rows = [
    (name, split, *(number(summary[x]) for x in _STATISTICS))
    for name, of in things
    for split, found in report["splits"].items()
    if (summary := of(found)) is not None and summary["count"]
  ]
  return Table(title, ("", "split", *_STATISTICS), rows, 2, note)


def _size(report) -> Table:
  return _by_split(
    report,
    "Dialogues",
    [
      ("dialogues", lambda s: number(s["dialogues"])),
      ("turns", lambda s: number(s["turns"]["sum"])),
      ("words", lambda s: number(s["words"]["sum"])),
      ("records left out", lambda s: number(s["records_left_out"])),
    ],
  )


def _speakers(report) -> list[str]:
  found = {s for x in report["splits"].values() for s in x["sides"]}
  return sorted(found)


def _photos(report) -> Table:
  def with_photos(least, most):
    return lambda s: number(
      sum(
        count
        for n, count in s["photos"]["per_dialogue"].items()
        if least <= int(n) <= most
      )
    )

  rows = [
    ("photos, each time shared", lambda s: number(s["photos"]["shared"])),
    ("photos, each once", lambda s: number(s["photos_asked"])),
    ("their files found", lambda s: number(s["photos_found"])),
    ("coverage", lambda s: percent(s["photos_found"], s["photos_asked"])),
    ("in other splits too", lambda s: number(s["photos_in_other_splits"])),
  ]
  rows += [
    (
      f"shared by speaker {speaker}",
      lambda s, k=speaker: number(s["photos"]["by_speaker"].get(k, 0)),
    )
    for speaker in _speakers(report)
  ]
  rows += [
    (f"dialogues with {n}", with_photos(n, n)) for n in range(_MANY)
  ]
  rows.append(
    (f"dialogues with {_MANY} or more", with_photos(_MANY, float("inf")))
  )
  return _by_split(
    report,
    "Photos",
    rows,
    "Found is a file with the photo's name; it is not looked into.",
  )


def _lengths(report) -> Table:
  return _statistics(
    report,
    "Lengths and places",
    [
      ("turns of a dialogue", lambda s: s["turns"]),
      ("words of a dialogue", lambda s: s["words"]),
      ("words of a turn", lambda s: s["words_per_turn"]),
      ("turn of a photo, from 0", lambda s: s["photos"]["turn"]),
      ("share of turns before it", lambda s: s["photos"]["place"]),
    ],
    "p95: 95 % are at most that. Turns without words, as most that share a "
    "photo, do not count as turns of words. The share is of the other turns: "
    "0 is the first turn, 1 the last.",
  )


def _tokens(report) -> Table:
  layout = report["layout"]
  return _statistics(
    report,
    "Tokens of texts",
    [
      (f"{said} of a {part}", lambda s, t=t, p=part: s["tokens"][t][p])
      for t, said in _TOKENIZERS.items()
      for part in ("dialogue", "turn", "caption")
    ],
    "By the tokenizers alone, without a template. LLM: "
    f"{layout['llm_vocabulary']:,} tokens, {layout['llm_tokenizer']}. CLIP: "
    f"{layout['clip_vocabulary']:,} tokens, {layout['clip_tokenizer']}.",
  )


def _captions(report) -> Table:
  chosen, layout = report["caption_source"], report["layout"]
  rows = [
    (
      name,
      source + " *" * (source == chosen),
      number(found["with"]),
      number(found["without"]),
      percent(found["with"], found["with"] + found["without"]),
      number(found["words"]["mean"]),
      number(found["words"]["max"]),
    )
    for name, split in report["splits"].items()
    for source, found in split["captions"].items()
  ]
  cut, beyond = (
    sum(s["tokens"][t]["captions_cut"] for s in report["splits"].values())
    for t in _TOKENIZERS
  )
  return Table(
    "Captions by source",
    ("split", "source", "with", "without", "share", "words", "most words"),
    rows,
    2,
    f"* is used here (--caption_source). Of its captions {cut:,} are longer "
    f"than {layout['caption_tokens']} LLM tokens and are cut, and {beyond:,} "
    f"longer than CLIP's {layout['clip_slots'] - 2} pieces. A photo counts "
    "each time it is shared.",
  )


def _side(report, speaker) -> Table:
  splits = {
    name: split["sides"][speaker]
    for name, split in report["splits"].items()
    if speaker in split["sides"]
  }
  reasons = sorted({r for side in splits.values() for r in side["left_out"]})
  rows = [("examples", lambda s: number(s["examples"]))]
  rows += [
    (f"left out: {r}", lambda s, r=r: number(s["left_out"].get(r, 0)))
    for r in reasons
  ]
  rows += [
    (name, lambda s, key=key: number(s[key]))
    for name, key in (
      ("examples cut to fit", "examples_cut"),
      ("turns cut", "turns_cut"),
      ("captions cut", "captions_cut"),
      ("photos seen", "photos_in"),
      ("photos to draw", "photos_out"),
      ("of them without a file", "photos_out_missing"),
    )
  ]
  rows += [
    (f"tokens, {name}", lambda s, x=name: number(s["tokens"][x]))
    for name in _STATISTICS
  ]
  rows += [
    (said, lambda s, k=k: percent(s["tokens_of"][k], s["tokens"]["sum"]))
    for k, said in zip(
      KINDS, ("no loss", "text loss", "caption loss", "slots"), strict=True
    )
  ]
  return Table(
    f"What training sees as speaker {speaker}",
    ("", *splits),
    [(name, *map(cell, splits.values())) for name, cell in rows],
    1,
    " ".join(f"{r}: {_REASONS[r]}." for r in reasons if r in _REASONS),
  )


def _rows(report) -> Table:
  layout = report["layout"]

  def fill(name):
    return lambda s: percent(s["rows"][name])

  def padding(split):
    full = split["rows"]["row_fill"]
    return percent(None if full is None else 1 - full)

  return _by_split(
    report,
    f"Rows of {layout['length']:,} tokens",
    [
      ("rows of an epoch", lambda s: number(s["rows"]["rows"])),
      ("examples of a row", lambda s: number(s["rows"]["examples_per_row"])),
      ("tokens used", fill("row_fill")),
      ("padding", padding),
      (f"used of {layout['photos_in']} photos seen", fill("photos_in_fill")),
      (f"used of {layout['photos_out']} to draw", fill("photos_out_fill")),
    ],
    "Packed as in training. Where photos are nearly used up and tokens are "
    "not, raise --photos_in or --photos_out; else change --length.",
  )


def _labels(report) -> Table:
  splits = report["splits"]
  totals: dict[str, int] = {}
  for split in splits.values():
    for label, count in split["labels"]["counts"].items():
      totals[label] = totals.get(label, 0) + count
  commonest = sorted(totals, key=lambda label: (-totals[label], label))
  listed = [split["labels"]["per_photo"] for split in splits.values()]
  photos = sum(summary["count"] for summary in listed)
  mean = sum(summary["sum"] for summary in listed) / max(photos, 1)
  return Table(
    "Commonest labels",
    ("label", *splits),
    [
      (label, *(number(s["labels"]["counts"].get(label, 0))
                for s in splits.values()))
      for label in commonest[:_LABELS]
    ],
    1,
    f"Photos whose description lists it, each once in a split. {len(totals):,} "
    f"different ones, {mean:.2f} a photo.",
  )  # fmt: skip


def _shared(report) -> Table:
  return Table(
    "Photos that several splits share",
    ("splits", "photos"),
    [
      (name, number(count))
      for name, count in report["shared_photos"]["by_splits"].items()
    ],
    1,
    "A model that is tested on them has seen them in training.",
  )


def _left_out(report) -> Table:
  rows = [
    (name, reason, number(count))
    for name, split in report["splits"].items()
    for reason, count in split["reasons"].items()
  ]
  rows += [
    ("captions", reason, number(count))
    for reason, count in report["written_captions_left_out"].items()
  ]
  rows += [
    (name, f"the whole split: {why}", "–")
    for name, why in report["splits_not_read"].items()
  ]
  return Table("Records left out", ("split", "reason", "records"), rows, 2)
