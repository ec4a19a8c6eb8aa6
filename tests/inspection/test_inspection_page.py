"""The page of the inspection: every token, nothing obeyed, nothing fetched."""

import base64
import html.parser
import io
import json
import re

import browser
import pytest
from PIL import Image

from photochat_jax import inspect_data
from photochat_jax.data import images, tokenizers
from photochat_jax.data.schema import Photo
from photochat_jax.data.spec import DataSpec
from photochat_jax.inspection import page as page_lib
from photochat_jax.inspection import style, talk
from photochat_jax.inspection import tables as tables_lib

VOID = {"meta", "img", "br", "link"}
HOSTILE = (
  "</p></section><script>document.title = 'owned'</script>"
  '"><img src="http://127.0.0.1:9/seen" onerror="document.title=1">'
  "</style>'\u202eback\x1b[2J & &lt;"
)


@pytest.fixture(scope="module")
def tools():
  spec = DataSpec(
    batch_size=1, length=512, photos_in=4, photos_out=4, num_visual_tokens=3,
    vision_size=1, photo_size=1, system_prompt="You chat.",
  )  # fmt: skip
  return (
    tokenizers.load_llm_tokenizer(), tokenizers.load_clip_tokenizer(), spec
  )  # fmt: skip


class Page(html.parser.HTMLParser):
  """Collects elements and texts; fails on tags that do not nest."""

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

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)

  def all(self, tag):
    return [attrs for name, attrs in self.elements if name == tag]


