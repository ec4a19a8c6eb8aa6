"""Perplexity by hand."""

import math

import pytest

from photochat_jax.metrics import text


def test_perplexity_is_over_tokens_not_over_batches():
  # One token at probability 1/2, three at 1/8: log2 of the perplexity is
  # (1 + 3 * 3) / 4 = 2.5. The mean of the two batches' losses would say 2.
  one = text.TokenLoss(math.log(2), 1)
  three = text.TokenLoss(3 * math.log(8), 3)
  assert (one + three).tokens == 4
  assert (one + three).perplexity == pytest.approx(2**2.5)
  assert (three + one).perplexity == (one + three).perplexity


def test_uniform_guessing_has_the_perplexity_of_chance():
  loss = text.TokenLoss(7 * math.log(640), 7)
  assert loss.perplexity == pytest.approx(text.chance_perplexity(640))


def test_no_token_has_no_perplexity():
  assert text.TokenLoss().perplexity is None


def test_a_hopeless_loss_is_infinite_not_a_crash():
  assert text.TokenLoss(1e6, 1).perplexity == math.inf
