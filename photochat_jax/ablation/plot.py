"""The arms as a picture: a panel for each figure, a dot for each seed."""

import io
from collections.abc import Mapping
from typing import Any

from photochat_jax.ablation import table
from photochat_jax.metrics.statistics import estimate

_COLUMNS = 4


def draw(
  results: Mapping[tuple[str, int], Mapping[str, Any]],
  arms: Mapping[str, str],
) -> bytes:
  """A PNG.

  Args:
    results: (arm, seed) -> what its `metrics.json` holds.
    arms: name -> what it is, the first at the top.
  """
  import matplotlib

  matplotlib.use("Agg")  # No window.
  from matplotlib import pyplot

  figures = {
    name: head
    for name, head in table.FIGURES.items()
    if any(table.values(results, arm, name) for arm in arms)
  }
  names = list(arms)
  columns = min(_COLUMNS, len(figures))
  rows = -(-len(figures) // columns)
  height = 0.9 + 0.28 * len(names)
  figure, axes = pyplot.subplots(
    rows,
    columns,
    figsize=(3 * columns + 1, rows * height),
    squeeze=False,
    sharey=True,
    layout="constrained",
  )
  for panel in axes.flat[len(figures) :]:
    panel.set_visible(False)
  for panel, (name, (head, more)) in zip(
    axes.flat, figures.items(), strict=False
  ):
    for place, arm in enumerate(names):
      found = list(table.values(results, arm, name).values())
      mean, half, count = estimate(found)
      panel.plot(found, [place] * count, "o", color="0.7", ms=4, zorder=1)
      if count:
        panel.errorbar(
          mean, place, xerr=half if count > 1 else None, fmt="s", ms=5,
          color="C0", capsize=3, zorder=2,
        )  # fmt: skip
    panel.set_title(f"{head} {'→' if more else '←'}", fontsize=10)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.grid(axis="x", color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
  figure.suptitle(
    "Means over seeds and 95 % intervals; dots are seeds, arrows point to "
    "better",
    fontsize=10,
  )
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=130)
  pyplot.close(figure)
  return buffer.getvalue()
