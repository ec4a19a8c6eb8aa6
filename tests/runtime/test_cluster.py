"""Who says that there are other processes, and what is asked of JAX then."""

import logging
import os
import subprocess
import sys

import jax
import pair
import pytest

from photochat_jax.runtime import cluster

# As srun sets them for the third of four tasks, one on each machine.
SLURM = {
  "SLURM_JOB_ID": "70001",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "0",
  "SLURM_STEP_NODELIST": "node[01-04]",
  "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
# As mpirun sets them, of version 4 and of version 5.
OPEN_MPI_5 = {
  "OMPI_COMM_WORLD_SIZE": "8",
  "OMPI_COMM_WORLD_RANK": "3",
  "OMPI_COMM_WORLD_LOCAL_RANK": "3",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
OPEN_MPI_4 = OPEN_MPI_5 | {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"
}
# A machine without a TPU, as JAX leaves it.
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}


@pytest.mark.parametrize(
  "environment",
  [
    {},
    {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "1"},
    {"TPU_WORKER_HOSTNAMES": "localhost"},
    {"TPU_WORKER_HOSTNAMES": ""},
    {"OMPI_COMM_WORLD_SIZE": "1"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
    # A tool on the CPU of a pod's host does not wait for the pod.
    {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"},
    {"JAX_COORDINATOR_ADDRESS": ""},
  ],
)
def test_alone(environment):
  assert cluster.find(NO_TPU | environment) is None


@pytest.mark.parametrize(
  "environment, name",
  [
    ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, "TPU pod"),
    ({"TPU_PROCESS_ADDRESSES": "a:8476,b:8476"}, "TPU pod"),
    (
      {
        "MEGASCALE_COORDINATOR_ADDRESS": "slice-0",
        "TPU_WORKER_HOSTNAMES": "localhost",
      },
      "TPU pod",
    ),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "tpu,cpu"}, "TPU pod"),
    (SLURM, "SLURM"),
    (OPEN_MPI_4, "Open MPI"),
  ],
)
def test_what_jax_finds_out_is_left_to_it(environment, name):
  found = cluster.find(NO_TPU | environment)
  assert found.name == name and found.is_certain
  assert (found.address, found.processes, found.process) == (None, None, None)


def test_a_tpu_without_names_of_hosts_may_be_of_a_pod():
  found = cluster.find({})
  assert found.name == "TPU host" and not found.is_certain


@pytest.mark.parametrize(
  "environment, flags, wanted",
  [
    ({}, ("a:1", 2, 1), ("a:1", 2, 1)),
    (
      {
        "JAX_COORDINATOR_ADDRESS": "a:1",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "0",
      },
      (),
      ("a:1", 4, 0),
    ),
    # A flag wins over its variable.
    (
      {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "3"},
      ("b:2", 2, 1),
      ("b:2", 2, 1),
    ),
    # Open MPI 5 does not say where, but who.
    (OPEN_MPI_5, ("a:1",), ("a:1", 8, 3)),
    # A pod of an indexed Kubernetes job.
    (
      {
        "JAX_COORDINATOR_ADDRESS": "job-0.svc:1234",
        "JAX_NUM_PROCESSES": "2",
        "JOB_COMPLETION_INDEX": "1",
      },
      (),
      ("job-0.svc:1234", 2, 1),
    ),
    # SLURM says the rest, to JAX.
    (SLURM, ("a:1",), ("a:1", None, None)),
    ({}, ("[::1]:77", 1, 0), ("[::1]:77", 1, 0)),
  ],
)
def test_flags_and_their_variables(environment, flags, wanted):
  found = cluster.find(NO_TPU | environment, *flags)
  assert (found.address, found.processes, found.process) == wanted
  assert found.is_certain


@pytest.mark.parametrize(
  "environment, flags, parts",
  [
    ({}, ("a:1",), ["--num_processes and --process_id are missing"]),
    ({}, (None, 2, 0), ["--coordinator_address is missing"]),
    ({}, ("a:1", None, 0), ["--num_processes is missing"]),
    ({"JAX_PROCESS_ID": "1"}, ("a:1",), ["--num_processes is missing"]),
    (
      {"JAX_COORDINATOR_ADDRESS": "a:1"},
      (),
      ["JAX_NUM_PROCESSES", "--num_processes and --process_id are missing"],
    ),
    ({}, ("a", 2, 0), ["'a'", "HOST:PORT"]),
    ({}, ("a:1", 2, 2), ["--process_id is 2", "from 0 to 1"]),
    ({}, ("a:1", 2, -1), ["--process_id is -1"]),
    ({}, ("a:1", 0, 0), ["--num_processes is 0"]),
    ({"JAX_NUM_PROCESSES": "two"}, ("a:1",), ["JAX_NUM_PROCESSES is 'two'"]),
    (OPEN_MPI_5, (), ["8 processes", "--coordinator_address"]),
  ],
)
def test_what_is_not_whole_is_one_sentence(environment, flags, parts):
  with pytest.raises(cluster.ClusterError) as error:
    cluster.find(NO_TPU | environment, *flags)
  assert "\n" not in str(error.value)
  for part in parts:
    assert part in str(error.value)


