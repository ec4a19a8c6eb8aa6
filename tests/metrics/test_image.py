"""Attribute and answer accuracy by hand."""

import pytest

from photochat_jax.metrics import image

KINDS = {"shape": "captioned", "place": "captioned", "colour": "told",
         "wall": "unsaid"}  # fmt: skip


def photo(shape, place, colour, wall):
  return dict(shape=shape, place=place, colour=colour, wall=wall)


def test_each_attribute_and_the_means_of_the_kinds():
  gold = [photo("circle", "left", "red", "grey")] * 4
  seen = [
    photo("circle", "left", "red", "blue"),
    photo("circle", "right", "blue", "grey"),
    photo("square", "right", "blue", "blue"),
    None,  # not shared: wrong in everything
  ]
  got = image.attribute_accuracy(
    [image.Drawn(*pair) for pair in zip(gold, seen, strict=True)], KINDS
  )
  assert got == {
    "mean": pytest.approx(3 / 8),
    "captioned": pytest.approx(3 / 8),
    "told": pytest.approx(1 / 4),
    "shape": pytest.approx(2 / 4),
    "place": pytest.approx(1 / 4),
    "colour": pytest.approx(1 / 4),
    "wall": pytest.approx(1 / 4),
  }


def test_an_attribute_a_photo_lacks_does_not_count():
  gold = photo("circle", "left", "red", "grey")
  bare = {"shape": "circle"}
  got = image.attribute_accuracy(
    [image.Drawn(gold, gold), image.Drawn(bare, bare)], KINDS
  )
  assert got["shape"] == 1.0
  assert got["place"] == 1.0
  assert image.attribute_accuracy([], KINDS) == dict.fromkeys(
    ["mean", "captioned", "told", *KINDS]
  )


def test_an_attribute_not_seen_is_wrong():
  gold = photo("circle", "left", "red", "grey")
  assert not image.Drawn(gold, {"place": "left"}).right("shape")
  assert image.Drawn(gold, {"place": "left"}).right("place")


def test_chance_is_even_guessing():
  values = {"shape": "abc", "place": "ab", "colour": "abcdef", "wall": "abcd"}
  assert image.attribute_chance(values, KINDS) == {
    "mean": pytest.approx((1 / 3 + 1 / 2) / 2),
    "captioned": pytest.approx((1 / 3 + 1 / 2) / 2),
    "told": pytest.approx(1 / 6),
    "shape": pytest.approx(1 / 3),
    "place": pytest.approx(1 / 2),
    "colour": pytest.approx(1 / 6),
    "wall": pytest.approx(1 / 4),
  }


COLOURS = ("red", "blue", "light blue", "grey")


@pytest.mark.parametrize(
  "reply,right",
  [
    ("It is blue.", True),
    ("BLUE!", True),
    ("blue, really blue", True),
    ("blue or red", False),
    ("light blue", False),
    ("light blue and blue", False),
    ("a bluebird", False),
    ("red", False),
    ("no idea", False),
    ("", False),
  ],
)
def test_a_reply_must_name_the_answer_and_nothing_else(reply, right):
  assert image.answers(reply, "blue", COLOURS) is right


def test_a_longer_value_is_itself():
  assert image.answers("the wall is light blue", "light blue", COLOURS)
  assert not image.answers("light blue, or grey", "light blue", COLOURS)
