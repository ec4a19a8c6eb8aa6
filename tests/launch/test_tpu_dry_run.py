"""launch/tpu.sh: what a dry run prints, and what is refused."""

import pytest
from stand_ins import LAUNCH, expected, shown

POD = ("--name=pod", "--zone=us-east5-a")
RUN = ("--config=configs/photochat.py:run=gs://B/w", "--workdir=gs://B/r")
TYPE = "--type=v5p-64"

DRY_RUNS = {
  "create": ("create", *POD, TYPE),
  "create_spot": (
    "create",
    "--name=pod",
    "--zone=europe-west4-a",
    "--project=ours",
    "--type=v6e-16",
    "--runtime=tpu-next",
    "--spot",
    "--create-flag=--reserved",
    "--create-flag=--labels=team=a b",
  ),
  "setup": ("setup", *POD, "--branch=v1.0"),
  "run": ("run", *POD, TYPE, *RUN, "--", "--config.stages.joint.steps=300"),
  "watch": (
    "watch",
    *POD,
    TYPE,
    *RUN,
    "--spot",
    "--poll=5",
    "--delete-when-done",
  ),
  "resume": ("resume", *POD, TYPE, *RUN),
  "status": ("status", *POD),
  "log": ("log", *POD, "--lines=100"),
  "stop": ("stop", *POD),
  "delete": ("delete", *POD),
}


def with_dry_run(arguments):
  command, *options = arguments
  return [LAUNCH / "tpu.sh", command, "--dry-run", *options]


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_prints_every_command_and_runs_none(stand_ins, name):
  program = stand_ins.run(*with_dry_run(DRY_RUNS[name]))
  assert shown(program) == expected(name)
  assert stand_ins.calls() == []


@pytest.mark.parametrize(
  "kind, chip, image",
  [
    ("v4-16", "v4", "tpu-ubuntu2204-base"),
    ("v5litepod-256", "v5e", "v2-alpha-tpuv5-lite"),
    ("v5p-64", "v5p", "v2-alpha-tpuv5"),
    ("v6e-256", "v6e", "v2-alpha-tpuv6e"),
  ],
)
def test_the_type_says_the_image_and_the_flags(stand_ins, kind, chip, image):
  program = stand_ins.run(
    *with_dry_run(("resume", *POD, *RUN, f"--type={kind}"))
  )
  text = shown(program)
  assert f"--accelerator-type={kind} --runtime-version={image}\n" in text
  assert f"worker.sh start {chip} --config" in text


@pytest.mark.parametrize(
  "arguments, sentence",
  [
    (("fly",), "'fly' is no command; --help lists them."),
    (("delete",), "Give --name=NAME, the name of the pod."),
    (("delete", "--name=pod"), "Give --zone=ZONE, such as us-east5-a."),
    (("create", *POD), "Give --type=TYPE, such as v5p-64."),
    (
      ("create", *POD, "--type=v5e-8"),
      "--type=v5e-8 is none of v4-N, v5litepod-N, v5p-N and v6e-N.",
    ),
    (("run", *POD, TYPE), "Give --config=FILE, one of configs/."),
    (
      ("run", *POD, TYPE, "--config=c", "--workdir=/tmp/run"),
      "Give --workdir=gs://BUCKET/RUN; the workers of a pod share no disk.",
    ),
    (("watch", *POD, "--poll=soon"), "--poll=soon must be a whole number."),
    (
      ("watch", *POD, "--max-failures=-1"),
      "--max-failures=-1 must be a whole number.",
    ),
    (
      ("run", *POD, "--config.seed=1"),
      "'--config.seed=1' is no option, see --help; flags of the run follow "
      "'--'.",
    ),
  ],
)
def test_what_is_wrong_is_one_sentence(stand_ins, arguments, sentence):
  program = stand_ins.run(LAUNCH / "tpu.sh", *arguments)
  assert (program.returncode, program.stdout) == (2, "")
  assert program.stderr == f"tpu.sh: {sentence}\n"
  assert stand_ins.calls() == []


def test_help_lists_every_command_and_option(stand_ins):
  text = stand_ins.run(LAUNCH / "tpu.sh", "--help").stdout
  source = (LAUNCH / "tpu.sh").read_text()
  parsed = source[source.index("parse() {") : source.index("know_type()")]
  options = [
    line.split(")")[0].strip().rstrip("*")
    for line in parsed.splitlines()
    if line.strip().startswith("--") and ")" in line
  ]
  assert len(options) > 15
  for option in options:
    assert option in text
  for command in {name.partition("_")[0] for name in DRY_RUNS}:
    assert f"\n  {command} " in text
