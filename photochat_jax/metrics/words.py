"""Words against words: BLEU, ROUGE-L, Distinct; all in percent.

BLEU and ROUGE are those of sacrebleu and rouge-score (`pip install -e
".[eval]"`), which are imported when a figure is asked for.
"""

import collections
import importlib
from collections.abc import Sequence
from typing import Any

ORDERS = (1, 2)


class NotInstalled(ValueError):
  """A library of the extra `eval` is missing."""


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> dict:
  """Corpus BLEU, of which two definitions are about that must not be mixed.

  Args:
    hypotheses: texts written.
    references: one for each.

  Returns:
    `bleu_1`, `bleu_2`: sacreBLEU's, up to that order, tokenised as `13a`;
    `released_bleu_1`, `released_bleu_2`: as the paper's released code has it,
    the brevity penalty times the precision of that order alone; and sacreBLEU's
    `bleu_signature`.

  Raises:
    NotInstalled: sacrebleu is not there.
  """
  metrics = _library("sacrebleu").metrics
  found = {}
  for order in ORDERS:
    metric = metrics.BLEU(max_ngram_order=order)
    score = metric.corpus_score(list(hypotheses), [list(references)])
    found[f"bleu_{order}"] = score.score
    plain = metrics.BLEU(max_ngram_order=order, smooth_method="none")
    alone = plain.corpus_score(list(hypotheses), [list(references)])
    found[f"released_bleu_{order}"] = alone.bp * alone.precisions[order - 1]
    found["bleu_signature"] = str(metric.get_signature())
  return found


def rouge_l(hypotheses: Sequence[str], references: Sequence[str]) -> float:
  """The mean F1 of the longest common subsequence, no stemming.

  Args:
    hypotheses: texts written.
    references: one for each.

  Raises:
    NotInstalled: rouge-score is not there.
  """
  scorer = _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
  scores = [
    scorer.score(reference, hypothesis)["rougeL"].fmeasure
    for hypothesis, reference in zip(hypotheses, references, strict=True)
  ]
  return 100 * sum(scores) / len(scores)


def distinct(texts: Sequence[str], order: int) -> float | None:
  """Distinct n-grams among all n-grams of all texts (Li et al. 2016).

  The paper divides by tokens; this, as most code does, by n-grams.

  Args:
    texts: texts written.
    order: n.

  Returns:
    The share, None where no text is `order` words long. Words are what spaces
    divide, in lower case.
  """
  grams: collections.Counter = collections.Counter()
  for text in texts:
    words = text.lower().split()
    grams.update(zip(*(words[i:] for i in range(order)), strict=False))
  return 100 * len(grams) / grams.total() if grams else None


def _library(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise NotInstalled(
      f'needs {name.partition(".")[0]}: pip install -e ".[eval]"'
    ) from error
