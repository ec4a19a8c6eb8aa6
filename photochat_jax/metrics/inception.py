"""FID and Inception Score, from what Inception says of photos; float64.

Both depend on how many photos they are of: print the count beside them.
"""

import numpy as np


def frechet(features: np.ndarray, reference: np.ndarray) -> float:
  """The Fréchet distance of two sets, each taken for a Gaussian.

  |m - r|^2 + tr(C + R - 2 (C R)^(1/2)) (Heusel et al. 2017), with the root's
  trace from symmetric matrices alone: it is that of (C^(1/2) R C^(1/2))^(1/2).

  Args:
    features: [N, D] of the photos drawn.
    reference: [M, D] of the photos in the data.

  Raises:
    ValueError: one of the sets is smaller than two.
  """
  if min(len(features), len(reference)) < 2:
    raise ValueError("FID needs at least two photos on both sides.")
  (mean, cov), (wanted, spread) = map(_moments, (features, reference))
  root = _root(cov)
  product = np.linalg.eigvalsh(root @ spread @ root)
  trace = np.trace(cov) + np.trace(spread)
  trace -= 2 * np.sqrt(np.clip(product, 0, None)).sum()
  return float(np.sum((mean - wanted) ** 2) + trace)


def inception_score(
  logits: np.ndarray, splits: int = 10
) -> tuple[float, float]:
  """How sure and how varied the classes are (Salimans et al. 2016).

  Args:
    logits: [N, K].
    splits: parts whose scores are averaged.

  Returns:
    The mean over the parts, and their standard deviation.

  Raises:
    ValueError: there are fewer photos than parts.
  """
  if len(logits) < splits:
    raise ValueError(
      f"The Inception Score of {splits} parts needs as many photos, not "
      f"{len(logits)}."
    )
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  scores = []
  for part in np.array_split(log_p, splits):
    p = np.exp(part)
    # 0 log 0 is 0: classes that no photo of the part can be.
    whole = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))
    scores.append(np.exp(np.mean(np.sum(p * (part - whole), axis=-1))))
  return float(np.mean(scores)), float(np.std(scores))


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  x = np.asarray(x, np.float64)
  return x.mean(0), np.cov(x, rowvar=False)


def _root(matrix: np.ndarray) -> np.ndarray:
  values, vectors = np.linalg.eigh(matrix)
  return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
