"""One dialogue of the inspection's page: photos, talk, and every token.

All that is from data is escaped here, and characters that steer (a terminal,
the direction of writing) stand as their numbers.
"""

import base64
import html
import io
import itertools
from collections.abc import Sequence

from etils import epath

from photochat_jax.data import images, schema
from photochat_jax.inspection.layout import (
  KINDS,
  Alignment,
  Group,
  Shown,
  Side,
  Token,
  printable,
)
from photochat_jax.inspection.table import number, percent

THUMBNAIL = 320
"""Longest side of a photo on the page, in pixels."""

_TICK = 10  # Every so many positions one is told.
_SAID = {
  "none": "no loss",
  "text": "text loss",
  "caption": "caption loss",
  "slot": "visual slots",
}


def escape(value: object) -> str:
  """Anything as text that HTML shows and does not obey.

  Line ends stay, for `white-space: pre-wrap`.
  """
  lines = str(value).replace("\r\n", "\n").split("\n")
  return html.escape("\n".join(map(printable, lines)), quote=True)


def dialogue(place: int, shown: Shown, opened: bool) -> str:
  """A dialogue under a heading.

  Args:
    place: of the page's dialogues, from 1.
    shown: what to show.
    opened: whether its tokens are unfolded.
  """
  talk = shown.dialogue
  photos = sum(turn.photo is not None for turn in talk.turns)
  sides = "\n".join(_side(side, opened) for side in shown.sides)
  return f"""<section class="dialogue" id="dialogue-{place}">
<h3>{place}. {escape(talk.split)}, dialogue {escape(talk.id)}
<small>{len(talk.turns)} turns, {photos} photo{"s" * (photos != 1)}</small></h3>
<div class="columns"><div class="talk">
{_talk(talk.turns)}
</div><div class="sides">
{sides}
</div></div>
</section>"""


def strip(runs: Sequence[tuple[str, int]], rest: int = 0) -> str:
  """A bar of runs of tokens; `rest` is what of it is empty."""
  bars = "".join(
    f'<i class="{kind}" style="flex:{count}"></i>' for kind, count in runs
  )
  empty = f'<i class="padding" style="flex:{rest}"></i>' if rest else ""
  return f'<div class="strip" aria-hidden="true">{bars}{empty}</div>'


def _talk(turns) -> str:
  parts, last = [], None
  for place, turn in enumerate(turns):
    mine = "mine" if turn.speaker == 0 else "theirs"
    name = f"<b>speaker {turn.speaker}</b> " * (turn.speaker != last)
    said = ""
    if turn.text.strip():
      said = f'<p class="said" dir="auto">{escape(turn.text)}</p>'
    photo = _photo(turn.photo) if turn.photo else ""
    parts.append(
      f'<div class="turn {mine}"><span class="who">{name}turn {place}</span>'
      f"{said}{photo}</div>"
    )
    last = turn.speaker
  return "\n".join(parts)


def thumbnail(path: epath.PathLike) -> tuple[str, int]:
  """A photo as a `data:` URI of a JPEG, and its longest side in pixels.

  Raises:
    ImageError: it cannot be read or used.
  """
  try:
    data = epath.Path(path).read_bytes()
  except OSError as e:
    raise images.ImageError(f"{path} cannot be read: {e}") from e
  image = images.decode(data, str(path))
  image.thumbnail((THUMBNAIL, THUMBNAIL))
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", quality=82)
  text = base64.b64encode(buffer.getvalue()).decode("ascii")
  return f"data:image/jpeg;base64,{text}", max(image.size)


def _photo(photo: schema.Photo) -> str:
  """A photo with what is said about it; without a file, an empty frame."""
  said = escape(photo.caption or photo.description or photo.id)
  frame, why = "", "no file"
  if photo.path is not None:
    try:
      uri, side = thumbnail(photo.path)
      small = ' class="small"' if side <= 64 else ""
      frame = f'<img src="{uri}" alt="{said}"{small}>'
    except images.ImageError as e:
      why = f"training masks this photo: {e}"
  if not frame:
    frame = f'<div class="nothing">{escape(why)}</div>'
  facts = [
    f"<dt>{name}</dt><dd>{escape(value)}</dd>"
    for name, value in (
      ("photo", photo.id),
      ("described", photo.description),
      ("caption", photo.caption or "none"),
    )
    if value
  ]
  return (
    f"<figure>{frame}<figcaption><dl>{''.join(facts)}</dl></figcaption>"
    "</figure>"
  )


