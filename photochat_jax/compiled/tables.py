"""A report on a compiled step, for people."""

from collections.abc import Iterable, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
import rich.text

from photochat_jax.compiled.report import Report

_KINDS = ("trained", "frozen", "optimiser", "averages")
_TRAFFIC_ROWS = 24


def write(report: Report, console: rich.console.Console) -> None:
  """Prints all of it, the verdict last."""
  about = dict(report.about)
  versions = about.pop("versions")
  for facts in (about, versions):
    console.print(
      ", ".join(f"{name} {value}" for name, value in facts.items()),
      markup=False,
      highlight=False,
    )
  for table in (_memory(report), _state(report), _overflow(report)):
    if table is not None:
      console.print(table)
  if report.traffic:
    console.print(_traffic(report))
    console.print(_buffers(report))
  console.print(_flops(report))
  for line in _sentences(report):
    console.print(line, markup=False, highlight=False)
  # Not by the console, which would break a line of a narrow terminal.
  console.file.write(f"{report.last_line}\n")


def _memory(report: Report) -> rich.table.Table | None:
  found = report.memory
  if found is None:
    return None
  state = sum(sum(row.values()) for row in report.state.values())
  rows = [
    ("state (written over by the next)", state),
    ("batch", report.batch),
    ("vocabulary map", report.vocabulary_map),
    (
      "padding of these",
      found.arguments - state - report.batch - report.vocabulary_map,
    ),
    ("temporaries", found.temporaries),
    ("results not written over the state", found.outputs - found.aliased),
    ("program", found.code),
    ("total", found.total),
  ]
  if found.peak:
    rows.append(("(the compiler's peak, without the program)", found.peak))
  return _table(
    "HBM per chip",
    ("", "GB", "%"),
    [
      (name, _gb(size), f"{100 * size / report.hbm:.1f}")
      for name, size in rows
    ],
  )


def _state(report: Report) -> rich.table.Table:
  total = {kind: 0 for kind in _KINDS}
  rows = []
  for part, row in report.state.items():
    rows.append((part, *(_gb(row.get(kind, 0)) for kind in _KINDS)))
    for kind, size in row.items():
      total[kind] += size
  rows.append(("all", *(_gb(total[kind]) for kind in _KINDS)))
  return _table("State, GB per chip", ("part", *_KINDS), rows)


def _overflow(report: Report) -> rich.table.Table | None:
  # Where the compiler's plan is known, it tells more.
  if report.overflow is None or not report.overflow.largest:
    return None
  return _table(
    "What it takes most for, as the compiler says",
    ("GB", "array", "made by"),
    [
      (_gb(size), shape, name)
      for size, shape, name in report.overflow.largest
    ],
  )


def _traffic(report: Report) -> rich.table.Table:
  rows = [
    (
      row.part,
      row.place,
      row.direction,
      row.kind,
      str(row.trips),
      str(row.count),
      f"{row.nbytes / 1e6:,.1f}",
      f"{row.trips * row.nbytes / 1e9:,.2f}",
    )
    for row in report.traffic[:_TRAFFIC_ROWS]
  ]
  total = sum(row.trips * row.nbytes for row in report.traffic)
  rows.append(("all", "", "", "", "", "", "", f"{total / 1e9:,.2f}"))
  return _table(
    "Collectives per chip",
    ("part", "where", "pass", "kind", "times", "each", "MB each", "GB a step"),
    rows,
  )


def _buffers(report: Report) -> rich.table.Table:
  return _table(
    "Largest temporaries, when they take most"
    if report.buffers_at_peak
    else "Largest buffers, not all at once",
    ("MB", "array", "alike", "MB of all", "line", "for"),
    [
      (
        f"{row.nbytes / 1e6:,.1f}",
        str(row.array),
        str(row.count),
        f"{row.count * row.nbytes / 1e6:,.1f}",
        row.source.removeprefix("photochat_jax/"),
        _shorten(row.op_name),
      )
      for row in report.buffers
    ],
  )


def _flops(report: Report) -> rich.table.Table:
  total = sum(report.flops.values())
  rows = [
    (part, f"{count / 1e12:,.4g}", f"{100 * count / total:.1f}")
    for part, count in report.flops.items()
  ]
  rows.append(("all", f"{total / 1e12:,.4g}", "100.0"))
  return _table("Model FLOPs of a step, all chips", ("", "TFLOP", "%"), rows)


def _sentences(report: Report) -> Iterable[str]:
  chips, peak = report.about["chips"], report.about["peak_tflops"]
  fastest = sum(report.flops.values()) / (chips * peak * 1e12)
  yield (
    f"At 100 % of the chips' {peak:g} TFLOP/s a step would take "
    f"{fastest:.3f} s."
  )
  if report.memory is not None:
    share = 100 * report.aliased_share
    yield (
      f"{share:.1f} % of the state is written over by the next "
      f"({'as wanted' if share >= 95 else 'WANTED'}: at least 95 %)."
    )
  if report.vocabulary:
    yield from _vocabulary(report.vocabulary)
  yield (
    f"Traced in {report.seconds['lower']:.0f} s, compiled in "
    f"{report.seconds['compile']:.0f} s."
  )


def _vocabulary(found: dict[str, Any]) -> Iterable[str]:
  yield (
    f"Largest array over the vocabulary but its tables: "
    f"{found['elements']:,} elements ({found['largest']} "
    f"{found['source']}); a chip's batch x length x vocabulary are "
    f"{found['batch_length_vocabulary']:,}, vocabulary x vocabulary "
    f"{found['vocabularies']:,}."
  )
  for name in found["forbidden"]:
    yield f"FORBIDDEN, as large as one of them: {name}"


def _table(
  title: str, names: Sequence[str], rows: Iterable[Sequence[str]]
) -> rich.table.Table:
  table = rich.table.Table(
    title=title, title_justify="left", box=rich.box.SIMPLE
  )
  rows = list(rows)
  for place, name in enumerate(names):
    is_number = all(_is_number(row[place]) for row in rows)
    table.add_column(
      name, justify="right" if is_number else "left", overflow="fold"
    )
  for row in rows:
    table.add_row(*(rich.text.Text(cell) for cell in row))
  return table


def _shorten(op_name: str, length: int = 48) -> str:
  """What a name stack ends with, and the module it begins with."""
  name = op_name.replace("\\'", "'").removeprefix("jit(step)/")
  first = name.split("/")[0]
  room = length - len(first) - 1
  if len(name) <= length or room < 0:
    return name[-length:]
  return f"{first}…{name[-room:]}"


def _is_number(cell: str) -> bool:
  return not cell.strip("0123456789.,")


def _gb(size: float) -> str:
  return f"{size / 1e9:,.3f}"
