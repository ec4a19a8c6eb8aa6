#!/usr/bin/env python3
"""Starts a run on TPU slices of GKE, or prints what would start it.

python launch/gke/jobset.py apply --name=run1 --topology=v5p:4x4x4 \
  --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/photochat:TAG \
  --config=configs/photochat.py:run=gs://BUCKET/weights \
  --workdir=gs://BUCKET/runs/run1 --dry-run

| action | what it does                                                |
|--------|-------------------------------------------------------------|
| apply  | fills in launch/gke/jobset.yaml and gives it to kubectl     |
| delete | ends the run; SIGTERM lets it save                          |
| xpk    | prints the same as a command of xpk, for clusters made by it |

Everything after `--` goes to photochat_jax.main. Needs kubectl, and no more
than Python's own library.
"""

import argparse
import json
import math
import pathlib
import re
import shlex
import string
import subprocess
import sys
from typing import NamedTuple, NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from photochat_jax.runtime import xla_flags  # noqa: E402


class Generation(NamedTuple):
  """What GKE and xpk call a generation of TPUs.

  https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus

  Attributes:
    accelerator: label of its node pools.
    dimensions: of a topology.
    prefix: of xpk's and the TPU API's type.
    cores: that the number in this type counts for each chip.
  """

  accelerator: str
  dimensions: int
  prefix: str
  cores: int


GENERATIONS = {
  "v4": Generation("tpu-v4-podslice", 3, "v4", 2),
  "v5e": Generation("tpu-v5-lite-podslice", 2, "v5litepod", 1),
  "v5p": Generation("tpu-v5p-slice", 3, "v5p", 2),
  "v6e": Generation("tpu-v6e-slice", 2, "v6e", 1),
}


class _Parser(argparse.ArgumentParser):
  """A parser whose errors are one sentence."""

  def error(self, message: str) -> NoReturn:
    sys.stderr.write(f"jobset.py: {message[0].upper()}{message[1:]}.\n")
    sys.exit(2)


def _parse(arguments: list[str]) -> argparse.Namespace:
  parser = _Parser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add = parser.add_argument
  add("action", choices=["apply", "delete", "xpk"])
  add("--name", required=True, help="of the run")
  add("--namespace", default="default", help="of Kubernetes")
  add("--topology", help="of a slice, such as v5p:4x4x4 or v6e:4x4")
  add("--slices", type=int, default=1, help="how many")
  add("--chips-per-host", type=int, default=4, help="8 on ct5lp/ct6e-...-8t")
  add("--image", help="made from launch/Dockerfile with DEVICE=tpu")
  add("--config", help="as for photochat_jax.main")
  add("--workdir", help="gs://BUCKET/RUN")
  add("--service-account", default="default", help="of Kubernetes")
  add("--max-restarts", type=int, default=20, help="whatever the reason")
  add("--grace", type=int, default=300, help="seconds to save on SIGTERM")
  add("--cluster", help="for xpk")
  add("--dry-run", action="store_true", help="print, and do nothing")
  split = arguments.index("--") if "--" in arguments else len(arguments)
  options = parser.parse_args(arguments[:split])
  options.flags = arguments[split + 1 :]
  _check(parser, options)
  return options


def _check(parser: _Parser, options: argparse.Namespace) -> None:
  """Ends the program with a sentence for what cannot work."""
  # Names of pods are made of it, with up to 20 characters more.
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
    parser.error(
      f"--name={options.name} must be up to 40 small letters, digits and "
      "hyphens, and begin with a letter"
    )
  if options.action == "delete":
    return
  for name in ("topology", "image", "config", "workdir"):
    if not getattr(options, name):
      parser.error(f"give --{name} to {options.action} a run")
  if options.action == "xpk" and not options.cluster:
    parser.error("give --cluster, the one that xpk made")
  if not options.workdir.startswith("gs://"):
    parser.error("give --workdir=gs://BUCKET/RUN; pods share no disk")
  generation, _, shape = options.topology.partition(":")
  dimensions = getattr(GENERATIONS.get(generation), "dimensions", 0)
  if not re.fullmatch(r"\d+(x\d+)*", shape) or dimensions != len(
    shape.split("x")
  ):
    parser.error(
      f"--topology={options.topology} is none of v4:AxBxC, v5p:AxBxC, "
      "v5e:AxB and v6e:AxB"
    )
  chips = _chips(options)
  if chips > options.chips_per_host and chips % options.chips_per_host:
    parser.error(
      f"{chips} chips cannot be divided by --chips-per-host="
      f"{options.chips_per_host}"
    )


