"""Models side by side: what is first, what is run, what is seen."""

import base64
import hashlib
import html.parser
import json
import re

import browser
import numpy as np
import pytest

from photochat_jax.metrics import comparison, report
from photochat_jax.metrics.comparison import MEAN, SPREAD

RED, BLUE, GREEN = (250, 0, 0), (0, 0, 250), (0, 200, 0)
# Of three dialogues: what each model scores.
PHOTO = {
  "red": {"a": 0.2, "b": 1.0},
  "blue": {"a": 0.5, "b": 0.5},
  "green": {"a": 0.9, "b": None},
}
HOSTILE = "</section><script>document.title='owned'</script>&'\""


def case(name, colour):
  pixels = np.full((144, 144, 3), colour, np.uint8)
  picture = report.Picture("a", pixels, HOSTILE)
  said = (report.Said(HOSTILE, by="a"), report.Said("yes", by="b"))
  return comparison.Case(
    report.Example(name, (report.Bubble(True, ((picture,),), said),)),
    {"photo": PHOTO[name], "words": {"a": None, "b": None}},
  )


@pytest.fixture
def cases():
  names = {"red": RED, "blue": BLUE, "green": GREEN}
  return [case(*item) for item in names.items()]


def ordered(cases, *by):
  return [cases[i] for i in comparison.order([c.scores for c in cases], *by)]


@pytest.fixture
def page(cases):
  return comparison.render(
    "Side by side",
    [comparison.Table(["arm", "told"], [["a <b>", "0.5 ± 0.1"]], "note")],
    ordered(cases, "photo"),
    7,
    {"photo": "share of <details>", "words": "overlap"},
    {"a": "seed 0"},
  )


@pytest.mark.parametrize(
  "by,names",
  [
    # Means 0.6, 0.5 and, of one, 0.9.
    (MEAN, ["blue", "red", "green"]),
    # 0.8, 0.0; one alone cannot disagree.
    (SPREAD, ["red", "blue", "green"]),
    ("a", ["red", "blue", "green"]),
    ("b", ["blue", "red", "green"]),
  ],
)
def test_worst_first_or_disagreement_and_unknown_last(cases, by, names):
  found = ordered(cases, "photo", by)
  assert [c.example.title for c in found] == names


def test_only_its_own_script_may_run_and_nothing_is_fetched(page):
  (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
  (allowed,) = re.findall(r"script-src '([^']*)'", page)
  digest = hashlib.sha256(script.encode()).digest()
  assert allowed == f"sha256-{base64.b64encode(digest).decode()}"
  assert "default-src 'none'" in page
  assert not re.search(r"url\(|@import|https?://", page)
  assert "owned'</script>" not in page and "a &lt;b&gt;" in page
  assert "3 of 7" in page and "share of &lt;details&gt;" in page


class Sections(html.parser.HTMLParser):
  """Titles of the dialogues in order, and their scores."""

  def __init__(self, page):
    super().__init__()
    self.titles, self.scores, self.in_title = [], [], False
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    if "data-scores" in dict(attrs):
      self.scores.append(json.loads(dict(attrs)["data-scores"]))
    self.in_title = tag == "h3"

  def handle_data(self, data):
    if self.in_title:
      self.titles.append(data)
      self.in_title = False


def test_scores_are_in_the_page(page):
  sections = Sections(page)
  assert sections.titles == ["blue", "red", "green"]
  assert [s["photo"] for s in sections.scores] == [
    PHOTO[name] for name in sections.titles
  ]


@browser.needs_chromium
@pytest.mark.parametrize(
  "fragment,score,by",
  [
    ("", "photo", MEAN),
    ("#photo/%3Dspread", "photo", SPREAD),
    ("#photo/a", "photo", "a"),
    ("#nothing/nobody", "photo", MEAN),
    ("#words/a", "words", "a"),
  ],
)
def test_a_browser_sorts_as_python_does(
  cases, page, tmp_path, fragment, score, by
):
  (tmp_path / "page.html").write_text(page)
  dom, console, asked = browser.browse(
    f"{tmp_path / 'page.html'}{fragment}", tmp_path
  )
  assert console == [] and asked == set()
  wanted = ordered(ordered(cases, "photo"), score, by)
  assert Sections(dom).titles == [c.example.title for c in wanted]
  assert "<title>Side by side</title>" in dom  # Hostile text did not run.


@browser.needs_chromium
def test_choosing_in_the_menu_sorts(page, tmp_path):
  # A page around it chooses as a reader would.
  choose = (
    "<script>onload = () => {const by = document.getElementById('by');"
    "by.value = 'a'; by.dispatchEvent(new Event('change'))}</script>"
  )
  open_page = re.sub('<meta http-equiv[^>]*>', choose, page)
  (tmp_path / "page.html").write_text(open_page)
  dom, console, _ = browser.browse(
    tmp_path / "page.html", tmp_path, "--virtual-time-budget=3000"
  )
  assert console == []
  assert Sections(dom).titles == ["red", "blue", "green"]


@browser.needs_chromium
def test_what_is_seen(page, tmp_path):
  (tmp_path / "page.html").write_text(page)

  def heights(fragment):
    """How far down each colour's photo stands."""
    shot = browser.screenshot(
      f"file://{tmp_path / 'page.html'}{fragment}", tmp_path
    )
    found = {}
    for name, colour in (("red", RED), ("blue", BLUE), ("green", GREEN)):
      rows, columns = np.nonzero((shot == colour).all(-1))
      assert 100**2 < len(rows) < 200**2  # A photo of 144 x 144, once.
      assert columns.min() > 300  # The models' side is the right one.
      found[name] = rows.mean()
    return sorted(found, key=found.get)

  assert heights("") == ["blue", "red", "green"]
  assert heights("#photo/a") == ["red", "blue", "green"]


@browser.needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out(page, tmp_path, width):
  assert browser.content_width(page, tmp_path, width) <= width
