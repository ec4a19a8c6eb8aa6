"""The page of `inspect_data`: tables, histograms, rows, dialogues.

One file, as `metrics.report` writes: no script, no font, nothing beside it; the
style is inline and photos are inside, so that it opens without a network and
can be mailed. A token's details appear at the bottom of the window when it is
pointed at or tapped.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from photochat_jax.inspection.counts import Segment
from photochat_jax.inspection.layout import Shown
from photochat_jax.inspection.style import STYLE
from photochat_jax.inspection.table import Table, grouped, number
from photochat_jax.inspection.talk import dialogue, escape, strip

_OPENED = 2  # Dialogues whose tokens are unfolded at first.
_WIDTH, _HEIGHT = 300, 110  # Of a histogram, in its own units.

_LEGEND = """<div class="legend">
<span><i class="t none">given</i> no loss</span>
<span><i class="t text">said</i> text loss</span>
<span><i class="t caption">written</i> caption loss</span>
<span class="slots"><i class="t slot control"></i><i class="t slot control"></i>
</span><span>visual slots</span>
<span><i class="t none control">&lt;s&gt;</i> framed: control token</span>
<span><b class="tick">10</b> position</span></div>"""


def render(
  report: Mapping[str, Any],
  tables: Sequence[Table],
  shown: Sequence[Shown],
  rows: Sequence[Sequence[Segment]],
) -> str:
  """The page.

  Args:
    report: of `inspect_data.inspect`.
    tables: of the report.
    shown: dialogues.
    rows: some rows of a batch.

  Returns:
    A whole HTML document.
  """
  title = f"{report['source']}: a look at the data"
  layout = "".join(
    f"<dt>{escape(name.replace('_', ' '))}</dt>"
    f"<dd>{escape(value) or '(empty)'}</dd>"
    for name, value in report["layout"].items()
  )
  talks = "\n".join(
    dialogue(place, one, place <= _OPENED)
    for place, one in enumerate(shown, start=1)
  )
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1>
<p>{escape(report["path"])}, captions: {escape(report["caption_source"])}</p>
<details><summary>The layout of examples</summary><dl>{layout}</dl></details>
</header>
<h2>Numbers</h2>
<div class="tables">
{"".join(_table(table) for table in tables)}
</div>
<h2>Lengths and places</h2>
<p class="note">All splits together. The dark line is the median, the dashed red
one a limit of the layout.</p>
<div class="histograms">
{"".join(map(_histogram, report["histograms"]))}
</div>
{_rows(rows, report["layout"]["length"])}
<h2>Dialogues</h2>
<p class="note">{len(shown)} at random, seed {report["seed"]}. Each is trained
from both sides; a side's tokens stand in order, a line where the model's turn
begins or ends, positions counted from 0 in each segment. Point at a token, or
tap it, for its id.</p>
{_LEGEND}
{talks}
</main>
</body>
</html>
"""


def _table(table: Table) -> str:
  head = "".join(
    f'<th scope="col"{_shade(table, place)}>{escape(name)}</th>'
    for place, name in enumerate(table.columns)
  )
  rows: list[str] = []
  lines = grouped(table)
  for place, (row, repeats) in enumerate(lines):
    below = itertools.takewhile(lambda line: line[1], lines[place + 1 :])
    span = 1 + sum(1 for _ in below)
    first = f'<th scope="row" rowspan="{span}">{escape(row[0])}</th>'
    cells = (
      f"<td{_shade(table, column)}>{escape(cell)}</td>"
      for column, cell in enumerate(row[1:], start=1)
    )
    rows.append(f"<tr>{'' if repeats else first}{''.join(cells)}</tr>")
  note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
  body = "\n".join(rows)
  return f"""<section class="table"><h3>{escape(table.title)}</h3>
<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>{note}</section>
"""


def _shade(table: Table, place: int) -> str:
  return ' class="number"' if place >= table.words else ""


