"""What a progress bar shows on a console that is no terminal: its end."""

import io

import pytest
import rich.console

from photochat_jax.data import bars


def drawn(use, description="Reading", total=None, **options):
  """The text of a bar after `use` of it."""
  stream = io.StringIO()
  console = rich.console.Console(file=stream, width=100)
  with bars.Bar(description, total, console, **options) as bar:
    use(bar)
  return " ".join(stream.getvalue().split())


def test_what_is_done_of_what_there_is():
  def use(bar):
    bar.advance(2)
    bar.advance()

  text = drawn(use, total=4)
  assert text.startswith("Reading ") and "3/4" in text


def test_the_total_may_come_later():
  def use(bar):
    bar.start(8)
    bar.advance(2, "counting")

  text = drawn(use)
  assert text.startswith("counting ") and "2/8" in text


def test_what_is_done_can_be_told_in_all():
  def use(bar):
    bar.advance(3)
    bar.reach(7, "Read")

  text = drawn(use, total=7)
  assert text.startswith("Read ") and "7/7" in text


def test_large_totals_are_shown_as_a_share():
  text = drawn(lambda bar: bar.advance(10**9), total=4 * 10**9, counted=False)
  assert "25%" in text and "000" not in text


@pytest.mark.parametrize("name", ["[red]train[/nope]", "a [/b]"])
def test_descriptions_are_no_markup(name):
  assert name in drawn(lambda bar: bar.advance(1, name), total=1)


def test_nothing_is_drawn_unless_wanted():
  assert drawn(lambda bar: bar.advance(), total=1, shown=False) == ""
