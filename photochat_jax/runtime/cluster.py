"""How the processes of a run find each other, and what they do together.

`start` is called once, before anything touches a device. Who the others are
is said by flags, by the environment of whatever started the processes, or by
nobody: then there is one process. What `jax.distributed.initialize` finds out
itself is left to it: a TPU pod's and GKE's hosts, SLURM's and Open MPI's
tasks.

The other functions are for what only one process may do, such as writing a
file: all processes call them, in the same order.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from photochat_jax.runtime.watchdog import STUCK

TIMEOUT = 300
"""Seconds that processes wait for each other at the start."""

# What srun sets for each task, and JAX needs.
_SLURM = (
  "SLURM_JOB_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_NTASKS",
  "SLURM_PROCID",
  "SLURM_LOCALID",
)


class ClusterError(ValueError):
  """Processes that do not come together; the message is one sentence."""


class Cluster(NamedTuple):
  """What says that there are other processes, and what it says.

  Attributes:
    name: of what says so.
    address: HOST:PORT of process 0; None where JAX finds it out, likewise the
      next two.
    processes: how many there are.
    process: which one this is.
    all_devices: whether this process takes every device that it sees, where
      JAX would give it one.
    is_certain: whether there must be others.
  """

  name: str
  address: str | None = None
  processes: int | None = None
  process: int | None = None
  all_devices: bool = False
  is_certain: bool = True


def find(
  environment: Mapping[str, str],
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Cluster | None:
  """Looks for other processes.

  Args:
    environment: the environment's variables. `JAX_COORDINATOR_ADDRESS`,
      `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` stand for the flags.
    coordinator_address: of process 0, by flag, and so on.
    num_processes: how many there are.
    process_id: which one this is.

  Returns:
    What was found; None for a process that is alone.

  Raises:
    ClusterError: flags, or the variables in their place, are not whole.
  """
  given = {
    "coordinator_address": coordinator_address
    or environment.get("JAX_COORDINATOR_ADDRESS")
    or None,
    "num_processes": _number(environment, "JAX_NUM_PROCESSES", num_processes),
    "process_id": _number(environment, "JAX_PROCESS_ID", process_id),
  }
  launcher = _find_launcher(environment)
  if all(value is None for value in given.values()):
    if launcher and launcher.name == "Open MPI":
      _check_open_mpi(environment)
    return launcher
  if given["coordinator_address"] is not None:
    # What others call the same; JAX finds the rest.
    for name, variables in (
      ("num_processes", ("OMPI_COMM_WORLD_SIZE",)),
      ("process_id", ("OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX")),
    ):
      for variable in variables:
        given[name] = _number(environment, variable, given[name])
  lacking = [f"--{name}" for name, value in given.items() if value is None]
  # Kubernetes answers through a library of its own, which JAX asks.
  if lacking and not launcher and "KUBERNETES_SERVICE_HOST" not in environment:
    raise ClusterError(
      "To join other processes give --coordinator_address=HOST:PORT, "
      "--num_processes and --process_id, or JAX_COORDINATOR_ADDRESS, "
      f"JAX_NUM_PROCESSES and JAX_PROCESS_ID; {' and '.join(lacking)} "
      f"{'is' if len(lacking) == 1 else 'are'} missing."
    )
  _check(*given.values())
  return Cluster(
    "flags" if coordinator_address else "JAX_COORDINATOR_ADDRESS",
    *given.values(),
    all_devices=_takes_all(environment),
  )


def _number(
  environment: Mapping[str, str], name: str, given: int | None
) -> int | None:
  """What was given, else the variable's number."""
  text = environment.get(name)
  if given is not None or not text:
    return given
  try:
    return int(text)
  except ValueError as error:
    raise ClusterError(f"{name} is {text!r} and must be a number.") from error


def _check(address: str | None, count: int | None, number: int | None) -> None:
  if address is not None and not address.rpartition(":")[2].isdigit():
    raise ClusterError(
      f"The coordinator's address is {address!r}; it must be HOST:PORT."
    )
  if count is not None and count < 1:
    raise ClusterError(f"--num_processes is {count} and must be at least 1.")
  if number is not None and not 0 <= number < (count or number + 1):
    last = "" if count is None else f" to {count - 1}"
    raise ClusterError(
      f"--process_id is {number}; processes are numbered from 0{last}."
    )


def _find_launcher(environment: Mapping[str, str]) -> Cluster | None:
  """What the environment of a launcher or of a pod says."""
  if _tasks(environment, "OMPI_COMM_WORLD_SIZE") > 1:
    return Cluster("Open MPI", all_devices=_takes_all(environment))
  if _tasks(environment, "SLURM_NTASKS") > 1:
    if all(name in environment for name in _SLURM):
      return Cluster("SLURM", all_devices=_takes_all(environment))
    logging.warning(
      "This SLURM job has %s tasks and srun did not start this process, which "
      "goes on alone.",
      environment["SLURM_NTASKS"],
    )
    return None
  platforms = environment.get("JAX_PLATFORMS", "tpu")
  if "tpu" not in platforms.split(","):
    return None
  hosts = environment.get(
    "TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES")
  )
  if environment.get("MEGASCALE_COORDINATOR_ADDRESS") or "," in (hosts or ""):
    return Cluster("TPU pod")
  # JAX, when it is imported, sets this where it sees no TPU. A host of a Cloud
  # TPU pod need not have its hosts' names in the environment: JAX asks the
  # metadata server for them.
  if hosts is None and "TPU_SKIP_MDS_QUERY" not in environment:
    return Cluster("TPU host", is_certain=False)
  return None


