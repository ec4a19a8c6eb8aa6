"""Perplexity, added up over batches."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class TokenLoss:
  """A sum of negative log-likelihoods and how many tokens it is over.

  Sums, not means, are kept: a mean of batch means weighs a token by the batch
  it happened to fall into.

  Attributes:
    nats: the summed negative log-likelihood, in nats.
    tokens: the number of tokens in that sum.
  """

  nats: float = 0.0
  tokens: int = 0

  def __add__(self, other: "TokenLoss") -> "TokenLoss":
    return TokenLoss(self.nats + other.nats, self.tokens + other.tokens)

  @property
  def perplexity(self) -> float | None:
    """exp of the mean loss; None over no token; inf where exp overflows."""
    if not self.tokens:
      return None
    try:
      return math.exp(self.nats / self.tokens)
    except OverflowError:
      return math.inf


def chance_perplexity(vocab_size: int) -> float:
  """The perplexity of a guesser to whom all `vocab_size` tokens are alike."""
  return float(vocab_size)
