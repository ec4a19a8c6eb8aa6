"""The command line: trains, evaluates, or talks.

python -m photochat_jax.main --config=configs/tiny.py --workdir=runs/tiny
python -m photochat_jax.main --mode=chat --workdir=runs/tiny
"""

import os
import re
import sys
import time
import traceback
from typing import NoReturn

import jax
from absl import app, flags
from ml_collections import config_flags

from photochat_jax import config as config_lib
from photochat_jax import record
from photochat_jax.runtime import cluster

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "A file of configs/, with ':argument' where it takes one; "
  "--config.FIELD=VALUE after it changes a field.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run: settings, checkpoints, metrics, samples."
)
_MODE = flags.DEFINE_enum(
  "mode", "train", ["train", "evaluate", "chat"], "train also evaluates."
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address",
  None,
  "HOST:PORT of process 0, for runs of several processes; a TPU pod, SLURM and "
  "Open MPI need none of these three.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes the run has."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of them this is, from 0."
)
_PROFILE = flags.DEFINE_bool(
  "profile",
  False,
  "Trace the steps log.profile_steps of this start into WORKDIR/profile.",
)
_OVERRIDE = re.compile(r"--?(?:no)?config\.([\w.]+)")


def _stop(error: object) -> NoReturn:
  sys.stderr.write(f"photochat_jax: {error}\n")
  sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; a wrong one ends the program with one sentence."""
  fields = [match[1] for match in map(_OVERRIDE.match, argv) if match]
  try:
    rest = flags.FLAGS(argv)
    if _CONFIG.value is not None:
      _CONFIG.value.to_dict()  # A file that failed to load raises here.
  except (flags.Error, OSError) as error:
    if fields and not any(re.match("--?config(=|$)", a) for a in argv):
      _stop(f"--config.{fields[0]} needs a --config=FILE before it.")
    kind, _, sentence = str(error).strip().splitlines()[-1].partition(": ")
    if "Traceback" not in str(error):
      _stop(" ".join(str(error).split()))
    if kind == "ValueError":  # Raised by the config file on purpose.
      _stop(sentence)
    raise
  except (AttributeError, KeyError, TypeError):
    # The library's message holds the whole config: say which field it is.
    for field in fields:
      try:
        config_lib.check_path(field)
      except config_lib.ConfigError as unknown:
        _stop(unknown)
    raise
  if len(rest) > 1:
    _stop(f"{rest[1]!r} is not a flag; flags are written --name=value.")
  if flags.FLAGS["verbosity"].using_default_value:
    flags.FLAGS.verbosity = -1  # Warnings: information drowns the progress.
  return rest


def _use_cache(folder: str) -> None:
  """Keeps compiled programs, where the user's environment does not say."""
  if folder != "off" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = folder or os.path.expanduser("~/.cache/photochat_jax/xla")
    jax.config.update("jax_compilation_cache_dir", folder)


def main(argv: list[str]) -> None:
  """Runs one mode."""
  del argv
  started, workdir, mode = time.time(), _WORKDIR.value, _MODE.value
  try:
    if not workdir:
      raise config_lib.ConfigError("Give --workdir=DIR, the folder of the run.")
    if _CONFIG.value is not None:
      run = config_lib.build(_CONFIG.value)
    elif mode == "train":
      raise config_lib.ConfigError("Give --config=FILE, one of configs/.")
    else:
      run = record.read(workdir)
    joined = cluster.start(
      _COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
    if joined and cluster.is_first():
      sys.stderr.write(f"{joined}\n")
    _use_cache(run.compilation_cache)
    # Imported here so that a wrong flag is told at once.
    if mode == "chat":
      from photochat_jax.chat import chat

      chat(run, workdir)
      return
    from photochat_jax.evaluate import evaluate

    if mode == "train":
      from photochat_jax.train import train

      record.write(run, workdir)
      train(run, workdir, _PROFILE.value, started)
    evaluate(run, workdir, started)
  except ValueError as error:
    # What this package raises itself is a sentence to the user.
    *_, last = traceback.extract_tb(error.__traceback__)
    if not last.filename.startswith(os.path.dirname(__file__)):
      raise
    _stop(error)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
