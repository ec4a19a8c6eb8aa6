"""Scores of what a model said and drew, turn by turn: words, intent, photos.

Each function adds its figures, absent ones with their reason. Turns are
`said.ModelTurn`s.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from photochat_jax import judges
from photochat_jax.data import images, schema, synthetic
from photochat_jax.metrics import image as image_metrics
from photochat_jax.metrics import inception, intent, similarity, words
from photochat_jax.metrics.figures import Figures

_BLEU = ("bleu_1", "bleu_2", "released_bleu_1", "released_bleu_2")
_CLIP = ("clip_score", "clip_photo_similarity", "mm_relevance")
_UNDRAWN = "no photo was drawn where the data share one"


def add_intent(
  figures: Figures, turns: Sequence[Any]
) -> tuple[intent.IntentCounts, list[tuple[float, intent.IntentCounts]]]:
  """Whether a photo is shared at each turn, and at which threshold it were.

  Returns:
    The counts of what the model did, and the sweep over thresholds.
  """
  table = intent.IntentCounts.of(
    (turn.gold is not None, turn.reply.caption is not None) for turn in turns
  )
  for name in ("precision", "recall", "f1"):
    value = getattr(table, name)
    figures.add(f"photo_{name}", value, table.total, table.chance)
  swept = intent.sweep(
    (turn.gold is not None, turn.reply.photo_score) for turn in turns
  )
  figures.add(
    "photo_average_precision",
    intent.average_precision(swept),
    table.total,
    table.chance,
    "the data share no photo",
  )
  return table, swept


def add_words(figures: Figures, turns: Sequence[Any]) -> None:
  """BLEU, ROUGE-L and Distinct of replies, and of captions."""
  _add_compared(figures, "", said(turns))
  _add_compared(figures, "caption_", captions(turns))
  for order in words.ORDERS:
    figures.add(
      f"distinct_{order}",
      words.distinct([turn.reply.text for turn in turns], order),
      len(turns),
      reason=f"no reply has {order} words",
    )


def add_clip(
  figures: Figures, turns: Sequence[Any], judge: judges.CLIPJudge | None
) -> None:
  """What CLIP says of the photos drawn, and of whole turns."""
  both = [turn for turn in turns if _both(turn)]
  if judge is None or not both:
    reason = judges.NEEDS_CLIP if judge is None else _UNDRAWN
    for name in _CLIP:
      figures.add(name, None, 0, reason=reason)
    return
  drawn = judge.see([turn.drawn for turn in both])
  captions = judge.read([turn.reply.caption for turn in both])
  gold = judge.see([_gold(turn, judge.size) for turn in both])
  figures.add("clip_score", similarity.clip_score(drawn, captions), len(both))
  figures.add(
    "clip_photo_similarity", similarity.photo_similarity(drawn, gold), len(both)
  )
  pairs = _relevance_pairs(turns, judge)
  figures.add("mm_relevance", similarity.mean_relevance(pairs), len(pairs))


def add_inception(
  figures: Figures, turns: Sequence[Any], judge: judges.InceptionJudge | None
) -> None:
  """FID against the data's photos of the same turns; the Inception Score."""
  both = [turn for turn in turns if _both(turn)]
  names = ("fid", "inception_score")
  if judge is None:
    for name in names:
      figures.add(name, None, 0, reason=judges.NEEDS_INCEPTION)
    return
  if len(both) < 2:
    for name in names:
      figures.add(name, None, len(both), reason="needs two photos or more")
    return
  features, logits = judge.look([turn.drawn for turn in both])
  wanted, _ = judge.look([_gold(turn, len(turn.drawn)) for turn in both])
  figures.add("fid", inception.frechet(features, wanted), len(both))
  # Ten parts, as usual, where each has ten photos.
  splits = 10 if len(both) >= 100 else 1
  score, _ = inception.inception_score(logits, splits)
  figures.add("inception_score", score, len(both))


