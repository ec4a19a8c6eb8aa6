"""Commands of clouds and clusters, played by a script; see stand_in.sh."""

import os
import pathlib
import stat
import subprocess

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
LAUNCH = ROOT / "launch"
COMMANDS = (
  "gcloud git kubectl xpk srun scontrol sudo systemctl systemd-run curl"
).split()


class StandIns:
  """A folder of commands which answer what a test says.

  Attributes:
    folder: with a link for each command.
  """

  def __init__(self, folder: pathlib.Path, commands=COMMANDS):
    self.folder = folder
    folder.mkdir()
    for name in commands:
      (folder / name).symlink_to(HERE / "stand_in.sh")
    self.script()

  def script(self, *lines: tuple) -> None:
    """Says what will be called: (words, answer='', exit code=0)."""
    defaults = (None, "", 0)
    rows = [line + defaults[len(line) :] for line in lines]
    (self.folder / "script").write_text(
      "".join(f"{words}\t{code}\t{answer}\n" for words, answer, code in rows)
    )

  def run(self, *command, **variables) -> subprocess.CompletedProcess:
    """Runs a command that finds the stand-ins before anything else."""
    environment = {
      name: value
      for name, value in os.environ.items()
      if not name.startswith(("SLURM_", "XLA_", "LIBTPU_", "JAX_", "NCCL_"))
    }
    environment["PATH"] = f"{self.folder}:{os.environ['PATH']}"
    environment |= {"TMPDIR": "/tmp", **variables}
    return subprocess.run(
      [str(word) for word in command],
      capture_output=True,
      text=True,
      check=False,
      cwd=ROOT,
      timeout=60,
      env=environment,
      # A group of its own, which a stand-in that is wrongly called ends.
      start_new_session=True,
    )

  def calls(self) -> list[str]:
    """What was called, after checking that it was all that was to be."""
    wrong = self.folder / "wrong"
    assert not wrong.exists(), wrong.read_text()
    calls = self.folder / "calls"
    made = calls.read_text().splitlines() if calls.exists() else []
    script = (self.folder / "script").read_text().splitlines()
    assert len(made) == len(script), f"Not called: {script[len(made) :]}"
    return made


def command(path: pathlib.Path, text: str) -> None:
  """Writes a command for a test."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/usr/bin/env bash\n{text}")
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


def expected(name: str) -> str:
  """A dry run as it was reviewed, with ROOT for where the repository lies."""
  return (HERE / "expected" / f"{name}.txt").read_text()


def shown(program: subprocess.CompletedProcess) -> str:
  """What a dry run printed, as `expected` has it."""
  assert program.returncode == 0, program.stderr
  assert program.stderr == ""
  return program.stdout.replace(str(ROOT), "ROOT")
