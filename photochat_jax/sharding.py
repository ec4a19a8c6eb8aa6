"""Where every array lies: one mesh, and a table for the parameters.

The mesh has the axes `data` (the batch is divided, parameters are repeated),
`fsdp` (the batch and the parameters are divided) and `tensor` (heads, hidden
widths and the vocabulary are divided). XLA puts in the communication.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from photochat_jax.config import ConfigError, StageConfig
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


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Lays devices out; one of the sizes may be -1 for what is left.

  Args:
    data: size of the first axis.
    fsdp: size of the second one.
    tensor: size of the third one.
    devices: all there are, of all processes, if not given.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices, or `data`
      is no multiple of the number of TPU slices.
  """
  devices = jax.devices() if devices is None else devices
  shape, count = [data, fsdp, tensor], len(devices)
  if shape.count(-1) == 1:
    known = math.prod(size for size in shape if size != -1)
    shape[shape.index(-1)] = count // known if known > 0 else 0
  if min(shape) < 1 or math.prod(shape) != count:
    raise ValueError(
      f"The mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit "
      f"{count} devices; the three must multiply to that, and one may be -1."
    )
  return Mesh(
    _lay_out(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def _lay_out(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Devices in the shape of a mesh, near ones beside each other.

  `jax.make_mesh` refuses GPUs of several machines and TPUs of several slices,
  and most of the ways to divide a TPU slice in two.
  """
  if devices[0].platform != "tpu":
    order = sorted(devices, key=lambda d: (d.process_index, d.id))
    return np.asarray(order).reshape(shape)
  split = {"allow_split_physical_axes": True}  # Only where it must be.
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, **split)
  data, fsdp, tensor = shape
  if data % slices:
    raise ValueError(
      f"The mesh's data={data} must be a multiple of the {slices} TPU slices, "
      "which only a slow network joins: parameters are divided within a slice."
    )
  return mesh_utils.create_hybrid_device_mesh(
    (data // slices, fsdp, tensor), (slices, 1, 1), devices, **split
  )


def mesh_of(params: Any) -> Mesh | None:
  """The mesh that parameters lie on; None if they are not on one."""
  leaf = next(iter(jax.tree.leaves(params)), None)
  place = getattr(leaf, "sharding", None)
  return place.mesh if isinstance(place, NamedSharding) else None


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


def batch_ways(mesh: Mesh) -> int:
  """Ways in which the rows of a batch are divided."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(stage: StageConfig, mesh: Mesh) -> None:
  """Checks that a stage's rows, or parts of them, divide over the devices.

  Raises:
    ConfigError: they do not.
  """
  ways = batch_ways(mesh)
  if stage.batch_size % (ways * stage.accumulate):
    raise ConfigError(
      f"config.stages.{stage.name}.batch_size is {stage.batch_size}; it must "
      f"be a multiple of {ways} (mesh.data x mesh.fsdp) times accumulate, "
      f"{stage.accumulate}."
    )


def rows_here(mesh: Mesh, batch_size: int) -> list[int]:
  """The rows of a global batch that this process's devices hold.

  Processes between which only `tensor` is divided hold the same rows.

  Raises:
    ValueError: the rows cannot be divided evenly.
  """
  ways = batch_ways(mesh)
  if batch_size % ways:
    raise ValueError(
      f"A batch of {batch_size} rows cannot be divided over {ways} devices; "
      "make the stage's batch_size a multiple of mesh.data x mesh.fsdp."
    )
  each = batch_size // ways
  return [
    row
    for part in _parts_here(mesh)
    for row in range(part * each, (part + 1) * each)
  ]


def _parts_here(mesh: Mesh) -> list[int]:
  """Which of a batch's `batch_ways` parts this process's devices hold."""
  groups = mesh.devices.reshape(batch_ways(mesh), -1)
  here = jax.process_index()
  return [
    part
    for part, group in enumerate(groups)
    if any(device.process_index == here for device in group)
  ]


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """Moves this process's rows of a batch to its devices.

  Args:
    batch: arrays of the rows that `rows_here` names, in that order.
    mesh: of `make_mesh`.

  Raises:
    ValueError: if the global rows are not divided evenly.
  """
  sharding, parts = batch_sharding(mesh), _parts_here(mesh)
  count = len(next(iter(batch.values())))
  if count % len(parts):
    raise ValueError(
      f"A batch of {count} rows cannot be divided over {len(parts)} devices; "
      "make the stage's batch_size a multiple of mesh.data x mesh.fsdp."
    )
  each = count // len(parts)
  total = each * batch_ways(mesh)
  # Where each part's rows begin in the arrays at hand.
  first = {part * each: place * each for place, part in enumerate(parts)}

  def place(array):
    def rows(index):
      start = first[index[0].start or 0]
      return array[start : start + each]

    shape = (total, *array.shape[1:])
    return jax.make_array_from_callback(shape, sharding, rows)

  return {name: place(array) for name, array in batch.items()}


def place_rows(batch: Any, mesh: Mesh | None) -> Any:
  """Puts whole batches, the same on every process, on the devices.

  Args:
    batch: tree of arrays with the rows first.
    mesh: where it goes; None, or a mesh of one device, leaves it alone.

  Returns:
    The tree; rows are divided where they divide evenly, else repeated.
  """
  if mesh is None or mesh.size == 1:
    return batch
  repeated = NamedSharding(mesh, PartitionSpec())

  def place(array):
    array = np.asarray(array)
    divides = array.ndim and not len(array) % batch_ways(mesh)
    return jax.make_array_from_callback(
      array.shape,
      batch_sharding(mesh) if divides else repeated,
      lambda index: array[index],
    )

  return jax.tree.map(place, batch)


def to_host(tree: Any) -> Any:
  """Numpy arrays of a tree, whole on every process; all processes must ask."""

  def fetch(leaf):
    if isinstance(leaf, jax.Array) and not (
      leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
      return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)

  return jax.tree.map(fetch, tree)


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
  """`jax.set_mesh`, where there is a mesh of several devices."""
  if mesh is None or mesh.size == 1:
    return contextlib.nullcontext()
  return jax.set_mesh(mesh)
