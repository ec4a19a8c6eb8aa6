"""One self-contained page that lays several models side by side.

A table of the models, then dialogues with what each of them said and drew,
those first where they did worst. Nothing is fetched, everything from data and
models is escaped, and of scripts only the page's own few lines run: they sort
the dialogues by a score of one model, of all, or by how much models disagree.
Without scripts the order stays as it is. A link may end in `#SCORE/BY`, as the
two menus write it.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from photochat_jax.metrics import report

# What dialogues may be sorted by, beside a model's name.
MEAN, SPREAD = "=mean", "=spread"


Scores = Mapping[str, Mapping[str, float | None]]
"""Of a dialogue: name -> model -> 0 (wrong) ... 1 (right), None where it does
not apply."""


class Case(NamedTuple):
  """A dialogue with several models' replies, and their scores."""

  example: report.Example
  scores: Scores


class Table(NamedTuple):
  """A table of strings; the first cell of a row names it."""

  heads: Sequence[str]
  rows: Sequence[Sequence[str]]
  note: str = ""


def value(scores: Scores, score: str, by: str) -> float | None:
  """What a dialogue is sorted by, None where that does not apply.

  Args:
    scores: of the dialogue.
    score: one of them.
    by: `MEAN` over models, `SPREAD`, the largest less the smallest, or a model.
  """
  of = scores.get(score, {})
  known = [v for v in of.values() if v is not None]
  if by == MEAN:
    return sum(known) / len(known) if known else None
  if by == SPREAD:
    return max(known) - min(known) if len(known) > 1 else None
  return of.get(by)


def order(dialogues: Sequence[Scores], score: str, by: str = MEAN) -> list[int]:
  """Indices of dialogues: the worst first, or the most disputed.

  Those to which it does not apply are last.
  """
  sign = -1 if by == SPREAD else 1

  def place(index):
    found = value(dialogues[index], score, by)
    return (found is None, sign * (found or 0.0))

  return sorted(range(len(dialogues)), key=place)


def render(
  title: str,
  tables: Sequence[Table],
  cases: Sequence[Case],
  total: int,
  scores: Mapping[str, str],
  details: Mapping[str, str],
) -> str:
  """The page.

  Args:
    title: the heading.
    tables: of the models.
    cases: dialogues, in the order of the first score.
    total: how many there are, shown or not.
    scores: name -> what it is; the first is sorted by.
    details: what a reader needs to tell these runs from others.

  Returns:
    A whole HTML document.
  """
  models = list(dict.fromkeys(
    model for case in cases for of in case.scores.values() for model in of
  ))  # fmt: skip
  digest = hashlib.sha256(_SCRIPT.encode()).digest()
  allowed = f"'sha256-{base64.b64encode(digest).decode()}'"
  choices = {MEAN: "mean of all, worst first"}
  choices[SPREAD] = "disagreement, largest first"
  choices |= {model: f"{model}, worst first" for model in models}
  legend = "; ".join(f"{name}: {what}" for name, what in scores.items())
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';
 img-src data:; style-src 'unsafe-inline'; script-src {allowed}">
<link rel="icon" href="data:,">
<title>{report.escape(title)}</title>
<style>{report.STYLE}{_STYLE}</style>
</head>
<body>
<main class="wide">
<h1>{report.escape(title)}</h1>
{"".join(map(_table, tables))}
{report.details_html("About these runs", details)}
<h2>Dialogues</h2>
<p class="legend">{len(cases)} of {total}. Solid bubbles are the data: the
partner on the left, the models' side on the right. Dashed bubbles under a turn
are what each model said there by itself, given the data up to that turn.
Scores from 0 to 1: {report.escape(legend)}.</p>
<p class="sort"><label>Sort by {_menu("score", {n: n for n in scores})}</label>
<label>of {_menu("by", choices)}</label></p>
<div id="cases">
{"".join(_case(case, scores, models) for case in cases)}
</div>
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _menu(name: str, choices: Mapping[str, str]) -> str:
  options = "".join(
    f'<option value="{report.escape(key)}">{report.escape(shown)}</option>'
    for key, shown in choices.items()
  )
  return f'<select id="{name}">{options}</select>'


