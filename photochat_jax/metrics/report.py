"""One self-contained HTML page: the figures, and whole dialogues to look at.

No script, no font, no file beside it: the style is inline and every photo is
inside the page, so the file can be mailed. Everything that comes from data or
from the model is escaped. `comparison` writes the same dialogues with several
models' replies.
"""

import base64
import dataclasses
import html
import io
import math
import typing
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

PHOTO_PIXELS = 144
"""How wide a photo stands on the page, in CSS pixels."""


class Figure(typing.NamedTuple):
  """A row of the table: a name, its value, what chance scores, of how many.

  `value` is None where it could not be measured; `note` then says why.
  """

  name: str
  value: float | None
  chance: float | None
  size: int
  note: str = ""


class Mark(typing.NamedTuple):
  """A short label; `right` colours it green or red, None leaves it grey."""

  text: str
  right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
  """A photo with what is said about it.

  Attributes:
    label: whose photo this is.
    pixels: uint8[H, W, 3]; None if there is none to show.
    caption: the caption it was drawn from, or has in the data.
    marks: its attributes.
  """

  label: str
  pixels: np.ndarray | None
  caption: str = ""
  marks: tuple[Mark, ...] = ()


@dataclasses.dataclass(frozen=True)
class Said:
  """What a model said at a turn by itself.

  Attributes:
    text: its words.
    marks: verdicts about them.
    by: the model's name, where there are several.
  """

  text: str
  marks: tuple[Mark, ...] = ()
  by: str = ""


@dataclasses.dataclass(frozen=True)
class Bubble:
  """A turn.

  Attributes:
    mine: whether the turn is the model's side.
    parts: what the data say in this turn, in order: a text, or pictures to
      stand side by side.
    said: what models said here.
  """

  mine: bool
  parts: tuple[str | tuple[Picture, ...], ...]
  said: tuple[Said, ...] = ()


@dataclasses.dataclass(frozen=True)
class Example:
  """A dialogue under a heading."""

  title: str
  bubbles: tuple[Bubble, ...]


def number(value: float | None) -> str:
  """A figure as the page and the terminal write it."""
  if value is None:
    return "–"
  if not math.isfinite(value):
    return "∞" if value > 0 else str(value)
  if float(value).is_integer() and abs(value) >= 2:
    return f"{value:.0f}"
  return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def data_uri(pixels: np.ndarray) -> str:
  """uint8[H, W, 3] -> a `data:` URI: a PNG of toys, a JPEG of photos."""
  buffer = io.BytesIO()
  kind = "PNG" if len(pixels) <= PHOTO_PIXELS else "JPEG"
  Image.fromarray(pixels).save(buffer, kind, quality=90)
  data = base64.b64encode(buffer.getvalue()).decode("ascii")
  return f"data:image/{kind.lower()};base64,{data}"