def add_synthetic(
  figures: Figures, turns: Sequence[Any], answers: Sequence[Any]
) -> None:
  """What only the synthetic data can tell."""
  attributes, kinds = synthetic.ATTRIBUTES, synthetic.KIND
  figures.add(
    "pixel_accuracy",
    _mean(a.right for a in answers) if answers else None,
    len(answers),
    _mean(1 / len(attributes[a.attribute]) for a in answers)
    if answers
    else None,
    "the data have no questions about photos",
  )
  compared = [
    image_metrics.Drawn(turn.scene, turn.seen) for turn in turns if turn.scene
  ]
  figures.add(
    "attribute_accuracy",
    image_metrics.attribute_accuracy(compared, kinds) if compared else None,
    len(compared),
    image_metrics.attribute_chance(attributes, kinds),
    "the data do not say what photos show",
  )


def _add_compared(
  figures: Figures, prefix: str, pairs: Sequence[tuple[str, str]]
) -> None:
  """BLEU and ROUGE-L of (written, wanted) pairs."""
  written, wanted = zip(*pairs, strict=True) if pairs else ((), ())
  found, reason = {}, "the data have none"
  if pairs:
    try:
      found = words.bleu(written, wanted)
      found["rouge_l"] = words.rouge_l(written, wanted)
    except words.NotInstalled as error:
      reason = f"not computed: {error}"
  for name in (*_BLEU, "rouge_l"):
    figures.add(prefix + name, found.get(name), len(pairs), reason=reason)


def said(turns: Sequence[Any]) -> list[tuple[str, str]]:
  """(the reply's words, the data's), both up to the first photo."""
  pairs = []
  for turn in turns:
    before = itertools.takewhile(
      lambda part: isinstance(part, str), turn.spoken.parts
    )
    if gold := " ".join(before):
      pairs.append((turn.reply.text, gold))
  return pairs


def captions(turns: Sequence[Any]) -> list[tuple[str, str]]:
  """(the caption written, the data's) where the data have one."""
  return [
    (turn.reply.caption or "", turn.gold.caption)
    for turn in turns
    if turn.gold and turn.gold.caption
  ]


def _both(turn: Any) -> bool:
  """Whether there is a photo drawn and one in the data."""
  return bool(turn.gold and turn.gold.path and turn.drawn is not None)


def _gold(turn: Any, size: int) -> np.ndarray:
  return images.load_photo(turn.gold.path, size)


def _relevance_pairs(
  turns: Sequence[Any], judge: judges.CLIPJudge
) -> list[tuple[np.ndarray, np.ndarray]]:
  """(response, reference) as vectors of their texts and photos in order.

  Turns with a photo whose file is missing, or with one that was shared but not
  drawn, are left out. The response ends with its photo, so the reference does.
  """
  elements, ends = [], []
  for turn in turns:
    gold = _up_to_photo(turn.spoken.parts)
    given = [turn.reply.text] if turn.reply.text else []
    if turn.reply.caption is not None:
      given.append(turn.drawn)
    photos = [part for part in gold if isinstance(part, schema.Photo)]
    if not gold or any(part is None for part in given):
      continue
    if any(photo.path is None for photo in photos):
      continue
    gold = [
      images.load_photo(part.path, judge.size)
      if isinstance(part, schema.Photo)
      else part
      for part in gold
    ]
    ends.append((len(given), len(gold)))
    elements += given + gold
  texts = [i for i, one in enumerate(elements) if isinstance(one, str)]
  photos = [i for i, one in enumerate(elements) if not isinstance(one, str)]
  vectors = {}
  for indices, look in ((texts, judge.read), (photos, judge.see)):
    if indices:
      found = look([elements[i] for i in indices])
      vectors |= dict(zip(indices, found, strict=True))
  pairs, start, width = [], 0, len(next(iter(vectors.values())))
  for given, gold in ends:
    middle, end = start + given, start + given + gold
    response = np.array([vectors[i] for i in range(start, middle)])
    reference = np.array([vectors[i] for i in range(middle, end)])
    pairs.append((response.reshape(-1, width), reference))
    start = end
  return pairs


def _up_to_photo(parts: Sequence[Any]) -> list[Any]:
  """Texts and the first photo; consecutive texts are one."""
  found: list[Any] = []
  for part in parts:
    if isinstance(part, schema.Photo):
      return [*found, part]
    found = [" ".join([*found, part])]
  return found


def _mean(values) -> float:
  values = list(values)
  return sum(values) / len(values)
