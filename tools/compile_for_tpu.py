r"""Whether a training step fits TPUs that are not there, and what it does.

  python tools/compile_for_tpu.py --config=configs/photochat.py \
    --topology=v5p:4x4x2

Compiles the whole step of a stage with the TPUs' own compiler; it needs
neither a TPU nor weights, data or tokenizers, but pip install -e ".[tpu]".
Prints the memory of a chip by kind, what the chips send each other, the
largest buffers with the lines that made them, and the step's FLOPs; the last
line says whether it fits. At the paper's sizes it takes 15 to 20 minutes on two
cores, and up to 22 GB of memory.

Topologies are named as the compiler does (v5p:4x4x2, v5e:16x16) or as they are
ordered (v5p-64, v5e-256, v6e-64, v4-128). Fields of the config are changed as
for training, --config.mesh.tensor=2.

Exit status: 0 it fits, 1 it does not, 2 something is wrong with the question.
"""

import json
import re
import sys
from typing import NoReturn

import jax
import rich.console
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from photochat_jax import config as config_lib
from photochat_jax.compiled import report, step, tables, topology

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/, with ':argument' where it takes one."
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5p:4x4x2.")
_STAGE = flags.DEFINE_string("stage", None, "Of the config; else its last.")
_BATCH = flags.DEFINE_integer(
  "batch", None, "Rows of the global batch; else the stage's.", lower_bound=1
)
_ACCUMULATE = flags.DEFINE_integer(
  "accumulate", None, "Parts of a batch; else the stage's.", lower_bound=1
)
_OUT = flags.DEFINE_string("out", None, "A JSON file for all of it.")
_TEXT = flags.DEFINE_string("text", None, "A file for the compiled program.")
_OVERRIDE = re.compile(r"--?(?:no)?config\.([\w.]+)")


def _stop(error: object) -> NoReturn:
  sys.stderr.write(f"compile_for_tpu: {' '.join(str(error).split())}\n")
  sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; what is wrong with them is one sentence."""
  try:
    rest = flags.FLAGS(argv)
    if _CONFIG.value is not None:
      _CONFIG.value.to_dict()  # A file that failed to load raises here.
  except (flags.Error, OSError) as error:
    _stop(str(error).strip().splitlines()[-1])
  except (AttributeError, KeyError, TypeError):
    # The library's message holds the whole config: say which field it is.
    for match in filter(None, map(_OVERRIDE.match, argv)):
      try:
        config_lib.check_path(match[1])
      except config_lib.ConfigError as unknown:
        _stop(unknown)
    raise
  if len(rest) > 1:
    _stop(f"{rest[1]!r} is not a flag; flags are written --name=value.")
  return rest


class _Told:
  """Says on a terminal every second what is being done, else every minute."""

  def __call__(self, what: str, seconds: int) -> None:
    line = f"{what}, {seconds} s"
    if sys.stderr.isatty():
      sys.stderr.write(f"\r\x1b[K{line}")
    elif seconds % 60 == 0:
      sys.stderr.write(f"{line}\n")
    sys.stderr.flush()

  def close(self) -> None:
    """Takes the line away."""
    if sys.stderr.isatty():
      sys.stderr.write("\r\x1b[K")


def main(argv: list[str]) -> None:
  """Compiles, prints, writes."""
  del argv
  if _CONFIG.value is None or _TOPOLOGY.value is None:
    _stop("Give --config=FILE, one of configs/, and --topology=v5p:4x4x2.")
  try:
    topology.use_environment(_TOPOLOGY.value)
  except ValueError as error:
    _stop(error)
  # A program of the cache would tell another compilation's time.
  jax.config.update("jax_enable_compilation_cache", False)
  told = _Told()

  def keep_text(text: str) -> None:
    if _TEXT.value:
      epath.Path(_TEXT.value).write_text(text)

  try:
    run, index = step.choose_stage(
      config_lib.build(_CONFIG.value),
      _STAGE.value,
      _BATCH.value,
      _ACCUMULATE.value,
    )
    found = report.examine(
      run, index, topology.describe(_TOPOLOGY.value), told, keep_text
    )
  except ValueError as error:
    _stop(error)
  finally:
    told.close()
  if _OUT.value:
    text = json.dumps(found.as_dict(), indent=2)
    epath.Path(_OUT.value).write_text(text + "\n")
  console = rich.console.Console()
  if not console.is_terminal:
    console = rich.console.Console(width=140)
  tables.write(found, console)
  sys.exit(0 if found.fits else 1)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
