"""A table, for the terminal and for the page, and how numbers stand in it."""

from collections.abc import Sequence
from typing import NamedTuple

import rich.console
import rich.padding
import rich.table
import rich.text

from photochat_jax.inspection.layout import printable


class Table(NamedTuple):
  """A table of words.

  Attributes:
    title: what it is about.
    columns: names of the columns.
    rows: cells.
    words: so many columns, from the left, hold words; the others, numbers.
    note: what one has to know to read it.
  """

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence[str]]
  words: int = 1
  note: str = ""


def number(value: float | None) -> str:
  """A number as the tables write it."""
  if value is None:
    return "–"
  if float(value).is_integer() or value >= 1000:
    return f"{value:,.0f}"
  return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(part: float | None, whole: float = 1) -> str:
  """A share; '100 %' only of all, '0 %' only of nothing."""
  if part is None or not whole:
    return "–"
  share = part / whole
  if share in (0, 1):
    return f"{share:.0%}".replace("%", " %")
  return f"{min(max(share * 100, 0.1), 99.9):.1f} %"


def grouped(table: Table) -> list[tuple[Sequence[str], bool]]:
  """Each row, and whether its first cell is that of the row before."""
  firsts = [None, *(row[0] for row in table.rows)]
  return [
    (row, table.words > 1 and row[0] == first)
    for row, first in zip(table.rows, firsts, strict=False)
  ]


def to_rich(table: Table) -> rich.console.Group:
  """A table for a terminal; nothing in it is taken for markup."""
  title = rich.text.Text(printable(table.title), "bold")
  out = rich.table.Table()
  for place, name in enumerate(table.columns):
    out.add_column(
      rich.text.Text(printable(name)),
      justify="right" if place >= table.words else "left",
      overflow="fold",
    )
  for row, repeats in grouped(table):
    if table.words > 1 and not repeats:
      out.add_section()
    cells = ["" if repeats else row[0], *row[1:]]
    out.add_row(*(rich.text.Text(printable(cell)) for cell in cells))
  note = rich.text.Text(printable(table.note), "dim")
  under = rich.padding.Padding(note, (0, 1, bool(table.note), 1))
  return rich.console.Group(title, out, under)