def _side(side: Side, opened: bool) -> str:
  """One speaker's side: what it is made of, its tokens, its captions."""
  title = f"The model as speaker {side.speaker}"
  if side.left_out:
    reason, _, sentence = side.left_out.partition(": ")
    return (
      f'<div class="side"><h4>{title}: left out, {escape(reason)}</h4>'
      f"<p>{escape(sentence)}</p></div>"
    )
  tokens = side.tokens
  counts = [sum(t.kind == kind for t in tokens) for kind in KINDS]
  told = " ".join(
    f'<span class="count {kind}">{count:,} {_SAID[kind]}</span>'
    for kind, count in zip(KINDS, counts, strict=True)
    if count
  )
  cut = ""
  if side.cut_turns:
    cut = (
      f"<p>The {side.cut_turns} oldest turns are cut, wholly or in part, to "
      "fit.</p>"
    )
  wrote = {
    token.position: group
    for caption in side.captions
    for group in caption.groups
    for token in group.tokens
  }
  lines = "\n".join(
    f'<div class="line"><div class="gutter">'
    f"<span>{'model' if line.own else 'given'}</span>"
    f"<span>{_range(line.tokens)}</span></div>"
    f'<div class="tokens">{_tokens(line.tokens, wrote)}</div></div>'
    for line in side.lines
  )
  captions = "\n".join(_alignment(caption) for caption in side.captions)
  runs = [
    (kind, len(list(run)))
    for kind, run in itertools.groupby(token.kind for token in tokens)
  ]
  return f"""<div class="side"><details{" open" * opened}>
<summary><h4>{title}: {number(len(tokens))} tokens</h4> {told}{strip(runs)}
</summary>{cut}
<div class="layout">
{lines}
</div>
{captions}
</details></div>"""


def _range(tokens: Sequence[Token]) -> str:
  first, last = tokens[0].position, tokens[-1].position
  return f"{first}–{last}" if first < last else str(first)


def _tokens(tokens: Sequence[Token], wrote: dict[int, Group]) -> str:
  """Tokens as chips; neighbouring slots of a photo as one box of squares."""
  parts: list[str] = []
  inside = False
  for token in tokens:
    slot = token.kind == "slot"
    if slot and not inside:
      parts.append('<span class="slots">')
    elif inside and not slot:
      parts.append("</span>")
    inside = slot
    if token.position % _TICK == 0 and not slot:
      parts.append(f'<b class="tick">{token.position}</b>')
    hint = f"position {token.position} · id {token.id} · {_SAID[token.kind]}"
    hint += " · control token" * (token.control and not slot)
    hint += f" · {token.note}" * bool(token.note)
    group = wrote.get(token.position)
    if group:
      pieces = " ".join(piece.text for piece in group.pieces)
      hint += f" · to CLIP: {pieces or 'nothing'}"
    shade = f"{token.kind} control" if token.control else token.kind
    text = "" if slot else escape(token.text)
    parts.append(f'<i class="t {shade}" data-t="{escape(hint)}">{text}</i>')
  return "".join(parts) + "</span>" * inside


def _alignment(caption: Alignment) -> str:
  """A caption's tokens over the pieces of CLIP that they wrote."""
  groups = "".join(_group(group) for group in caption.groups)
  padding = caption.slots - caption.used
  cut = " It was longer and is cut." * caption.cut
  return f"""<div class="alignment"><h5>The caption of photo
{escape(caption.photo.id)}: LLM tokens, and the CLIP pieces that they write</h5>
<div class="groups"><span class="group"><span></span><span><i class="t clip
control">&lt;|startoftext|&gt;</i></span></span>{groups}<span class="group">
<span></span><span><i class="t clip control">&lt;|endoftext|&gt;</i></span>
</span></div>
<p>{caption.used} of {caption.slots} slots of the text encoder, {padding} are
padding.{cut} Small numbers: which per cent of a piece's bytes each token above
it wrote.</p></div>"""


def _group(group: Group) -> str:
  above = "".join(
    f'<i class="t caption" data-t="id {token.id}">{escape(token.text)}</i>'
    for token in group.tokens
  )
  below = "".join(_piece(group, piece) for piece in group.pieces)
  below = below or '<em title="no piece">–</em>'
  return (
    f'<span class="group"><span>{above}</span><span>{below}</span></span>'
  )


def _piece(group: Group, piece) -> str:
  """A piece, with the shares of its writers where they are several."""
  told = ", ".join(
    f"{percent(share)} {token.text}"
    for token, share in zip(group.tokens, piece.shares, strict=True)
    if share
  )
  shares = ""
  if len(group.tokens) > 1:
    shares = "·".join(f"{share:.0%}".rstrip("%") for share in piece.shares)
    shares = f"<small>{shares}</small>"
  hint = escape(f"id {piece.id} · written by {told}")
  return f'<i class="t clip" data-t="{hint}">{escape(piece.text)}{shares}</i>'
