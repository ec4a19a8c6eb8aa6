"""launch/tpu.sh watch: a run is looked after until it is done.

gcloud and git are stand-ins; each test is the whole conversation with them.
"""

import pytest
from stand_ins import LAUNCH

ARGUMENTS = (
  "--name=pod",
  "--zone=z",
  "--type=v6e-16",
  "--config=c",
  "--workdir=gs://B/r",
  "--poll=0",
  "--back-off=0",
)

POD = "gcloud compute tpus queued-resources"
NODE = "gcloud compute tpus tpu-vm"
NOT_FOUND = ("ERROR: NOT_FOUND: Resource 'pod' was not found", 1)
ACTIVE = ((f"{POD} describe pod", "ACTIVE"), (f"{NODE} describe pod", "READY"))
INSTALL = (
  (f"{POD} describe pod", "WAITING_FOR_RESOURCES"),
  *ACTIVE,
  ("git status", " M setup.py"),
  ("git bundle create /tmp/photochat-pod.bundle HEAD",),
  (f"{NODE} scp /tmp/photochat-pod.bundle worker.sh pod:",),
  (f"{NODE} ssh install photochat-pod.bundle HEAD",),
)
START = (f"{NODE} ssh worker.sh start v6e --config=c --workdir=gs://B/r",)
STOP = (f"{NODE} ssh worker.sh stop",)
LOG = (f"{NODE} ssh worker.sh log 40", "the log")
CREATE = (f"{POD} create pod --accelerator-type=v6e-16 v2-alpha-tpuv6e",)
DELETE = (f"{POD} delete pod --force",)


def status(*words, code=0):
  """One look at an active pod whose workers say these words."""
  lines = [f"worker w-{index} {word}" for index, word in enumerate(words)]
  return *ACTIVE, (f"{NODE} ssh worker.sh status", "\\n".join(lines), code)


def watch(stand_ins, *more):
  return stand_ins.run(LAUNCH / "tpu.sh", "watch", *ARGUMENTS, *more)


def test_a_pod_that_was_taken_away_is_made_anew(stand_ins):
  stand_ins.script(
    *status("running", "running"),
    (f"{POD} describe pod", "SUSPENDING"),
    (f"{POD} describe pod", "SUSPENDED"),
    (f"{POD} describe pod", "SUSPENDED"),
    DELETE,
    CREATE,
    *INSTALL,
    START,
    *status("running", "running"),
    *status("exit 0", "exit 0"),
  )
  program = watch(stand_ins)
  stand_ins.calls()
  assert program.returncode == 0, program.stderr
  assert "# pod: SUSPENDED, the run: gone\n" in program.stdout
  assert "# pod: ACTIVE, the run: finished\n" in program.stdout


def test_a_node_that_is_gone_is_enough(stand_ins):
  gone = ((f"{POD} describe pod", "ACTIVE"), (f"{NODE} describe", *NOT_FOUND))
  stand_ins.script(
    *gone, *gone, DELETE, CREATE, *INSTALL, START, *status("exit 0")
  )
  assert watch(stand_ins).returncode == 0
  stand_ins.calls()


def test_where_there_is_no_pod_nothing_is_deleted(stand_ins):
  stand_ins.script(
    (f"{POD} describe", *NOT_FOUND),
    (f"{POD} describe", *NOT_FOUND),
    CREATE,
    *INSTALL,
    START,
    *status("exit 0"),
    DELETE,
  )
  assert watch(stand_ins, "--delete-when-done").returncode == 0
  stand_ins.calls()


def test_no_network_is_no_reason_to_make_a_second_pod(stand_ins):
  stand_ins.script(
    (f"{POD} describe", "ERROR: could not reach the metadata server", 1),
    *status("exit 0"),
  )
  program = watch(stand_ins)
  stand_ins.calls()
  assert "could not reach" in program.stderr
  assert "# pod: UNKNOWN, the run: waiting\n" in program.stdout