def _tasks(environment: Mapping[str, str], name: str) -> int:
  return _number(environment, name, None) or 1


def _check_open_mpi(environment: Mapping[str, str]) -> None:
  if "OMPI_MCA_orte_hnp_uri" not in environment:  # Open MPI 5 has it no more.
    raise ClusterError(
      f"Open MPI started {environment['OMPI_COMM_WORLD_SIZE']} processes and "
      "does not say where the first one is; give --coordinator_address="
      "HOST:PORT, with its host and a free port there."
    )


def _takes_all(environment: Mapping[str, str]) -> bool:
  """Whether a task of SLURM or Open MPI is to use all devices that it sees.

  JAX gives a task the GPU of its number on the machine. That is wrong for the
  only task of a machine, which would leave the others idle, and for one that
  sees no GPU but its own.
  """
  if len(environment.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1:
    return True
  if "SLURM_STEP_TASKS_PER_NODE" in environment:  # As '2(x3),1'.
    tasks = environment["SLURM_STEP_TASKS_PER_NODE"].split(",")
    return all(group.partition("(")[0] == "1" for group in tasks)
  return environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def start(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout: int = TIMEOUT,
) -> str | None:
  """Joins the other processes, where there are any to join.

  Compiler flags must be set before: it looks at the devices.

  Args:
    coordinator_address: HOST:PORT of process 0, any free port there; see
      `find` for what is not given.
    num_processes: how many there are.
    process_id: which one this is, from 0.
    timeout: seconds to wait for the others.

  Returns:
    Which process this is and what devices there are, to be told; None for a
    process that is alone.

  Raises:
    ClusterError: what was given is not whole, or the others are not found.
      Where they are found and do not come, the process ends with a sentence
      and the exit code `watchdog.STUCK`, start all again: JAX would abort it.
  """
  cluster = find(os.environ, coordinator_address, num_processes, process_id)
  if cluster is None:
    return None
  try:
    with _time_limit(cluster, timeout):
      jax.distributed.initialize(
        cluster.address,
        cluster.processes,
        cluster.process,
        # An empty list is every device, None what JAX thinks right.
        local_device_ids=[] if cluster.all_devices else None,
        initialization_timeout=timeout + 60,
      )
  except Exception as error:  # JAX, its plug-ins and sockets raise anything.
    # With its service or client begun, it is no longer a process alone.
    if cluster.is_certain or jax.distributed.is_initialized():
      raise ClusterError(
        f"The other processes, of which {cluster.name} tells, cannot be "
        f"joined: {_one_line(error)} Give --coordinator_address=HOST:PORT, "
        "--num_processes and --process_id."
      ) from error
    logging.info("No other hosts of this TPU were found: %s", error)
    return None
  line = (
    f"Process {jax.process_index()} of {jax.process_count()} (by "
    f"{cluster.name}): {jax.local_device_count()} of {jax.device_count()} "
    f"devices, {jax.local_devices()[0].device_kind}"
  )
  logging.info("%s", line)
  return line


def _one_line(error: Exception) -> str:
  text = " ".join(str(error).split()) or type(error).__name__
  return text if text.endswith(".") else f"{text}."


@contextlib.contextmanager
def _time_limit(cluster: Cluster, seconds: int) -> Iterator[None]:
  """Ends the process with a sentence if the block takes longer."""

  def give_up():
    at = f" at {cluster.address}" if cluster.address else ""
    if cluster.process:
      what = f"process 0 did not answer{at}"
    else:
      number = cluster.processes or "the"
      what = f"not all of {number} processes had come together{at}"
    sys.stderr.write(
      f"photochat_jax: After {seconds} seconds {what}; start the same command "
      "for every process, and see that each can reach the first one.\n"
    )
    sys.stderr.flush()
    os._exit(STUCK)

  timer = threading.Timer(seconds, give_up)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def is_first() -> bool:
  """Whether this is process 0, which writes and tells."""
  return jax.process_index() == 0


def by_first(what: str, do: Callable[[], Any]) -> None:
  """Lets process 0 do something while the others wait.

  Args:
    what: it does, for the error of the others.
    do: it; what it returns is dropped.

  Raises:
    ClusterError: on the others, where it failed on process 0; there the error
      is its own.
  """
  failed: Exception | None = None
  if is_first():
    try:
      do()
    except Exception as error:  # Raised below, when the others know.
      failed = error
  if jax.process_count() > 1:
    flag = multihost_utils.broadcast_one_to_all(np.int32(failed is not None))
    if flag and failed is None:
      raise ClusterError(f"Process 0 could not {what}; it says why.")
  if failed is not None:
    raise failed


def text_of_first(text: str) -> str:
  """The text that process 0 called this with, on all processes."""
  if jax.process_count() == 1:
    return text
  content = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
  if not is_first():
    content = np.zeros(size, np.uint8)
  content = multihost_utils.broadcast_one_to_all(content)
  return content.tobytes().decode("utf-8", "surrogatepass")


def texts_of_all(text: str) -> list[str]:
  """The texts of all processes, by their number, on all of them."""
  if jax.process_count() == 1:
    return [text]
  content = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(content)))
  padded = np.zeros(max(1, sizes.max()), np.uint8)
  padded[: len(content)] = content
  rows = multihost_utils.process_allgather(padded)
  return [
    row[:size].tobytes().decode("utf-8", "surrogatepass")
    for row, size in zip(rows, sizes, strict=True)
  ]
