r"""Makes a result again and says whether it is the same.

  python tools/reproduce.py runs/tiny/eval/metrics.json
  python tools/reproduce.py runs/tiny/eval/metrics.json --train --out=runs/again

The first measures the run's weights again, into WORKDIR/reproduced. The second
trains anew in another folder, from the settings that the result carries, and
measures that. Prints which circumstances are others (code, data, weights,
versions, devices) and which figures differ.

Exit status: 0 all figures are the same, 1 some differ, 2 it cannot be tried.
"""

import json
import sys

from absl import app, flags, logging
from etils import epath

from photochat_jax import config as config_lib
from photochat_jax import record, reproduce

_TRAIN = flags.DEFINE_bool("train", False, "Train anew, too.")
_OUT = flags.DEFINE_string("out", None, "With --train: a new run's folder.")
_TOLERANCE = flags.DEFINE_float(
  "tolerance", 1e-6, "How far figures may be apart, relatively."
)


def main(argv: list[str]) -> None:
  """Reads, makes again, compares."""
  logging.set_verbosity(logging.WARNING)  # Orbax tells much.
  try:
    same = _again(argv[1:])
  except ValueError as error:
    sys.stderr.write(f"reproduce: {error}\n")
    sys.exit(2)
  sys.exit(0 if same else 1)


def _again(arguments: list[str]) -> bool:
  if len(arguments) != 1:
    raise ValueError("Give one file, WORKDIR/eval/metrics.json.")
  path = epath.Path(arguments[0])
  try:
    then = json.loads(path.read_text())
    run = config_lib.build(then["config"])
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
  except (KeyError, TypeError, json.JSONDecodeError) as error:
    raise ValueError(f"{path} is no result of an evaluation.") from error

  from photochat_jax.evaluate import evaluate

  workdir, folder = str(path.parent.parent), "reproduced"
  if _TRAIN.value:
    from photochat_jax.train import train

    if not _OUT.value:
      raise ValueError("Give --out=DIR, the folder of the run to be trained.")
    workdir, folder = _OUT.value, "eval"
    record.write(run, workdir)
    train(run, workdir)
  now = json.loads(json.dumps(evaluate(run, workdir, folder=folder)))
  for other in reproduce.making(then, now):
    print(f"other {other.name}: {other.then} then, {other.now} now")
  found = reproduce.figures(then, now, _TOLERANCE.value)
  for other in found:
    print(f"DIFFERS {other.name}: {other.then} then, {other.now} now")
  print("All figures are the same." if not found else f"{len(found)} differ.")
  return not found


if __name__ == "__main__":
  app.run(main)