def _table(table: Table) -> str:
  heads = "".join(
    f'<th scope="col">{report.escape(head)}</th>' for head in table.heads
  )
  rows = []
  for first, *rest in table.rows:
    cells = "".join(f"<td>{report.escape(cell)}</td>" for cell in rest)
    rows.append(
      f'<tr><th scope="row">{report.escape(first)}</th>{cells}</tr>\n'
    )
  note = f'<p class="legend">{report.escape(table.note)}</p>'
  return (
    f'{note if table.note else ""}<div class="scroll" tabindex="0">'
    f'<table class="models"><thead><tr>{heads}</tr></thead>\n'
    f"<tbody>{''.join(rows)}</tbody></table></div>\n"
  )


def _case(
  case: Case, scores: Mapping[str, str], models: Sequence[str]
) -> str:
  found = {
    name: {
      model: None if score is None else round(score, 4)
      for model, score in case.scores.get(name, {}).items()
    }
    for name in scores
  }
  names = [n for n in scores if any(v is not None for v in found[n].values())]
  heads = "".join(f"<th>{report.escape(name)}</th>" for name in names)
  rows = "".join(
    f'<tr><th scope="row">{report.escape(model)}</th>'
    + "".join(_score(found[name].get(model)) for name in names)
    + "</tr>"
    for model in models
  )
  table = (
    f'<table class="scores"><thead><tr><th></th>{heads}</tr></thead>'
    f"<tbody>{rows}</tbody></table>"
  )
  packed = report.escape(json.dumps(found))
  return report.example_html(
    case.example, f' data-scores="{packed}"', table
  )


def _score(score: float | None) -> str:
  if score is None:
    return "<td>–</td>"
  # Words beside the colour, for those who do not tell colours apart.
  return f'<td style="--share:{score:.2f}">{score:.2f}</td>'


_SCRIPT = """
(() => {
  const list = document.getElementById('cases');
  const cards = [...list.children].map((element, place) => (
    {element, place, scores: JSON.parse(element.dataset.scores)}));
  const score = document.getElementById('score');
  const by = document.getElementById('by');
  const valueOf = card => {
    const all = card.scores[score.value];
    const known = Object.values(all).filter(x => x !== null);
    if (by.value === '=mean') {
      return known.length ? known.reduce((a, b) => a + b) / known.length : null;
    }
    if (by.value === '=spread') {
      return known.length > 1 ? Math.max(...known) - Math.min(...known) : null;
    }
    return all[by.value] ?? null;
  };
  const sort = () => {
    const sign = by.value === '=spread' ? -1 : 1;
    const found = cards.map(card => ({...card, value: valueOf(card)}));
    found.sort((a, b) => (a.value === null) - (b.value === null)
      || sign * (a.value - b.value) || a.place - b.place);
    list.append(...found.map(card => card.element));
  };
  const read = () => {
    const [one, two] = decodeURIComponent(location.hash.slice(1)).split('/');
    if ([...score.options].some(o => o.value === one)) score.value = one;
    if ([...by.options].some(o => o.value === two)) by.value = two;
    sort();
  };
  for (const menu of [score, by]) {
    menu.addEventListener('change', () => {
      location.hash = encodeURIComponent(score.value) + '/'
        + encodeURIComponent(by.value);
    });
  }
  addEventListener('hashchange', read);
  if (location.hash) read();
})();
"""

_STYLE = """
main.wide { max-width: 76rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
.models td { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.models td:last-child { color: inherit; font-size: inherit; }
.models thead th:not(:first-child) { text-align: right; }
.models th[scope=row] { min-width: 11rem; }
.sort { display: flex; flex-wrap: wrap; gap: 1rem; position: sticky; top: 0;
  margin: 0 -1rem; padding: .6rem 1rem; background: var(--paper); z-index: 1; }
select { font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: .3rem; padding: .1rem .3rem; }
.scores { width: auto; margin-bottom: .8rem; font-size: .85rem; }
.scores th, .scores td { padding: .1rem .6rem; }
.scores td { text-align: right; font-variant-numeric: tabular-nums;
  color: inherit; font-size: inherit; background: color-mix(in srgb,
  var(--right-paper) calc(var(--share) * 100%), var(--wrong-paper)); }
.scores td:not([style]) { background: none; }
section .turn { max-width: 94%; }
"""
