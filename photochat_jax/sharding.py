"""Where every array lies: one mesh, and a table for the parameters.

The mesh has the axes `data` (the batch is divided, parameters are repeated),
`fsdp` (the batch and the parameters are divided) and `tensor` (heads, hidden
widths and the vocabulary are divided). XLA puts in the communication.
"""

import math
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from photochat_jax.ops import partition

AXES = ("data", "fsdp", "tensor")

# (path regex, axes of the LAST dimensions); the leading ones (layers, a
# convolution's window) are repeated. First match wins.
RULES = (
  # Small: repeated.
  (".*/(bias|scale|lora_scale)", ()),
  (".*/(class_embedding|query_tokens)", ("fsdp",)),
  (".*/position_embedding(/embedding)?", (None, "fsdp")),
  # The vocabulary by `tensor`: a loss over it needs only sums.
  (".*/(embed_tokens|token_embedding)/embedding", ("tensor", "fsdp")),
  # The second kernel of an attention or an MLP takes in what the first ones
  # gave out by `tensor`: between the two nothing is communicated.
  (".*/(o_proj|out_proj|projection|to_out_0)/kernel", ("tensor", "fsdp")),
  (".*/(down_proj|fc2|net_2)/kernel", ("tensor", "fsdp")),
  (".*/(output|output_query)/dense/kernel", ("tensor", "fsdp")),
  # LoRA as its kernel, but for the rank.
  (".*/(o_proj|to_out_0|down_proj|net_2)/lora_a", ("tensor", None)),
  (".*/(o_proj|to_out_0|down_proj|net_2)/lora_b", (None, "fsdp")),
  (".*/lora_a", ("fsdp", None)),
  (".*/lora_b", (None, "tensor")),
  # First kernels, the language model's head, and convolutions.
  (".*/kernel", ("fsdp", "tensor")),
)


def start_distributed() -> None:
  """Joins the other processes where there are any to join.

  `jax.distributed.initialize` fails on a single machine, so it is called only
  on a TPU pod, in a SLURM job of several tasks, or where the coordinator's
  address is given by JAX_COORDINATOR_ADDRESS.
  """
  hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
  if (
    "," in hosts
    or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    or "JAX_COORDINATOR_ADDRESS" in os.environ
    or int(os.environ.get("SLURM_NTASKS", "1")) > 1
  ):
    jax.distributed.initialize()


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """Lays all devices out; one of the sizes may be -1 for what is left.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  shape, count = [data, fsdp, tensor], jax.device_count()
  if shape.count(-1) == 1:
    known = math.prod(size for size in shape if size != -1)
    shape[shape.index(-1)] = count // known if known > 0 else 0
  if min(shape) < 1 or math.prod(shape) != count:
    raise ValueError(
      f"The mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit "
      f"{count} devices; the three must multiply to that, and one may be -1."
    )
  return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def spec_of(
  axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh
) -> PartitionSpec:
  """Aligns a rule to the last dimensions of an array.

  Args:
    axes: mesh axes of the last dimensions.
    shape: of the array; a rule longer than it loses its first axes.
    mesh: an axis whose size does not divide its dimension is left out, so that
      any model runs on any mesh.

  Returns:
    The array's PartitionSpec.
  """
  axes = axes[len(axes) - min(len(axes), len(shape)) :]
  padded = (None,) * (len(shape) - len(axes)) + tuple(axes)
  kept = [
    axis if axis and size % mesh.shape[axis] == 0 else None
    for axis, size in zip(padded, shape, strict=True)
  ]
  return PartitionSpec(*kept)


def shardings(params: Any, mesh: Mesh) -> Any:
  """Returns a NamedSharding for every parameter, in a tree like `params`.

  Args:
    params: nested dict of parameters or their shapes.
    mesh: of `make_mesh`.

  Raises:
    ValueError: naming the parameters which no rule matches.
  """
  rules = partition.match_paths(RULES, partition.flatten(params))
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(
      mesh, spec_of(rules[partition.path_of(path)], leaf.shape, mesh)
    ),
    params,
  )


def state_shardings(state: Any, mesh: Mesh) -> Any:
  """Returns a NamedSharding for every leaf of a `TrainState`.

  A moment or an average lies where its parameter does: it is recognised by
  the parameter's path at the end of its own. Everything else is repeated.
  """
  params = partition.flatten(shardings(state.params, mesh))
  repeated = NamedSharding(mesh, PartitionSpec())

  def of(key_path, leaf):
    names = partition.path_of(key_path).split("/")
    for start in range(1, len(names)):
      found = params.get("/".join(names[start:]))
      if found is not None and leaf.ndim:
        return found
    return repeated

  return jax.tree_util.tree_map_with_path(of, state)


def shard_state(state: Any, mesh: Mesh) -> Any:
  """Moves a state to where `state_shardings` says."""
  return jax.device_put(state, state_shardings(state, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch's arrays: rows over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """Moves this process's rows of a batch to its devices.

  Args:
    batch: arrays with the rows first, this process's share of the global
      batch.
    mesh: of `make_mesh`.

  Raises:
    ValueError: if the global rows are not divided evenly.
  """
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  rows = len(next(iter(batch.values()))) * jax.process_count()
  if rows % ways:
    raise ValueError(
      f"A batch of {rows} rows cannot be divided over {ways} devices; make "
      "the stage's batch_size a multiple of mesh.data x mesh.fsdp."
    )
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, array)
    for name, array in batch.items()
  }