def test_a_slurm_job_without_srun_is_told(caplog):
  environment = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}
  with caplog.at_level(logging.WARNING):
    assert cluster.find(NO_TPU | environment) is None
  assert "srun did not start this process" in caplog.text


@pytest.mark.parametrize(
  "changes, all_devices",
  [
    ({}, True),
    ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, False),
    ({"SLURM_STEP_TASKS_PER_NODE": "2,1(x2)"}, False),
    ({"SLURM_STEP_TASKS_PER_NODE": "1,1(x3)"}, True),
    # Each task sees a GPU of its own.
    (
      {"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "CUDA_VISIBLE_DEVICES": "5"},
      True,
    ),
    (
      {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "0,1"},
      False,
    ),
  ],
)
def test_the_only_task_of_a_machine_takes_all_its_devices(changes, all_devices):
  assert cluster.find(NO_TPU | SLURM | changes).all_devices is all_devices


def test_open_mpi_shares_a_machines_devices():
  assert cluster.find(NO_TPU | OPEN_MPI_4).all_devices is False
  alone = OPEN_MPI_4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
  assert cluster.find(NO_TPU | alone).all_devices is True


@pytest.fixture
def environment(monkeypatch):
  """The process's own, as on a machine without anything."""
  for name in os.environ:
    if name.startswith(("JAX_C", "JAX_N", "JAX_PROCESS", "SLURM", "OMPI")):
      monkeypatch.delenv(name)
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  return monkeypatch


def test_nothing_is_started_where_there_is_nobody(environment):
  environment.setattr(jax.distributed, "initialize", None)
  assert cluster.start() is None


def test_what_jax_is_told(environment):
  calls = []
  environment.setattr(
    jax.distributed, "initialize", lambda *a, **k: calls.append((a, k))
  )
  line = cluster.start("a:1", 3, 2, timeout=10)
  for name, value in SLURM.items():
    environment.setenv(name, value)
  cluster.start()
  (flags, some), (slurm, every) = calls
  assert flags == ("a:1", 3, 2) and slurm == (None, None, None)
  # None lets JAX decide; of an empty list it makes all that there are.
  assert some["local_device_ids"] is None
  assert every["local_device_ids"] == []
  assert "Process 0 of 1 (by flags): 1 of 1 devices, cpu" == line


@pytest.mark.parametrize("certain", [True, False])
def test_a_cluster_that_jax_does_not_find(environment, certain):
  def initialize(*_, **__):
    raise ValueError("coordinator_address should be defined")

  environment.setattr(jax.distributed, "initialize", initialize)
  environment.setenv("JAX_PLATFORMS", "tpu")
  environment.delenv("TPU_SKIP_MDS_QUERY")
  if not certain:  # A machine with a TPU that is no host of Google's.
    assert cluster.start() is None
    return
  environment.setenv("TPU_WORKER_HOSTNAMES", "a,b")
  with pytest.raises(cluster.ClusterError) as error:
    cluster.start()
  assert "TPU pod" in str(error.value)
  assert "coordinator_address should be defined." in str(error.value)


@pytest.mark.parametrize(
  "number, what",
  [(0, "not all of 2 processes had come"), (1, "process 0 did not answer")],
)
def test_others_that_do_not_come_end_it_with_a_sentence(number, what):
  address = pair.free_address()
  program = subprocess.run(
    [
      sys.executable,
      "-c",
      "from photochat_jax.runtime import cluster; "
      f"cluster.start({address!r}, 2, {number}, timeout=1)",
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert program.returncode == 76, program.stderr
  assert program.stderr.startswith("photochat_jax: After 1 seconds ")
  assert what in program.stderr and address in program.stderr
  assert program.stderr.count("\n") == 1


def test_one_process_is_the_first_and_all():
  done = []
  cluster.by_first("do it", lambda: done.append(1))
  assert done == [1] and cluster.is_first()
  assert cluster.text_of_first("häi") == "häi"
  assert cluster.texts_of_all("x") == ["x"]

  def fail():
    raise OSError("no disk")

  with pytest.raises(OSError, match="no disk"):
    cluster.by_first("fail", fail)
