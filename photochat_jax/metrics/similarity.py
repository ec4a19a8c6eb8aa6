"""Scores from CLIP's embeddings, all of length 1; in percent."""

from collections.abc import Sequence

import numpy as np


def clip_score(photos: np.ndarray, texts: np.ndarray) -> float:
  """CLIPScore (Hessel et al. 2021) without its factor 2.5.

  Args:
    photos: [N, P].
    texts: [N, P], what each should show.

  Returns:
    The mean cosine, negative ones taken for 0.
  """
  return 100 * float(np.mean(np.clip(np.sum(photos * texts, -1), 0, None)))


def photo_similarity(photos: np.ndarray, reference: np.ndarray) -> float:
  """The mean cosine of photos [N, P] and those they stand for [N, P]."""
  return 100 * float(np.mean(np.sum(photos * reference, -1)))


def relevance(response: np.ndarray, reference: np.ndarray) -> float:
  """MM-Relevance's soft F1 of one response (Feng et al. 2023, MMDialog).

  A response is a sequence of texts and photos. The i-th of one is compared
  with the i-th of the other, whatever kind they are; what the longer one has
  more counts against it. The products are those of the authors'
  `compute_mmrel.py`, times CLIP's scale, 100; what becomes of them is written
  from the paper's description, which that file leaves out.

  Args:
    response: [j, P], what the model gave.
    reference: [l, P], what the data have; at least one.

  Returns:
    2 p r / (p + r) with p the sum of cosines over j and r that over l; 0 where
    nothing was given or the sum is not positive.
  """
  shared = min(len(response), len(reference))
  total = float(np.sum(response[:shared] * reference[:shared]))
  # 2 (s / j) (s / l) / (s / j + s / l) is 2 s / (j + l).
  return 100 * max(0.0, 2 * total / (len(response) + len(reference)))


def mean_relevance(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
  """The mean of `relevance` over (response, reference) pairs."""
  return float(np.mean([relevance(*pair) for pair in pairs]))