def _histogram(found: Mapping[str, Any]) -> str:
  """A histogram as SVG, with a sentence for those who cannot see it."""
  counts, summary = found["counts"], found["summary"]
  if not summary["count"]:
    return ""
  start, step, bins = found["start"], found["step"], len(counts)
  width, floor, top = min(_WIDTH / bins, 36), _HEIGHT - 16, max(counts)

  def across(value):
    # Whole numbers stand in the middle of a bin of one.
    return (value - start + (step == 1) / 2) / step * width

  bars = []
  for place, count in enumerate(counts):
    low = start + place * step
    high = low + step - (step >= 1)
    span = _tick(low) if high == low else f"{_tick(low)} to {_tick(high)}"
    height = count / top * (floor - 6)
    bars.append(
      f'<rect x="{place * width + 0.5:.2f}" y="{floor - height:.2f}" '
      f'width="{max(width - 1, 0.5):.2f}" height="{height:.2f}">'
      f"<title>{span}: {count:,}</title></rect>"
    )
  every = -(-bins // 6)
  ticks = [
    f'<text x="{across(start + place * step):.1f}" y="{_HEIGHT - 3}" '
    f'text-anchor="{"middle" if place or step == 1 else "start"}">'
    f"{_tick(start + place * step)}</text>"
    for place in range(0, bins, every)
  ]
  limit = found["limit"]
  lines = [_line(across(summary["median"]), floor, "median")]
  if limit is not None and limit < start + bins * step:
    lines.append(_line(across(limit), floor, "limit"))
  told = (
    f"mean {number(summary['mean'])}, median {number(summary['median'])}, "
    f"95 % up to {number(summary['p95'])}, most {number(summary['max'])}"
    + (f"; limit {limit:,}" if limit is not None else "")
  )
  title = escape(found["title"])
  return f"""<figure class="histogram"><figcaption><b>{title}</b>
<span>{told}</span></figcaption>
<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}: {told}">
{"".join(bars)}<path class="axis" d="M0 {floor}H{_WIDTH}"/>{"".join(ticks)}
{"".join(lines)}</svg></figure>
"""


def _line(x: float, floor: float, shade: str) -> str:
  x = min(x, _WIDTH - 1)
  return f'<path class="{shade}" d="M{x:.1f} 0V{floor}"/>'


def _tick(value: float) -> str:
  return f"{value:,}" if isinstance(value, int) else f"{value:.1f}"


def _rows(rows: Sequence[Sequence[Segment]], length: int) -> str:
  """Rows of a batch, one bar each, examples with a gap between them."""
  if not rows:
    return ""
  bars = "\n".join(_row(row, length) for row in rows)
  return f"""<h2>Rows of a batch</h2>
<p class="note">The first {len(rows)} of an epoch, {length:,} tokens each. Every
box is a segment, an example with positions and attention of its own; what is
hatched is padding.</p>
<div class="legend still">{"".join(
    f'<span><i class="swatch {shade}"></i>{name}</span>'
    for shade, name in (
      ("none", "no loss"), ("text", "text loss"), ("caption", "caption loss"),
      ("slot", "visual slots"), ("padding", "padding"),
    )
  )}</div>
<div class="rows">
{bars}
</div>"""  # fmt: skip


def _row(row: Sequence[Segment], length: int) -> str:
  boxes, used = [], 0
  for place, segment in enumerate(row, start=1):
    size = sum(count for _, count in segment.runs)
    used += size
    hint = (
      f"segment {place}: dialogue {segment.dialogue} as speaker "
      f"{segment.speaker}, positions 0 to {size - 1}"
    )
    boxes.append(
      f'<div class="t segment" style="flex:{size}" data-t="{escape(hint)}">'
      f"{strip(segment.runs)}<span>{escape(segment.dialogue)}"
      f" · {segment.speaker}</span></div>"
    )
  if used < length:
    rest = length - used
    told = f"{rest} padding" * (rest > length / 12)  # Else it has no room.
    boxes.append(
      f'<div class="segment" style="flex:{rest}">'
      f"{strip((), rest)}<span>{told}</span></div>"
    )
  return f'<div class="row">{"".join(boxes)}</div>'
