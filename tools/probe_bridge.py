r"""How the photo's loss reaches the words of a caption, for each bridge.

  python tools/probe_bridge.py --workdir=runs/tiny --out=runs/tiny/probe

Takes a trained run and dialogues of its test split. For each word of a caption
and each likely other word it measures what the swap really does to the photo's
loss, and holds the gradient of every matrix and estimator against that
(`photochat_jax/probe.py`). Prints a table with 95 % intervals over captions and
writes it, with a heat map over the words of a few captions: OUT/probe.md,
OUT/probe.json, OUT/heat.png.
"""

import json
import sys
import time

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath

from photochat_jax import inputs, probe, record
from photochat_jax.data import pipeline, vocabulary
from photochat_jax.metrics.statistics import estimate
from photochat_jax.models.photochat import PhotoChat

_WORKDIR = flags.DEFINE_string("workdir", None, "A trained run.")
_OUT = flags.DEFINE_string("out", None, "Folder of the results.")
_DIALOGUES = flags.DEFINE_integer("dialogues", 64, "How many to look at.")
_CANDIDATES = flags.DEFINE_integer("candidates", 16, "Words at a position.")
_DRAWS = flags.DEFINE_integer("draws", 16, "Draws of noise and time.")
_ROUNDS = flags.DEFINE_integer("rounds", 16, "Draws of RLOO's samples.")

_COLUMNS = {
  "top_1": "best word named",
  "rank": "rank correlation",
  "sign": "sign right",
  "cosine": "cosine",
  "norm": "norm per token",
  "directions": "directions",
}
_SHOWN = 6  # Captions in the heat map.


def main(argv: list[str]) -> None:
  """Probes and writes."""
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax tells much.
  if not _WORKDIR.value or not _OUT.value:
    raise ValueError("Give --workdir=DIR, a trained run, and --out=DIR.")
  run, started = record.read(_WORKDIR.value), time.monotonic()
  llm, clip = inputs.load_tokenizers(run)
  state = inputs.read_weights(run, _WORKDIR.value, PhotoChat(run.model))
  dialogues, _ = inputs.read_split(run, _WORKDIR.value, run.eval.split)
  dialogues = dialogues[: _DIALOGUES.value]
  spec = inputs.data_spec(run, 16, augment=False, drop_remainder=False)
  data = pipeline.Pipeline(dialogues, "dialogues", spec, llm, clip)
  table, _ = vocabulary.build_vocabulary_map(llm, clip)
  retokenise = vocabulary.Retokeniser(llm, clip, run.bridge.max_tokens)
  writable = np.zeros(run.model.language.padded_vocab_size, bool)
  writable[: llm.vocab_size] = [
    bool(llm.token_bytes(i)) for i in range(llm.vocab_size)
  ]

  found: dict[str, list[probe.Scores]] = {}
  first = None
  # Each dialogue has two sides, of which the sharer's bears captions.
  batches = -(-int(data.describe()["examples"]) // spec.batch_size)
  for number, batch in enumerate(data.batches(0, batches)):
    world = probe.look(
      run,
      {**state.params, **state.ema},
      state.latent_scale,
      batch,
      table,
      _DRAWS.value,
    )
    if not len(world.keys):
      continue
    positions = probe.oracle(world, retokenise, _CANDIDATES.value, writable)
    gradients = {
      name: probe.gradient(world, matrix, estimator)
      for name, matrix, estimator in probe.METHODS
    }
    gradients["rloo, one draw"] = probe.sampled(world, retokenise, 4, 1)
    gradients[f"rloo, {_ROUNDS.value} draws"] = probe.sampled(
      world, retokenise, 4, _ROUNDS.value
    )
    for name, one in gradients.items():
      found.setdefault(name, []).extend(probe.score(world, positions, one))
    first = first or (world, positions, gradients)
    left = (time.monotonic() - started) / (number + 1) * (batches - number - 1)
    print(f"{number + 1}/{batches} batches, {left / 60:.1f} minutes left")
    jax.clear_caches()
  if first is None:
    raise ValueError("None of these dialogues has a caption with its photo.")
  _write(found, first, llm)


def _write(found, first, llm) -> None:
  out = epath.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  estimates = {
    name: {
      column: estimate([getattr(one, column) for one in scores])
      for column in _COLUMNS
    }
    for name, scores in found.items()
  }
  count = len(next(iter(found.values())))
  chance = 1 / _CANDIDATES.value
  lines = [
    f"{count} captions, {_CANDIDATES.value} candidates at a position (chance "
    f"of the best word: {chance:.3f}), {_DRAWS.value} draws of noise and time.",
    "",
    f"| gradient | {' | '.join(_COLUMNS.values())} |",
    f"|---|{'---:|' * len(_COLUMNS)}",
  ]
  for name, columns in estimates.items():
    cells = [
      f"{e.mean:.2e}" if column == "norm" else str(e)
      for column, e in columns.items()
    ]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  text = "\n".join(lines) + "\n"
  print(text)
  (out / "probe.md").write_text(text)
  (out / "probe.json").write_text(
    json.dumps(
      {
        "workdir": _WORKDIR.value,
        "captions": count,
        "candidates": _CANDIDATES.value,
        "draws": _DRAWS.value,
        "rounds": _ROUNDS.value,
        "versions": record.versions(),
        "git_commit": record.commit(),
        "scores": {
          name: {k: e._asdict() for k, e in columns.items()}
          for name, columns in estimates.items()
        },
      },
      indent=2,
    )
  )
  _draw(first, llm, out / "heat.png")


def _draw(first, llm, path: epath.Path) -> None:
  """How much each word of some captions matters, and is told so."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  world, positions, gradients = first
  names = ["oracle", *gradients]
  shown = sorted({at.photo for at in positions})[:_SHOWN]
  figure, axes = pyplot.subplots(
    len(shown), 1, figsize=(11, 2.6 * len(shown)), squeeze=False
  )
  for photo, axis in zip(shown, axes[:, 0], strict=True):
    here = [at for at in positions if at.photo == photo]
    rows = [[float(np.abs(at.costs).max()) for at in here]]
    for one in gradients.values():
      rows.append([float(np.linalg.norm(one[photo, at.place])) for at in here])
    heat = np.array([np.divide(row, max(row) or 1.0) for row in rows])
    axis.imshow(heat, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    words = [llm.decode([int(at.candidates[0])]) for at in here]
    axis.set_xticks(range(len(words)), words, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=7)
  figure.suptitle("Which words the photo's loss speaks to (each row by itself)")
  figure.tight_layout()
  figure.savefig(path, dpi=110)


def _run(argv: list[str]) -> None:
  try:
    main(argv)
  except ValueError as error:
    sys.stderr.write(f"probe_bridge: {error}\n")
    sys.exit(2)


if __name__ == "__main__":
  app.run(_run)
