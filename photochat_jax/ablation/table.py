"""What came out: means over seeds, 95 % intervals, and differences."""

from collections.abc import Mapping, Sequence
from typing import Any

from photochat_jax.metrics.comparison import Table
from photochat_jax.metrics.statistics import Estimate, estimate

# Figures of `metrics.json` in the table, dotted where one is inside another,
# and whether more is better.
FIGURES = {
  "attribute_accuracy.told": ("told", True),
  "attribute_accuracy.captioned": ("captioned", True),
  "pixel_accuracy": ("pixel questions", True),
  "photo_f1": ("photo F1", True),
  "photo_average_precision": ("photo AP", True),
  "caption_bleu_2": ("caption BLEU-2", True),
  "bleu_2": ("BLEU-2", True),
  "perplexity": ("perplexity", False),
}


def figure(metrics: Mapping[str, Any], name: str) -> float | None:
  """A figure of `metrics.json`, None where it is not there."""
  value: Any = metrics
  for part in name.split("."):
    value = value.get(part) if isinstance(value, Mapping) else None
  return value


def values(
  results: Mapping[tuple[str, int], Mapping[str, Any]], arm: str, name: str
) -> dict[int, float]:
  """A figure of an arm by seed.

  Args:
    results: (arm, seed) -> what its `metrics.json` holds.
    arm: its name.
    name: of `FIGURES`.
  """
  found = {}
  for (other, seed), metrics in sorted(results.items()):
    value = figure(metrics, name) if other == arm else None
    if value is not None:
      found[seed] = value
  return found


def difference(
  results: Mapping[tuple[str, int], Mapping[str, Any]],
  arm: str,
  other: str,
  name: str,
) -> Estimate:
  """An arm less another, seed by seed: they share all but the joint stage."""
  one, two = values(results, arm, name), values(results, other, name)
  return estimate([one[seed] - two[seed] for seed in one if seed in two])


def tables(
  results: Mapping[tuple[str, int], Mapping[str, Any]],
  arms: Mapping[str, str],
  baseline: str = "none",
) -> list[Table]:
  """The arms' figures, and the differences to a baseline.

  Args:
    results: (arm, seed) -> what its `metrics.json` holds.
    arms: name -> what it is, in the table's order.
    baseline: the arm that the others are compared with.
  """
  heads = [head for head, _ in FIGURES.values()]
  rows = []
  for name, what in arms.items():
    row = [estimate(list(values(results, name, f).values())) for f in FIGURES]
    count = max((e.count for e in row), default=0)
    rows.append([f"{name}: {what}", str(count), *map(str, row)])
  apart = [
    [
      name,
      *(_marked(difference(results, name, baseline, f)) for f in FIGURES),
    ]
    for name in arms
    if name != baseline
  ]
  return [
    Table(
      ["arm", "seeds", *heads], rows, "Means over seeds, 95 % intervals."
    ),
    Table(
      ["arm", *heads],
      apart,
      f"Less {baseline}, seed by seed (95 % intervals; * where it does not "
      "hold 0).",
    ),
  ]


def sweep(
  found: Mapping[str, Mapping[tuple[str, int], Mapping[str, Any]]],
  arms: Mapping[str, str],
  field: str,
) -> list[Table]:
  """A table for each figure, what a setting was set to in columns.

  Args:
    found: the setting's value -> (arm, seed) -> what its `metrics.json` holds.
    arms: name -> what it is, in the tables' order.
    field: the setting.
  """
  return [
    Table(
      ["arm", *found],
      [
        [
          arm,
          *(
            str(estimate(list(values(results, arm, name).values())))
            for results in found.values()
          ),
        ]
        for arm in arms
      ],
      f"{head}, by {field}.",
    )
    for name, (head, _) in FIGURES.items()
  ]


def markdown(found: Sequence[Table]) -> str:
  """Tables as Markdown."""
  lines = []
  for table in found:
    right = ["---:"] * (len(table.heads) - 1)
    lines += [table.note, "", _line(*table.heads), _line("---", *right)]
    lines += [_line(*row) for row in table.rows] + [""]
  return "\n".join(lines)


def _marked(found: Estimate) -> str:
  sure = abs(found.mean) > found.half
  return f"{found}{' *' if sure else ''}"


def _line(*cells: str) -> str:
  return f"| {' | '.join(cells)} |"