def _chips(options: argparse.Namespace) -> int:
  """Chips of a slice."""
  return math.prod(map(int, options.topology.partition(":")[2].split("x")))


def _flags(options: argparse.Namespace) -> list[str]:
  """What photochat_jax.main is given."""
  return [
    f"--config={options.config}",
    f"--workdir={options.workdir}",
    *options.flags,
  ]


def manifest(options: argparse.Namespace) -> str:
  """Fills in launch/gke/jobset.yaml; JSON's strings are YAML's as well."""
  generation, _, shape = options.topology.partition(":")
  chips = _chips(options)
  text = (pathlib.Path(__file__).with_name("jobset.yaml")).read_text("utf-8")
  # Without the list of names, which are filled in below.
  body = text[text.index("apiVersion:") :]
  return string.Template(body).substitute(
    NAME=options.name,
    NAMESPACE=json.dumps(options.namespace),
    MAX_RESTARTS=options.max_restarts,
    SLICES=options.slices,
    HOSTS=max(1, chips // options.chips_per_host),
    CHIPS=min(chips, options.chips_per_host),
    ACCELERATOR=GENERATIONS[generation].accelerator,
    TOPOLOGY=json.dumps(shape),
    SERVICE_ACCOUNT=json.dumps(options.service_account),
    GRACE=options.grace,
    IMAGE=json.dumps(options.image),
    ARGUMENTS=json.dumps(_flags(options)),
    XLA_VARIABLE=xla_flags.variable(generation),
    XLA_VALUE=json.dumps(xla_flags.value(generation)),
  )


def xpk(options: argparse.Namespace) -> list[str]:
  """The same run as a command of xpk.

  xpk restarts on 42 and 127 to 255, and on what it is told: 1 is a crash,
  perhaps of a process whose peer was taken away.
  """
  generation = options.topology.partition(":")[0]
  known = GENERATIONS[generation]
  run = ["python", "-m", "photochat_jax.main", *_flags(options)]
  return [
    "xpk",
    "workload",
    "create",
    f"--cluster={options.cluster}",
    f"--workload={options.name}",
    f"--tpu-type={known.prefix}-{_chips(options) * known.cores}",
    f"--num-slices={options.slices}",
    f"--docker-image={options.image}",
    f"--max-restarts={options.max_restarts}",
    "--restart-on-exit-codes=1,75,76",
    f"--termination-grace-period-seconds={options.grace}",
    f"--env={xla_flags.variable(generation)}={xla_flags.value(generation)}",
    # xpk's shell passes SIGTERM to its child: let that be Python.
    f"--command=exec {shlex.join(run)}",
  ]


def main(arguments: list[str]) -> int:
  """Runs one action and returns the exit code of its command."""
  options = _parse(arguments)
  if options.action == "xpk":
    print(shlex.join(xpk(options)))
    return 0
  command, text = ["kubectl", "apply", "--filename=-"], None
  if options.action == "delete":
    # In the background: saving takes as long as it takes.
    command = ["kubectl", "delete", "jobset", options.name, "--wait=false"]
    command.append(f"--namespace={options.namespace}")
  else:
    text = manifest(options)
  if options.dry_run:
    here = f" <<'EOF'\n{text}EOF" if text else ""
    print(f"{shlex.join(command)}{here}")
    return 0
  return subprocess.run(command, input=text, text=True, check=False).returncode


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