def record(*turns, **fields):
  keys = ("user_id", "message", "share_photo")
  return {
    "dialogue": [
      dict(zip(keys, (*t, False)[:3], strict=True)) for t in turns
    ],
    **fields,
  }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A good photo, a bad one, a missing one, and a hostile dialogue."""
  folder = tmp_path_factory.mktemp("set")
  (folder / "photos").mkdir()
  Image.new("RGB", (640, 320), (200, 30, 30)).save(folder / "photos/good.jpg")
  (folder / "photos" / "bad.jpg").write_bytes(b"<html>no photo</html>")
  records = [
    record(
      (1, f"about {name}?"), (0, "look"), (0, "", True), (1, "nice"),
      photo_id=name, photo_description="Objects in the photo: Cat, Tree",
      dialogue_id=name, photo_caption="a cat under a tree",
    )
    for name in ("good", "bad", "gone")
  ]  # fmt: skip
  records.append(
    record(
      (1, HOSTILE), (0, "", True), photo_id="good", dialogue_id=HOSTILE[:90],
      photo_description=f"Objects in the photo: {HOSTILE}",
      photo_caption=HOSTILE,
    )
  )  # fmt: skip
  (folder / "train").mkdir()
  (folder / "train" / "0.json").write_text(json.dumps(records))
  return folder


@pytest.fixture(scope="module")
def found(folder, tools):
  return inspect_data.inspect("photochat", folder, *tools)


@pytest.fixture(scope="module")
def page(found):
  tables = tables_lib.tables(found.report)
  return page_lib.render(found.report, tables, found.shown, found.rows)


def test_hostile_text_is_text(page):
  parsed = Page(page)
  assert not parsed.all("script")
  assert not [a for _, a in parsed.elements if any(k[:2] == "on" for k in a)]
  assert all(
    img["src"].startswith("data:image/jpeg;base64,")
    for img in parsed.all("img")
  )
  shown = "".join(parsed.text)
  assert "<script>document.title = 'owned'</script>" in shown
  assert "⟨202E⟩back⟨1B⟩[2J & &lt;" in shown
  assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", page)


def test_nothing_is_fetched(page):
  parsed = Page(page)
  (policy,) = (
    a["content"] for a in parsed.all("meta") if "http-equiv" in a
  )
  assert policy.startswith("default-src 'none'")
  urls = [a.get(k, "") for _, a in parsed.elements for k in ("src", "href")]
  assert all(not url or url.startswith("data:") for url in urls)
  assert "url(" not in page and "@import" not in page


def test_photos_are_whole_missing_or_explained(page):
  parsed = Page(page)
  data = [img["src"].partition(",")[2] for img in parsed.all("img")]
  assert len(data) == 2  # Two dialogues share the good one.
  photo = Image.open(io.BytesIO(base64.b64decode(data[0])))
  assert photo.size == (320, 160) and photo.getpixel((9, 9))[0] > 180
  shown = "".join(parsed.text)
  assert "no file" in shown and "is not a photo" in shown
  assert "gone" in shown and "Objects in the photo: Cat, Tree" in shown


def test_every_token_is_on_the_page(found, page):
  chips = re.findall(r'<i class="t (\w+)[^"]*" data-t="position (\d+) ', page)
  expected = [
    (token.kind, str(token.position))
    for shown in found.shown
    for side in shown.sides
    for token in side.tokens
  ]
  assert chips == expected
  assert page.count('class="alignment"') == 4
  wrote = re.findall(r'caption loss · to CLIP: ([^"]*)"', page)
  assert "under&lt;/w&gt;a&lt;/w&gt;tree&lt;/w&gt;" in "".join(wrote).replace(
    " ", ""
  )


def test_two_dialogues_are_unfolded(found, page):
  sides = [side for shown in found.shown[:2] for side in shown.sides]
  laid_out = [side for side in sides if not side.left_out]
  assert page.count("<details open>") == len(laid_out) > 0
  assert page.count('class="dialogue"') == 4


def test_an_empty_histogram_is_left_out():
  empty = {"title": "t", "limit": None, "start": 0, "step": 1, "counts": [],
           "summary": {"count": 0}}  # fmt: skip
  assert page_lib._histogram(empty) == ""


def test_a_thumbnail_of_a_file_that_went_away(tmp_path):
  with pytest.raises(images.ImageError, match="cannot be read"):
    talk.thumbnail(tmp_path / "gone.jpg")
  shown = talk._photo(Photo("x", "", None, tmp_path / "gone.jpg"))
  assert "cannot be read" in shown and "<img" not in shown


def luminance(colour):
  channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
    for c in channels
  ]
  weights = (0.2126, 0.7152, 0.0722)
  return sum(w * c for w, c in zip(weights, linear, strict=True))


def contrast(a, b):
  high, low = sorted((luminance(a), luminance(b)), reverse=True)
  return (high + 0.05) / (low + 0.05)


def test_contrasts_are_those_of_wcag_aa():
  css = re.sub("#fff\\b", "#ffffff", style.STYLE)
  names = dict(re.findall(r"--(\w+): (#\w{6})", css))
  rules = re.findall(r"\{([^{}]*)\}", css)
  pairs = [
    (paper.group(1), ink.group(1))
    for rule in rules
    if (paper := re.search(r"background: (#\w{6})\b", rule))
    and (ink := re.search(r"(?<![-\w])color: (#\w{6})\b", rule))
  ]
  assert len(pairs) >= 6
  grounds = [names[n] for n in ("paper", "card", "theirs", "mine")]
  pairs += [(ground, names["ink"]) for ground in grounds]
  pairs += [(ground, names["soft"]) for ground in (*grounds[:2], "#fafbfc")]
  assert min(contrast(*pair) for pair in pairs) >= 4.5


@browser.needs_chromium
def test_in_a_browser(page, tmp_path):
  (tmp_path / "page.html").write_text(page)
  dom, console, asked = browser.browse(tmp_path / "page.html", tmp_path)
  assert console == [] and asked == set()
  shown = Page(re.sub("<!DOCTYPE[^>]*>", "", dom))
  assert "photochat: a look at the data" in shown.text
  assert not shown.all("script")
  classes = [a.get("class", "").split() for _, a in shown.elements]
  for name in ("dialogue", "histogram", "line", "slots", "alignment", "strip"):
    assert sum(name in some for some in classes) >= 4, name
  assert len(shown.all("svg")) >= 6


@browser.needs_chromium
def test_a_browser_that_is_asked_to_fetch_is_noticed(tmp_path):
  (tmp_path / "page.html").write_text(
    '<img src="http://127.0.0.1:9/seen"><script>console.error("x")</script>'
  )
  _, console, asked = browser.browse(tmp_path / "page.html", tmp_path)
  assert asked == {"http://127.0.0.1:9/seen"}
  assert console


@browser.needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out(page, tmp_path, width):
  opened = page.replace("<details", "<details open")
  assert browser.content_width(opened, tmp_path, width) <= width
