"""launch/slurm.sbatch: what it runs, and when a job goes back to the queue."""

import pytest
from stand_ins import LAUNCH, ROOT, command, expected, shown

SCRIPT = LAUNCH / "slurm.sbatch"
RUN = ("--config=configs/tiny.py", "--workdir=/shared/run")


def test_a_dry_run_prints_every_command_and_runs_none(stand_ins):
  program = stand_ins.run(
    "bash", SCRIPT, "--dry-run", *RUN, "--config.run name=x"
  )
  assert shown(program) == expected("slurm")
  assert stand_ins.calls() == []


def test_a_container_and_what_the_user_has_set(stand_ins):
  program = stand_ins.run(
    "bash",
    SCRIPT,
    *RUN,
    "--chip=a100",
    "--container=registry/photochat:1",
    "--mounts=/data:/data,/shared:/shared",
    "--max-restarts=9",
    "--dry-run",
    XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=false",
    CUDA_DEVICE_MAX_CONNECTIONS="8",
    NCCL_DEBUG="INFO",
  )
  assert shown(program) == expected("slurm_container")


def submit(stand_ins, tmp_path, **variables):
  """Runs the script as SLURM does: a copy of it, elsewhere."""
  copy = tmp_path / "slurm_script"
  copy.write_text(SCRIPT.read_text())
  command(tmp_path / "python", "exit 1\n")
  return stand_ins.run(
    "bash",
    copy,
    *RUN,
    f"--python={tmp_path}/python",
    SLURM_SUBMIT_DIR=str(ROOT),
    SLURM_JOB_ID="77",
    **variables,
  )


TASKS = "srun --wait=300 python -u -m photochat_jax.main --config=configs/tiny"
REQUEUE = ("scontrol requeue 77",)


@pytest.mark.parametrize(
  "code, restarts",
  [(75, "0"), (75, "50"), (76, "0"), (1, "4"), (134, "0"), (137, "4")],
)
def test_the_job_goes_back_to_the_queue(stand_ins, tmp_path, code, restarts):
  stand_ins.script((TASKS, "", code), REQUEUE)
  program = submit(stand_ins, tmp_path, SLURM_RESTART_COUNT=restarts)
  assert program.returncode == code, program.stderr
  stand_ins.calls()


@pytest.mark.parametrize(
  "code, restarts",
  [(0, "0"), (2, "0"), (130, "0"), (76, "5"), (1, "5"), (139, "6")],
)
def test_the_job_is_over(stand_ins, tmp_path, code, restarts):
  stand_ins.script((TASKS, "", code))
  program = submit(stand_ins, tmp_path, SLURM_RESTART_COUNT=restarts)
  assert program.returncode == code
  stand_ins.calls()
  if code == 2:
    assert "A setting is wrong (exit code 2)" in program.stderr


def test_sigterm_reaches_the_tasks_and_the_job_is_put_back(stand_ins, tmp_path):
  stand_ins.script(REQUEUE)
  (stand_ins.folder / "srun").unlink()
  # SLURM signals the tasks; some sites signal the script as well.
  command(stand_ins.folder / "srun", 'kill -TERM "$PPID"\nexit 75\n')
  program = submit(stand_ins, tmp_path)
  assert program.returncode == 75
  assert "Saved before the end of the time" in program.stdout
  stand_ins.calls()


@pytest.mark.parametrize(
  "arguments, sentence",
  [
    (RUN[:1], "Give --workdir=DIR, a folder that all nodes see."),
    (RUN[1:], "Give --config=FILE, one of configs/."),
    ((*RUN, "--chip=v5p"), "--chip=v5p is none of a100, h100 and h200."),
    ((*RUN, "--max-restarts=x"), "--max-restarts=x must be a whole number."),
    (
      (*RUN, "--python=/no/python"),
      "There is no /no/python; make the environment, or give --python=FILE.",
    ),
  ],
)
def test_what_is_wrong_is_one_sentence(stand_ins, arguments, sentence):
  program = stand_ins.run("bash", SCRIPT, *arguments)
  assert (program.returncode, program.stdout) == (2, "")
  assert program.stderr == f"slurm.sbatch: {sentence}\n"
  assert stand_ins.calls() == []


def test_it_must_be_submitted_from_the_root(stand_ins, tmp_path):
  program = stand_ins.run("bash", SCRIPT, SLURM_SUBMIT_DIR=str(tmp_path))
  assert program.returncode == 2
  assert "Submit from the root of the repository." in program.stderr


def test_help_is_the_head_without_slurms_lines(stand_ins):
  text = stand_ins.run("bash", SCRIPT, "--help").stdout
  assert "sbatch --nodes=4 launch/slurm.sbatch" in text
  assert "#SBATCH" not in text
