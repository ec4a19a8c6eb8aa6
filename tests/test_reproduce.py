"""Comparing a result with its repetition."""

from photochat_jax import reproduce

THEN = {
  "perplexity": 2.5,
  "fid": None,
  "attribute_accuracy": {"told": 0.5},
  "thresholds": [{"threshold": 0.9, "f1": 0.5}],
  "counts": {"photos": 3},
  "seconds": 10,
  "reasons": {"fid": "no file"},
  "git_commit": "abc",
  "versions": {"jax": "1"},
  "weights": "w",
}


def names(found):
  return [one.name for one in found]


def test_time_and_circumstances_are_no_figures():
  now = THEN | {"seconds": 99, "git_commit": "def", "versions": {"jax": "2"}}
  assert reproduce.figures(THEN, now, 0.0) == []
  assert names(reproduce.making(THEN, now)) == ["git_commit", "versions.jax"]
  assert reproduce.making(THEN, THEN) == []


def test_what_differs_is_named():
  now = THEN | {
    "perplexity": 2.5 + 1e-7,
    "attribute_accuracy": {"told": 0.51},
    "thresholds": [{"threshold": 0.9, "f1": 0.5}, {"threshold": 0.1, "f1": 0}],
    "counts": {"photos": 4},
    "fid": 3.0,
  }
  assert names(reproduce.figures(THEN, now, 1e-6)) == [
    "fid",
    "attribute_accuracy.told",
    "counts.photos",
    "thresholds.1.threshold",
    "thresholds.1.f1",
  ]
  assert names(reproduce.figures(THEN, now, 1e-9))[0] == "perplexity"