def render(
  title: str,
  figures: Sequence[Figure],
  examples: Sequence[Example],
  details: Mapping[str, str],
) -> str:
  """The page.

  Args:
    title: the heading.
    figures: the table's rows, in order.
    examples: dialogues, in order.
    details: what a reader needs to tell this run from others.

  Returns:
    A whole HTML document.
  """
  rows = "\n".join(_row(figure) for figure in figures)
  talks = "\n".join(example_html(example) for example in examples)
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<table>
<thead><tr><th scope="col">metric</th><th scope="col">value</th>
<th scope="col">chance</th><th scope="col">of</th>
<th scope="col">remark</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
{details_html("About this run", details)}
<h2>Dialogues</h2>
<p class="legend">Solid bubbles are the data: the partner on the left, the
model's side on the right. The dashed bubble under a turn is what the model said
there by itself, given the data up to that turn.
<span class="mark right">✓ green</span> is right,
<span class="mark wrong">✗ red</span> is wrong.</p>
{talks}
</main>
</body>
</html>
"""


def escape(value: typing.Any) -> str:
  """Text as HTML."""
  return html.escape(str(value), quote=True)


def _row(figure: Figure) -> str:
  return (
    f'<tr><th scope="row">{escape(figure.name)}</th>'
    f'<td class="number">{number(figure.value)}</td>'
    f'<td class="number">{number(figure.chance)}</td>'
    f'<td class="number">{figure.size:,}</td>'
    f"<td>{escape(figure.note)}</td></tr>"
  )


def _mark(mark: Mark) -> str:
  shade = {True: "right", False: "wrong", None: "plain"}[mark.right]
  sign = {True: "✓ ", False: "✗ ", None: ""}[mark.right]
  return f'<span class="mark {shade}">{sign}{escape(mark.text)}</span>'


def _picture(picture: Picture) -> str:
  if picture.pixels is None:
    frame = '<div class="nothing">no photo</div>'
  else:
    frame = (
      f'<img src="{data_uri(picture.pixels)}" width="{PHOTO_PIXELS}" '
      f'alt="{escape(picture.caption or picture.label)}">'
    )
  caption = f"<q>{escape(picture.caption)}</q>" if picture.caption else ""
  marks = " ".join(_mark(mark) for mark in picture.marks)
  return (
    f"<figure>{frame}<figcaption><b>{escape(picture.label)}</b>{caption}"
    f"<span>{marks}</span></figcaption></figure>"
  )


def _bubble(bubble: Bubble) -> str:
  parts = []
  for part in bubble.parts:
    if isinstance(part, str):
      parts.append(f'<p class="said">{escape(part)}</p>')
    else:
      pictures = "".join(_picture(picture) for picture in part)
      parts.append(f'<div class="pictures">{pictures}</div>')
  for said in bubble.said:
    marks = " ".join(_mark(mark) for mark in said.marks)
    by = f'<b class="by">{escape(said.by)}</b> ' if said.by else ""
    parts.append(f'<p class="reply">{by}{escape(said.text)} {marks}</p>')
  side = "mine" if bubble.mine else "theirs"
  return f'<div class="turn {side}">{"".join(parts)}</div>'


def example_html(
  example: Example, attributes: str = "", head: str = ""
) -> str:
  """A dialogue.

  Args:
    example: it.
    attributes: HTML, those of its element, from a space on.
    head: HTML, between its title and its turns.
  """
  bubbles = "\n".join(_bubble(bubble) for bubble in example.bubbles)
  return (
    f"<section{attributes}><h3>{escape(example.title)}</h3>\n{head}{bubbles}\n"
    "</section>"
  )


def details_html(title: str, details: Mapping[str, typing.Any]) -> str:
  """What is unfolded on a click."""
  facts = "\n".join(
    f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>"
    for key, value in details.items()
  )
  return (
    f"<details><summary>{escape(title)}</summary><dl>\n{facts}\n</dl></details>"
  )


STYLE = """
:root { color-scheme: light dark; --paper: #fafafa; --ink: #1b1d21;
  --soft: #646b75; --line: #d5d9e0; --card: #ffffff; --theirs: #e9ebef;
  --mine: #d6e6ff; --right: #14733a; --right-paper: #d9f3e2;
  --wrong: #a51d1d; --wrong-paper: #fbdedd; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #131519; --ink: #e6e8ec; --soft: #9aa2ae;
    --line: #343943; --card: #1b1e24; --theirs: #2a2e37; --mine: #1d3a63;
    --right: #7fdca2; --right-paper: #123a22; --wrong: #ff9d98;
    --wrong-paper: #4a1a1a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; } h2 { margin-top: 2.5rem; font-size: 1.2rem; }
h3 { margin: 0 0 .8rem; font-size: .9rem; color: var(--soft); }
table { border-collapse: collapse; width: 100%; background: var(--card);
  border: 1px solid var(--line); }
th, td { padding: .35rem .7rem; text-align: left; font-weight: 400;
  border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; }
td:last-child, .legend, dt { color: var(--soft); font-size: .85rem; }
.number, thead th:nth-child(n + 2):nth-child(-n + 4) { text-align: right;
  font-variant-numeric: tabular-nums; }
details { margin: 1rem 0; } summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
section { margin: 1.2rem 0; padding: 1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; }
.turn { display: flex; flex-direction: column; gap: .35rem;
  margin: .5rem 0; max-width: 85%; align-items: flex-start; }
.turn.mine { margin-left: auto; align-items: flex-end; }
.turn p { margin: 0; padding: .4rem .8rem; border-radius: 1rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.theirs .said { background: var(--theirs); border-bottom-left-radius: .2rem; }
.mine .said { background: var(--mine); border-bottom-right-radius: .2rem; }
.turn .reply { border: 1.5px dashed var(--line); color: var(--ink); }
.by { font-size: .78rem; color: var(--soft); }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; width: 13rem; padding: .6rem; border-radius: .6rem;
  border: 1px solid var(--line); }
figure img { display: block; height: auto; image-rendering: pixelated;
  border-radius: .3rem; }
.nothing { width: 144px; height: 144px; display: grid; place-items: center;
  border: 1px dashed var(--line); color: var(--soft); border-radius: .3rem; }
figcaption { display: grid; gap: .2rem; margin-top: .4rem;
  font-size: .82rem; overflow-wrap: anywhere; }
.mark { display: inline-block; padding: 0 .45rem; border-radius: .6rem;
  font-size: .78rem; background: var(--theirs); color: var(--soft); }
.mark.right { background: var(--right-paper); color: var(--right); }
.mark.wrong { background: var(--wrong-paper); color: var(--wrong); }
"""