@pytest.mark.parametrize(
  "ended",
  [
    ("exit 75", "exit 75"),
    ("exit 76", "exit 1", "exit 134"),  # A peer of the stuck one crashes.
    ("lost", "exit 1"),  # A machine was started anew.
    ("exit 1", "exit 1"),
  ],
)
def test_the_run_is_started_again(stand_ins, ended):
  stand_ins.script(*status(*ended), START, *status("exit 0"))
  program = watch(stand_ins)
  stand_ins.calls()
  assert program.returncode == 0, program.stderr


def test_a_wrong_setting_ends_the_watch(stand_ins):
  stand_ins.script(*status("running"), *status("exit 2", "running"), LOG, STOP)
  program = watch(stand_ins)
  stand_ins.calls()
  assert program.returncode == 2
  assert "the log" in program.stdout
  assert "A setting is wrong (exit code 2)" in program.stderr


def test_who_stops_a_run_by_hand_wants_it_stopped(stand_ins):
  stand_ins.script(*status("exit 130", "exit 130"))
  assert watch(stand_ins).returncode == 130
  stand_ins.calls()


def test_crashes_in_a_row_end_the_watch(stand_ins):
  crashed = status("exit 1", "exit 1")
  stand_ins.script(*crashed, START, *crashed, START, *crashed, LOG)
  program = watch(stand_ins)
  stand_ins.calls()
  assert program.returncode == 1
  assert "# 3 failures in a row: given up. The pod remains.\n" in program.stdout


def test_a_run_that_stayed_up_is_forgiven(stand_ins):
  crashed, up = status("exit 1"), status("running")
  stand_ins.script(
    *crashed, START, *(up * 10), *crashed, START, *status("exit 0")
  )
  assert watch(stand_ins, "--max-failures=2").returncode == 0
  stand_ins.calls()


def test_failures_to_make_the_pod_count(stand_ins):
  failed = (
    (f"{POD} describe", *NOT_FOUND),
    (f"{POD} describe", *NOT_FOUND),
    (*CREATE, "ERROR: quota", 1),
  )
  stand_ins.script(*failed, *failed, (*LOG[:1], "no pod", 1))
  program = watch(stand_ins, "--max-failures=2")
  stand_ins.calls()
  assert program.returncode == 1
  assert "ERROR: quota" in program.stderr


def test_a_failed_step_ends_the_set_up(stand_ins):
  stand_ins.script(
    (f"{POD} describe", *NOT_FOUND),
    (f"{POD} describe", *NOT_FOUND),
    CREATE,
    *INSTALL[:-2],
    (f"{NODE} scp", "ERROR: no route", 1),  # Nothing is installed after it.
    (*LOG[:1], "no log", 1),
  )
  assert watch(stand_ins, "--max-failures=1").returncode == 1
  stand_ins.calls()


def test_workers_get_time_to_end_one_after_the_other(stand_ins):
  mixed = status("exit 76", "running")
  stand_ins.script(
    *mixed,
    *mixed,
    *status("exit 76", "exit 1"),
    START,
    *mixed,
    *mixed,
    *mixed,
    STOP,
    START,
    *status("exit 0", "exit 0"),
  )
  program = watch(stand_ins)
  stand_ins.calls()
  assert program.returncode == 0, program.stderr


def test_one_look_without_an_answer_means_nothing(stand_ins):
  silent = (*ACTIVE, (f"{NODE} ssh worker.sh status", "ssh: no answer", 255))
  stand_ins.script(*silent, *silent, *status("running"), *status("exit 0"))
  assert watch(stand_ins).returncode == 0
  stand_ins.calls()


def test_resume_starts_on_a_pod_that_is_still_there(stand_ins):
  stand_ins.script(*ACTIVE, *INSTALL[1:], START)
  program = stand_ins.run(LAUNCH / "tpu.sh", "resume", *ARGUMENTS)
  stand_ins.calls()
  assert program.returncode == 0, program.stderr
  assert "# What is not committed does not travel.\n" in program.stdout


def test_setup_does_not_wait_for_a_pod_that_failed(stand_ins):
  stand_ins.script((f"{POD} describe", "FAILED"))
  program = stand_ins.run(
    LAUNCH / "tpu.sh", "setup", "--name=pod", "--zone=z", "--poll=0"
  )
  stand_ins.calls()
  assert program.returncode == 1
  assert program.stderr == "tpu.sh: The pod pod is FAILED; create it (again).\n"
