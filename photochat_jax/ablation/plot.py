"""The arms as pictures, a panel for each figure."""

import io
import math
from collections.abc import Mapping
from typing import Any

from photochat_jax.ablation import table
from photochat_jax.metrics.statistics import estimate

_COLUMNS = 4


def draw(
  results: Mapping[tuple[str, int], Mapping[str, Any]],
  arms: Mapping[str, str],
) -> bytes:
  """A PNG of the arms, a dot for each seed.

  Args:
    results: (arm, seed) -> what its `metrics.json` holds.
    arms: name -> what it is, the first at the top.
  """
  names = list(arms)
  figure, panels = _panels([results], arms, 0.9 + 0.28 * len(names))
  for name, panel in panels.items():
    panel.sharey(next(iter(panels.values())))
    for place, arm in enumerate(names):
      found = list(table.values(results, arm, name).values())
      mean, half, count = estimate(found)
      panel.plot(found, [place] * count, "o", color="0.7", ms=4, zorder=1)
      if count:
        panel.errorbar(
          mean, place, xerr=half if count > 1 else None, fmt="s", ms=5,
          color="C0", capsize=3, zorder=2,
        )  # fmt: skip
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.grid(axis="x", color="0.9")
  return _png(
    figure,
    "Means over seeds and 95 % intervals; dots are seeds, arrows point to "
    "better",
  )


def draw_sweep(
  found: Mapping[str, Mapping[tuple[str, int], Mapping[str, Any]]],
  arms: Mapping[str, str],
  field: str,
) -> bytes:
  """A PNG of how the arms' figures go with a setting.

  Args:
    found: the setting's value, a number -> (arm, seed) -> what its
      `metrics.json` holds.
    arms: name -> what it is.
    field: the setting.
  """
  figure, panels = _panels(list(found.values()), arms, 2.6)
  for name, panel in panels.items():
    for number, arm in enumerate(arms):
      points = [
        (float(value), estimate(list(known.values())))
        for value, results in found.items()
        if (known := table.values(results, arm, name))
      ]
      panel.errorbar(
        [x for x, _ in points],
        [e.mean for _, e in points],
        yerr=[0 if math.isnan(e.half) else e.half for _, e in points],
        fmt="o-", ms=4, capsize=3, color=f"C{number}", label=arm,
      )  # fmt: skip
    panel.set_xlabel(field, fontsize=9)
    panel.grid(color="0.9")
  handles, labels = next(iter(panels.values())).get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside right upper")
  return _png(
    figure, "Means over seeds and 95 % intervals; arrows point to better"
  )


def _panels(results, arms, height):
  """A figure, and its panels by the names of what any arm has."""
  import matplotlib

  matplotlib.use("Agg")  # No window.
  from matplotlib import pyplot

  names = [
    name
    for name in table.FIGURES
    if any(table.values(r, arm, name) for r in results for arm in arms)
  ]
  columns = min(_COLUMNS, len(names))
  rows = -(-len(names) // columns)
  figure, axes = pyplot.subplots(
    rows,
    columns,
    figsize=(3 * columns + 1, rows * height),
    squeeze=False,
    layout="constrained",
  )
  for panel in axes.flat[len(names) :]:
    panel.set_visible(False)
  panels = dict(zip(names, axes.flat, strict=False))
  for name, panel in panels.items():
    head, more = table.FIGURES[name]
    panel.set_title(f"{head} {'→' if more else '←'}", fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
  return figure, panels


def _png(figure, title) -> bytes:
  from matplotlib import pyplot

  figure.suptitle(title, fontsize=10)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=130)
  pyplot.close(figure)
  return buffer.getvalue()
