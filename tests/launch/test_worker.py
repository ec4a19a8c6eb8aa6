"""launch/worker.sh: what one worker of a pod does, on a machine without TPU."""

import os
import subprocess

import pytest
from stand_ins import LAUNCH, ROOT, command

UNIT = "systemctl show --property=ActiveState --value photochat"
METADATA = "curl Metadata-Flavor: Google attributes/worker-network-endpoints"


@pytest.fixture
def home(tmp_path):
  """A worker's home, whose Python says what it got and ends as told."""
  folder = tmp_path / "home" / "photochat"
  (folder / "code").mkdir(parents=True)
  command(
    folder / "venv" / "bin" / "python",
    'if [[ "$2" == photochat_jax.runtime.xla_flags ]]; then\n'
    f'  cd {ROOT} && exec python3 "$@"\n'
    "fi\n"
    'printf "%s\\n" "$@" "$LIBTPU_INIT_ARGS" "$JAX_PLATFORMS" '
    '"${JAX_COORDINATOR_ADDRESS-alone}"\n'
    "${SIGNAL_FIRST:-:}\n"
    'exit "${ENDS:-0}"\n',
  )
  return tmp_path / "home"


def worker(stand_ins, home, *arguments, **variables):
  return stand_ins.run(
    "bash", LAUNCH / "worker.sh", *arguments, HOME=str(home), **variables
  )


@pytest.mark.parametrize(
  "endpoints, address",
  [
    ("t1v-n-0,t1v-n-1", "t1v-n-0:8476"),  # As new machines say it.
    ("unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3", "10.0.0.2:8476"),
    ("t1v-n-0", "alone"),
  ],
)
def test_a_run_gets_flags_and_the_others(stand_ins, home, endpoints, address):
  stand_ins.script((METADATA, endpoints))
  program = worker(
    stand_ins, home, "train", "v6e", "--config=a b", "--workdir=gs://B/r"
  )
  stand_ins.calls()
  assert program.returncode == 0, program.stderr
  *flags, variable, platforms, coordinator = program.stdout.splitlines()
  assert flags == [
    "-m",
    "photochat_jax.main",
    "--config=a b",
    "--workdir=gs://B/r",
  ]
  assert "--xla_tpu_scoped_vmem_limit_kib=98304" in variable
  assert platforms == "tpu,cpu"
  assert coordinator == address
  assert (home / "photochat" / "exit").read_text() == "0\n"


@pytest.mark.parametrize("code", [2, 76, 134])
def test_the_exit_code_is_kept(stand_ins, home, code):
  stand_ins.script((METADATA, "one"))
  program = worker(stand_ins, home, "train", "v4", ENDS=str(code))
  assert program.returncode == code
  assert (home / "photochat" / "exit").read_text() == f"{code}\n"


def test_sigterm_lets_python_save_first(stand_ins, home):
  stand_ins.script((METADATA, "one"))
  # systemd sends it to every process of the unit, the shell among them.
  program = worker(
    stand_ins,
    home,
    "train",
    "v4",
    SIGNAL_FIRST='eval kill -TERM "$PPID"',
    ENDS="75",
  )
  assert program.returncode == 75
  assert (home / "photochat" / "exit").read_text() == "75\n"


@pytest.mark.parametrize(
  "state, code, said",
  [
    ("active", None, "running"),
    ("deactivating", None, "running"),  # It saves.
    ("inactive", "75", "exit 75"),
    ("failed", "2", "exit 2"),
    ("inactive", None, "lost"),
  ],
)
def test_status_is_one_line(stand_ins, home, state, code, said):
  stand_ins.script((UNIT, state))
  if code:
    (home / "photochat" / "exit").write_text(f"{code}\n")
  program = worker(stand_ins, home, "status")
  name = subprocess.check_output(["hostname"], text=True).strip()
  assert program.stdout == f"worker {name} {said}\n"
  stand_ins.calls()


def test_a_run_is_started_as_a_unit_of_systemd(stand_ins, home):
  (home / "photochat" / "exit").write_text("75\n")
  stand_ins.script((UNIT, "inactive"), ("sudo systemd-run",))
  program = worker(stand_ins, home, "start", "v5p", "--config=c", "--x=y z")
  assert program.returncode == 0, program.stderr
  _, call = stand_ins.calls()
  assert "--unit=photochat" in call
  assert f"--property=WorkingDirectory={home}/photochat/code" in call
  assert call.endswith(
    f"/bin/bash {home}/worker.sh train v5p --config=c --x=y z"
  )
  # The old code must not be taken for the new run's.
  assert not (home / "photochat" / "exit").exists()


def test_a_second_run_is_refused(stand_ins, home):
  stand_ins.script((UNIT, "active"))
  program = worker(stand_ins, home, "start", "v5p")
  assert program.returncode == 2
  assert "A run is going on; 'launch/tpu.sh stop' saves" in program.stderr
  stand_ins.calls()


def test_the_code_of_a_branch_is_installed(tmp_path, home):
  """With the real git, twice: the second time finds newer code."""

  def git(*words):
    subprocess.run(
      ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
      check=True,
      cwd=tmp_path / "repository",
      capture_output=True,
    )

  (tmp_path / "repository").mkdir()
  git("init", "--quiet", "--initial-branch=work")
  command(tmp_path / "tools" / "uv", 'printf "%s\\n" "uv $*"\n')
  for text in ("first", "second"):
    (tmp_path / "repository" / "file.txt").write_text(text)
    git("add", "file.txt")
    git("commit", "--quiet", "--message=x")
    git("bundle", "create", "--quiet", str(home / "x.bundle"), "work")
    program = subprocess.run(
      ["bash", LAUNCH / "worker.sh", "install", "x.bundle", "work"],
      capture_output=True,
      text=True,
      check=False,
      env={
        **os.environ,
        "HOME": str(home),
        "PATH": f"{tmp_path}/tools:{os.environ['PATH']}",
      },
    )
    assert program.returncode == 0, program.stderr
    code = home / "photochat" / "code"
    assert (code / "file.txt").read_text() == text
  assert f"--editable {code}[tpu]" in program.stdout
  assert "-c" in program.stdout  # JAX was asked for its devices.


@pytest.mark.parametrize(
  "arguments, sentence",
  [
    ((), "Say what to do; the head of worker.sh lists it."),
    (("fly",), "'fly' is nothing worker.sh does; see its head."),
  ],
)
def test_what_is_wrong_is_one_sentence(stand_ins, home, arguments, sentence):
  program = worker(stand_ins, home, *arguments)
  assert program.returncode == 2
  assert program.stderr.endswith(f": {sentence}\n")
