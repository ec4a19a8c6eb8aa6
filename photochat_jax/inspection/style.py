"""How the page of `inspect_data` looks.

Dark on light. What a token is to the losses is told by colour and by its
underline, so that it can be told apart without colours too; every pair of
colours that text is written in has a contrast of 4.5 or more (WCAG 2.2, AA).
"""

STYLE = """
:root { color-scheme: light; --paper: #f5f6f8; --card: #ffffff;
  --ink: #16181d; --soft: #545b66; --line: #d5d9e1; --theirs: #eceef2;
  --mine: #dbe9ff; --none: #c2c8d3; --text: #3b7fdd; --caption: #e08700;
  --slot: #7c5cd0; --limit: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 1.2rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .5rem; font-size: 1.2rem; }
h3 { margin: 0 0 .5rem; font-size: 1rem; }
h3 small { margin-left: .5rem; font-weight: 400; color: var(--soft); }
h4, h5 { display: inline; margin: 0; font-size: .88rem; }
h5 { display: block; margin: .2rem 0 .4rem; font-size: .82rem;
  overflow-wrap: anywhere; }
header p { margin: .2rem 0; color: var(--soft); overflow-wrap: anywhere; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 .7rem;
  margin: .3rem 0; font-size: .85rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.note { margin: .4rem 0; color: var(--soft); font-size: .82rem;
  max-width: 60rem; overflow-wrap: anywhere; }
.tables { columns: 27rem; column-gap: 1rem; }
.table { break-inside: avoid; margin-bottom: 1rem; padding: .8rem;
  background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { padding: .2rem .6rem; text-align: left; font-weight: 400;
  border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { font-weight: 600; vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
.histograms { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17.5rem), 1fr)); }
.histogram { margin: 0; padding: .7rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; }
.histogram figcaption { display: grid; font-size: .82rem; }
.histogram span { color: var(--soft); font-size: .76rem; }
svg { display: block; width: 100%; height: auto; margin-top: .4rem; }
svg rect { fill: var(--text); } svg rect:hover { fill: #1b4f9c; }
svg text { font: 10px system-ui, sans-serif; fill: var(--soft); }
.axis { stroke: #8a92a0; } .median { stroke: var(--ink); stroke-width: 1.5; }
.limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 4 3; }
.rows { padding: .8rem; background: var(--card); display: grid; gap: .5rem;
  grid-template-columns: minmax(0, 1fr);
  border: 1px solid var(--line); border-radius: .6rem; }
.row { display: flex; gap: 3px; }
.segment { min-width: 0; overflow: hidden; font-size: .7rem;
  white-space: nowrap; color: var(--soft); }
.segment.t { cursor: default; font-family: inherit; }
.strip { display: flex; height: .8rem; border-radius: .2rem;
  overflow: hidden; }
.strip i { min-width: 0; }
.strip .none, .swatch.none { background: var(--none); }
.strip .text, .swatch.text { background: var(--text); }
.strip .caption, .swatch.caption { background: var(--caption); }
.strip .slot, .swatch.slot { background: var(--slot); }
.strip .padding, .swatch.padding { background: repeating-linear-gradient(
  135deg, #fff 0 4px, #b6bdc9 4px 5px); }
.swatch { display: inline-block; width: 1.2rem; height: .8rem;
  margin-right: .3rem; border-radius: .2rem; vertical-align: -.05rem; }
.legend { position: sticky; top: 0; z-index: 1; display: flex;
  flex-wrap: wrap; gap: .2rem 1rem; align-items: center; margin: .5rem 0;
  padding: .4rem .8rem; font-size: .82rem; background: #fffffff2;
  border: 1px solid var(--line); border-radius: .6rem; }
.legend .slots { margin-right: -.7rem; }
.still { position: static; }
.dialogue { margin: 1rem 0; padding: .9rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; }
.columns { display: grid; gap: 1.2rem; align-items: start;
  grid-template-columns: minmax(0, 22rem) minmax(0, 1fr); }
.turn { display: flex; flex-direction: column; gap: .1rem; margin: .35rem 0;
  max-width: 88%; align-items: flex-start; }
.turn.mine { margin-left: auto; align-items: flex-end; }
.who { font-size: .7rem; color: var(--soft); }
.said { margin: 0; padding: .25rem .7rem; border-radius: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; max-width: 100%;
  font-size: .88rem; line-height: 1.4; }
.theirs .said { background: var(--theirs); border-bottom-left-radius: .2rem; }
.mine .said { background: var(--mine); border-bottom-right-radius: .2rem; }
figure { margin: 0; }
.turn figure { width: 15rem; max-width: 100%; padding: .5rem;
  border: 1px solid var(--line); border-radius: .6rem; }
.turn img { display: block; max-width: 100%; max-height: 14rem;
  border-radius: .3rem; }
.turn img.small { width: 9rem; image-rendering: pixelated; }
.nothing { min-height: 4.5rem; padding: .4rem; display: grid;
  place-items: center; text-align: center; font-size: .8rem;
  overflow-wrap: anywhere; border: 1px dashed #8a92a0; color: var(--soft);
  border-radius: .3rem; }
figcaption dl { font-size: .76rem; gap: 0 .5rem; }
.side { padding: .2rem 0 .8rem; }
.side + .side { padding-top: .8rem; border-top: 1px solid var(--line); }
.side p { margin: .3rem 0; font-size: .82rem; color: var(--soft); }
.side .strip { margin: .35rem 0; }
.count { display: inline-block; margin-left: .4rem; padding: 0 .4rem;
  font-size: .74rem; border-radius: .3rem; }
.line { display: grid; grid-template-columns: 4.2rem minmax(0, 1fr);
  padding: .25rem 0; border-top: 1px solid #eceef2; }
.gutter { font-size: .7rem; line-height: 1.25; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.gutter span { display: block; }
.tokens { line-height: 1.75; }
.t { font: 12px/1.35 ui-monospace, "DejaVu Sans Mono", monospace; }
i.t { display: inline-block; margin: 0 1px 1px 0; padding: 0 2px;
  border-radius: 3px; border-bottom: 2px solid transparent;
  vertical-align: middle; max-width: 100%; overflow-wrap: anywhere; }
i.none, .count.none { background: #e8ebf0; color: #3b424d; }
i.t.text, .count.text { background: #cfe3ff; color: #08306b; }
i.t.text { border-bottom-color: #1b61c9; }
i.t.caption, .count.caption { background: #ffe0ab; color: #573100; }
i.t.caption { border-bottom: 2px dashed #b35900; }
.count.slot { background: #ddd3f6; color: #3b2382; }
i.t.clip { background: #e3f2ec; color: #0c4a34; }
i.t.control { font-weight: 700; box-shadow: inset 0 0 0 1px currentColor; }
.slots { display: inline-flex; flex-wrap: wrap; vertical-align: middle;
  padding: 2px; margin: 0 2px; border: 1px solid #5b3fb0;
  border-radius: 4px; background: #f1edfb; }
i.t.slot { width: 7px; height: 13px; padding: 0; background: #a78ee6;
  border: 0; border-radius: 1px; box-shadow: none; }
.tick { font: 9px/1 ui-monospace, "DejaVu Sans Mono", monospace;
  color: var(--soft); margin: 0 1px 0 3px; vertical-align: top; }
.t:hover { outline: 2px solid var(--ink); outline-offset: 1px; }
.t[data-t]:hover::after { content: attr(data-t); position: fixed; z-index: 2;
  left: 0; right: 0; bottom: 0; padding: .5rem 1rem; background: #16181d;
  color: #fff; font: 13px/1.4 system-ui, sans-serif; text-align: left;
  white-space: normal; }
.alignment { margin-top: .6rem; padding: .6rem; border-radius: .4rem;
  background: #fafbfc; border: 1px solid var(--line); }
.groups { display: flex; flex-wrap: wrap; gap: .3rem; }
.group { display: grid; grid-template-rows: auto auto; gap: 2px;
  justify-items: start; }
.group > span { min-height: 1.3rem; }
.group small { margin-left: .25rem; font-size: 9px; }
.group em { color: var(--soft); }
@media (max-width: 46rem) {
  main { padding: .8rem .6rem 4rem; }
  table { font-size: .8rem; } th, td { padding: .2rem .3rem; }
  .columns { grid-template-columns: minmax(0, 1fr); }
  .legend { position: static; }
  .line { grid-template-columns: minmax(0, 1fr); }
  .gutter { display: flex; gap: .5rem; }
  .histograms { gap: .5rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .segment span { display: none; }
}
@media print { .legend { position: static; } }
"""
