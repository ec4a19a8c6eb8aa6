r"""Lays runs side by side on one page: figures, and dialogue by dialogue.

  python tools/compare_runs.py --out=runs/compared.html \
    --run=aligned=runs/seed1 --run=none=runs/seed1-none

Each run has been evaluated (`--mode=evaluate`), all on the same dialogues. The
page is one file that needs no network; its dialogues are sorted by any score,
of one run, of all, or by how much they disagree.
"""

import sys

from absl import app, flags, logging
from etils import epath

from photochat_jax import compare

_RUN = flags.DEFINE_multi_string("run", [], "NAME=WORKDIR, for each run.")
_OUT = flags.DEFINE_string("out", "compared.html", "The page.")
_FOLDER = flags.DEFINE_string("folder", "eval", "Of each run, to read.")
_DIALOGUES = flags.DEFINE_integer(
  "dialogues", compare.MAX_DIALOGUES, "Most on the page.", lower_bound=1
)


def main(argv: list[str]) -> None:
  """Reads, writes, or says in one sentence why not."""
  logging.set_verbosity(logging.WARNING)  # Libraries tell much.
  try:
    if len(argv) > 1 or not _RUN.value:
      raise ValueError("Give --run=NAME=WORKDIR once for each run.")
    workdirs = {}
    for given in _RUN.value:
      name, is_there, workdir = given.partition("=")
      if not (name and is_there and workdir) or name in workdirs:
        raise ValueError(
          f"--run={given} must be NAME=WORKDIR, with a name of its own."
        )
      workdirs[name] = workdir
    dialogues, runs = compare.read(workdirs, _FOLDER.value)
    page = compare.page(
      "Photo-sharing dialogue: runs side by side",
      [compare.figures_table(runs)],
      dialogues,
      runs,
      _DIALOGUES.value,
    )
    out = epath.Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
  except (ValueError, OSError) as error:
    sys.stderr.write(f"compare_runs: {error}\n")
    sys.exit(2)
  print(f"Page: {out}")


if __name__ == "__main__":
  app.run(main)
