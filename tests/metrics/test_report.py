"""The page: self-contained, well-formed, escaped, and true to its input."""

import base64
import html.parser
import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from photochat_jax.metrics import report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
  """Collects elements and fails on tags that do not nest."""

  def __init__(self, page):
    super().__init__()
    self.open, self.elements, self.text = [], [], []
    self.feed(page)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)

  def all(self, tag):
    return [attrs for name, attrs in self.elements if name == tag]


def pixels(seed):
  shape = (8, 6, 3)
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def page():
  gold = report.Picture(
    "in the data", pixels(0), "a red circle", (report.Mark("shape circle"),)
  )
  drawn = report.Picture(
    "drawn",
    pixels(1),
    "a <b>square</b>",
    (report.Mark("shape square", False), report.Mark("place left", True)),
  )
  missing = report.Picture("drawn", None)
  no = (report.Mark("no", False),)
  bubbles = (
    report.Bubble(False, ("show me </p><script>alert(1)</script>",)),
    report.Bubble(True, ("one", (gold, drawn), "two"), (report.Said("here"),)),
    report.Bubble(True, ((gold, missing),), (report.Said("", no),)),
  )
  return report.render(
    "Evaluation & more",
    [
      report.Figure("perplexity", 3.14159, 640.0, 12345),
      report.Figure("pixel_accuracy", None, None, 0, "no questions here"),
    ],
    [report.Example('dialogue "1"', bubbles)],
    {"seed": "0", "config": "{'a': '<x>'}"},
  )


def test_nothing_is_fetched(page):
  parsed = Page(page)
  assert not parsed.all("script") and not parsed.all("link")
  assert not parsed.all("iframe")
  for _, attrs in parsed.elements:
    assert not {"href", "srcset", "onload", "onerror"} & set(attrs)
  assert all(i["src"].startswith("data:image/png;") for i in parsed.all("img"))
  assert not re.search(r"url\(|@import|https?://", page)


def test_photos_are_the_pixels_that_were_given(page):
  sources = [attrs["src"] for attrs in Page(page).all("img")]
  assert len(sources) == 3  # the missing one is a frame, not an image
  for source, seed in zip(sources, (0, 1, 0), strict=True):
    raw = base64.b64decode(source.split(",", 1)[1])
    np.testing.assert_array_equal(
      np.asarray(Image.open(io.BytesIO(raw))), pixels(seed)
    )
  assert "image-rendering: pixelated" in page


def test_text_of_the_data_and_of_the_model_is_escaped(page):
  assert "<script" not in page and "<b>square" not in page
  text = "".join(Page(page).text)
  assert "show me </p><script>alert(1)</script>" in text
  assert "a <b>square</b>" in text


def test_a_turn_keeps_its_order(page):
  turn = page[page.index(">one<") :]
  assert turn.index("a red circle") < turn.index("square") < turn.index("two")
  assert turn.index("two") < turn.index("here")


def test_right_is_green_wrong_is_red_and_both_have_a_sign(page):
  marks = re.findall(r'<span class="mark (\w+)">([^<]*)</span>', page)
  marks = marks[2:]  # Less the legend's.
  assert ("wrong", "✗ shape square") in marks
  assert ("right", "✓ place left") in marks
  assert ("plain", "shape circle") in marks


def test_the_table_has_value_chance_and_reason(page):
  rows = re.findall(r'<tr><th scope="row">(.*?)</tr>', page, re.DOTALL)
  cells = [re.sub("<[^>]+>", "|", row).split("|") for row in rows]
  cells = [[c for c in row if c] for row in cells]
  assert cells == [
    ["perplexity", "3.142", "640", "12,345"],
    ["pixel_accuracy", "–", "–", "0", "no questions here"],
  ]


def test_it_has_both_light_and_dark_colours(page):
  assert "color-scheme: light dark" in page
  assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize(
  "value,shown",
  [
    (None, "–"),
    (0.93456, "0.935"),
    (1.0, "1.000"),
    (0, "0.000"),
    (640, "640"),
    (12.3456, "12.35"),
    (math.inf, "∞"),
    (math.nan, "nan"),
  ],
)
def test_numbers(value, shown):
  assert report.number(value) == shown
