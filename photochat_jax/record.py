"""`WORKDIR/config.json`: what a run is made of.

Its settings, the versions of the libraries and the commit of this package, so
that a workdir can be talked to and evaluated without its config file, and
years later explained.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import subprocess

import jax
from etils import epath

from photochat_jax import config as config_lib
from photochat_jax.checkpoints import manager

_LIBRARIES = (
  "photochat_jax",
  "jax",
  "flax",
  "optax",
  "orbax-checkpoint",
  "numpy",
  "tensorflow-cpu",
)


def versions() -> dict[str, str | None]:
  """Returns the installed versions of this package and what it rests on."""
  found = {}
  for name in _LIBRARIES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None  # Not installed, or this package run from a checkout.
  return found


def commit() -> str | None:
  """Returns the git commit of this package's checkout, None without one."""
  command = ["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"]
  try:
    git = subprocess.run(command, capture_output=True, text=True, check=False)
  except FileNotFoundError:
    return None
  return git.stdout.strip() if git.returncode == 0 else None


def devices() -> str:
  """Returns what computes: how many of which kind, over how many processes."""
  kind = jax.devices()[0].device_kind
  return f"{jax.device_count()} x {kind}, {jax.process_count()} processes"


def weights_digest(
  run: config_lib.RunConfig, workdir: epath.PathLike, step: int
) -> str:
  """SHA-256 of a checkpoint's weights, from the digests of its arrays.

  Raises:
    CheckpointError: there is none, or it is of another config.
  """
  with manager.Checkpoints(workdir, model=run.as_dict()["model"]) as saved:
    digests = saved.read_meta(step)["digests"]
  weights = {
    path: digest
    for path, digest in digests.items()
    if not path.startswith("opt_state")
  }
  text = json.dumps(weights, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def write(run: config_lib.RunConfig, workdir: str) -> None:
  """Writes the record of a run that is about to start or go on.

  All processes must call it; the first one writes.

  Args:
    run: its settings; other steps or losses than before are fine.
    workdir: its folder, made where it is not there.

  Raises:
    CheckpointError: if the folder's checkpoints are of another model.
  """
  with manager.Checkpoints(workdir, model=run.as_dict()["model"]) as saved:
    if saved.latest() is not None:
      # Training goes on from the one before a damaged one.
      with contextlib.suppress(manager.CheckpointDamaged):
        saved.read_meta()
  if jax.process_index() != 0:
    return
  record = {
    "versions": versions(),
    "git_commit": commit(),
    "config": run.as_dict(),
  }
  path = epath.Path(workdir) / "config.json"
  path.write_text(json.dumps(record, indent=2) + "\n")


def read(workdir: str) -> config_lib.RunConfig:
  """Returns the settings a workdir was made with.

  Tokenizers that were copied into the workdir are found there, wherever it is
  now.

  Raises:
    ConfigError: if the folder has no record, or not one of this version.
  """
  path = epath.Path(workdir) / "config.json"
  if not path.exists():
    raise config_lib.ConfigError(
      f"{path} is not there; give the --workdir of a run, or --config=FILE."
    )
  try:
    settings = json.loads(path.read_text())["config"]
  except (ValueError, KeyError, TypeError) as error:
    raise config_lib.ConfigError(
      f"{path} cannot be read as a run's settings; give --config=FILE."
    ) from error
  run = config_lib.build(settings)
  copied = {
    name: str(folder)
    for name in ("llm_tokenizer", "clip_tokenizer")
    if (folder := tokenizer_folder(workdir, name)).exists()
  }
  return run.with_data(**copied)


def tokenizer_folder(workdir: epath.PathLike, name: str) -> epath.Path:
  """Where a workdir keeps a copy of `llm_tokenizer` or `clip_tokenizer`."""
  return epath.Path(workdir) / "tokenizers" / name.removesuffix("_tokenizer")
