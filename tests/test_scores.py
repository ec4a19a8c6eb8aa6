"""Scores of turns, with judges whose vectors are known."""

import dataclasses
import types

import numpy as np
import pytest
from PIL import Image

from photochat_jax import generate, judges, scores
from photochat_jax.data.schema import Photo
from photochat_jax.metrics.figures import Figures

EAST, NORTH = np.array([1.0, 0.0]), np.array([0.0, 1.0])
NEAR = np.array([0.8, 0.6])  # Cosine 0.8 with EAST, 0.6 with NORTH.


class Judge:
  """Red is EAST, green is NORTH; so are words; others are NEAR."""

  size = 4

  def see(self, photos):
    return np.array([(EAST, NORTH, NEAR)[p[0, 0].argmax()] for p in photos])

  def read(self, texts):
    known = {"red": EAST, "green": NORTH}
    return np.array([known.get(text, NEAR) for text in texts])


def colour(channel):
  pixels = np.zeros((4, 4, 3), np.uint8)
  pixels[..., channel] = 255
  return pixels


@pytest.fixture
def photo(tmp_path):
  def make(channel):
    path = tmp_path / f"{channel}.png"
    Image.fromarray(colour(channel)).save(path)
    return Photo(str(channel), "", "red", path)

  return make


@dataclasses.dataclass
class Turn:
  spoken: types.SimpleNamespace
  gold: Photo | None
  reply: generate.Reply
  drawn: np.ndarray | None = None


def turn(parts, text, caption=None, drawn=None):
  gold = next((p for p in parts if isinstance(p, Photo)), None)
  reply = generate.Reply((), text, caption, caption is None)
  return Turn(types.SimpleNamespace(parts=tuple(parts)), gold, reply, drawn)


def test_clip_by_hand(photo):
  turns = [
    # The data: "red" and a red photo; the model: a green one from "red".
    turn(["red", photo(0)], "green", "red", colour(1)),
    # Two texts are one, "red green": NEAR. The model says "red".
    turn(["red", "green"], "red"),
    # Where the data share none, the model does: 0.8 of a photo for a text.
    turn(["else"], "", "red", colour(0)),
    # Missing files cannot be compared.
    turn([Photo("x", "", "red")], "", "red", colour(0)),
    # Nothing is given.
    turn(["red"], ""),
  ]
  figures = Figures()
  scores.add_clip(figures, turns, Judge())
  assert figures.sizes == {
    "clip_score": 1, "clip_photo_similarity": 1, "mm_relevance": 4
  }  # fmt: skip
  assert figures.metrics["clip_score"] == 0  # A green photo from "red".
  assert figures.metrics["clip_photo_similarity"] == 0
  # (0 + 0) of two and two; 0.8 of one and one; likewise; 0 of none and one.
  assert figures.metrics["mm_relevance"] == pytest.approx(100 * 1.6 / 4)


def test_words_by_hand(photo):
  turns = [
    turn(["a b", photo(0), "and after"], "a b", "red"),
    turn([photo(0), "later words"], "ignored", "a red"),
    turn(["c"], "d"),
  ]
  figures = Figures()
  scores.add_words(figures, turns)
  # Two of three words; the turn without words before its photo is left out.
  assert figures.sizes["bleu_1"] == 2
  assert figures.metrics["bleu_1"] == pytest.approx(100 * 2 / 3)
  assert figures.sizes["caption_bleu_1"] == 2
  assert figures.metrics["caption_bleu_1"] == pytest.approx(100 * 2 / 3)
  assert figures.metrics["distinct_1"] == 100
  assert figures.reasons == {}


def test_inception_needs_photos(photo):
  class Inception:
    def look(self, photos):
      flat = np.stack(photos).astype(float)[:, 0, 0]
      return flat, flat

  figures = Figures()
  one = turn([photo(0)], "", "red", colour(0))
  scores.add_inception(figures, [one], Inception())
  assert figures.metrics == {"fid": None, "inception_score": None}
  assert "two photos" in figures.reasons["fid"]
  figures = Figures()
  other = turn([photo(1)], "", "red", colour(1))
  scores.add_inception(figures, [one, other], Inception())
  assert figures.metrics["fid"] == pytest.approx(0, abs=1e-6)
  assert figures.metrics["inception_score"] == pytest.approx(2)
  assert figures.sizes["fid"] == 2


def test_without_judges_figures_name_the_file():
  figures = Figures()
  scores.add_clip(figures, [], None)
  scores.add_inception(figures, [], None)
  assert set(figures.reasons.values()) == {
    judges.NEEDS_CLIP, judges.NEEDS_INCEPTION
  }  # fmt: skip
  assert set(figures.metrics.values()) == {None}
