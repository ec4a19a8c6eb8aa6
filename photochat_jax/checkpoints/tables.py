"""Strict conversion tables: whose tensor lies where in our parameters.

A table has a row for each kind of parameter: a regex over our paths, the name
that Hugging Face gives it, and how the values lie. Both directions follow from
it. Every parameter needs exactly one row, every tensor of a file exactly one
parameter, and the shapes must agree; whatever does not is collected and told
at once.

Layers that are scanned here are one array with a leading layer axis, and
separate tensors there: `{layer}` in a row's key.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.checkpoints.table_error import TableError, grouped
from photochat_jax.ops import partition


@dataclasses.dataclass(frozen=True)
class Transform:
  """How the values of one tensor, or of one layer, lie here and there.

  Attributes:
    read: (their tensor, our array to be filled).
    write: our array -> their tensor, as a view where there is one.
  """

  read: Callable[[np.ndarray, np.ndarray], None]
  write: Callable[[np.ndarray], np.ndarray]


def _permuted(
  ours: Callable[[np.ndarray], np.ndarray],
  theirs: Callable[[np.ndarray], np.ndarray],
) -> Transform:
  return Transform(
    lambda tensor, out: np.copyto(out, ours(tensor), casting="unsafe"), theirs
  )


SAME = _permuted(lambda x: x, lambda x: x)
"""Biases, scales of norms, embedding tables."""

DENSE = _permuted(np.transpose, np.transpose)
"""A torch Linear's (out, in) and our (in, out)."""

CONV = _permuted(
  lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
"""A torch Conv2d's (out, in, h, w) and our (h, w, in, out)."""

POINTWISE = _permuted(
  lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]
)
"""A torch 1x1 Conv2d and our dense (in, out)."""


def patches(size: int) -> Transform:
  """A convolution (D, 3, size, size) there, a product over patches here."""

  def read(tensor, out):
    out[:] = tensor.transpose(2, 3, 1, 0).reshape(out.shape)

  def write(array):
    return array.reshape(size, size, 3, -1).transpose(3, 2, 0, 1)

  return Transform(read, write)


@dataclasses.dataclass(frozen=True)
class Row:
  r"""One kind of parameter.

  Attributes:
    path: regex over our whole path.
    key: their name: `\1` is the regex's first group, `{layer}` the number of
      the layer; or a function of our path.
    transform: how the values lie.
    layers: numbers of the layers that our leading axis holds, in its order;
      None where there is no such axis.
  """

  path: str
  key: str | Callable[[str], str]
  transform: Transform = SAME
  layers: Sequence[int] | None = None


def module_key(path: str) -> str:
  """The key of a parameter which is named as in torch but for punctuation.

  `up_blocks_0/resnets_1/conv1/kernel` is `up_blocks.0.resnets.1.conv1.weight`
  there; only diffusers' `linear_1` has a number that is no list index.
  """
  *modules, leaf = path.split("/")
  names = [re.sub(r"(?<!linear)_(\d+)$", r".\1", name) for name in modules]
  return ".".join([*names, "bias" if leaf == "bias" else "weight"])


def module_rows(kernels: Iterable[tuple[str, Transform]]) -> tuple[Row, ...]:
  """Rows for parameters that `module_key` names.

  Args:
    kernels: (regex over the modules' paths, how their kernels lie).
  """
  return (
    *(
      Row(f"(?:{path})/kernel", module_key, transform)
      for path, transform in kernels
    ),
    Row(r".*/(scale|bias)", module_key),
  )


def vision_layers(layers: Sequence[int]) -> tuple[Row, ...]:
  """The rows of the layers of transformers' vision towers, CLIP's and BLIP-2's.

  Args:
    layers: their numbers.
  """
  norm = r"vision_model/layers/(layer_norm\d)"
  dense = r"vision_model/layers/(self_attn|mlp)/(\w+)"
  theirs = r"vision_model.encoder.layers.{layer}.\1"
  return (
    Row(f"{norm}/scale", f"{theirs}.weight", layers=layers),
    Row(f"{norm}/bias", f"{theirs}.bias", layers=layers),
    Row(f"{dense}/kernel", rf"{theirs}.\2.weight", DENSE, layers),
    Row(f"{dense}/bias", rf"{theirs}.\2.bias", layers=layers),
  )


@dataclasses.dataclass(frozen=True)
class Table:
  """The rows of one part of the model.

  Attributes:
    name: what errors call the part.
    rows: every parameter must match exactly one.
    aliases: (regex, replacement) for keys that other versions of a file
      spell differently; each is applied where it matches.
    ignored: regexes of whole keys that are not ours to load.
  """

  name: str
  rows: tuple[Row, ...]
  aliases: tuple[tuple[str, str], ...] = ()
  ignored: tuple[str, ...] = ()

  def canonical(self, key: str) -> str:
    """Their key as `rows` spell it."""
    for regex, replacement in self.aliases:
      key = re.sub(regex, replacement, key)
    return key

  def ignores(self, key: str) -> bool:
    """Whether a key, as it is spelt, is not ours to load."""
    key = self.canonical(key)
    return any(re.fullmatch(regex, key) for regex in self.ignored)


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor.

  Attributes:
    key: its canonical name there.
    path: the parameter here.
    index: which layer of the parameter's leading axis, or None.
    transform: how the values lie.
    shape: there.
  """

  key: str
  path: str
  index: int | None
  transform: Transform
  shape: tuple[int, ...]


def entries(table: Table, abstract: Any) -> dict[str, Entry]:
  """Expands a table over a model's parameters.

  Args:
    table: the table.
    abstract: nested dict of what has a shape: arrays, or the result of
      `jax.eval_shape`.

  Returns:
    An entry for each tensor of the other side, by its key.

  Raises:
    ValueError: a mistake in the table: a parameter with no row, with two rows,
      or two with the same key.
  """
  found: dict[str, Entry] = {}
  for path, leaf in partition.flatten(abstract).items():
    matches = [
      (row, match)
      for row in table.rows
      if (match := re.fullmatch(row.path, path))
    ]
    if len(matches) != 1:
      raise ValueError(
        f"{len(matches)} rows of the table of {table.name} match {path}; "
        "exactly one must."
      )
    row, match = matches[0]
    shape, layers = tuple(leaf.shape), row.layers
    if layers is not None:
      if shape[0] != len(layers):
        raise ValueError(
          f"{path} has {shape[0]} layers and its row in the table of "
          f"{table.name} names {len(layers)}."
        )
      shape = shape[1:]
    # No memory: one zero, seen as an array of that shape.
    zeros = np.broadcast_to(np.zeros((), np.int8), shape)
    shape = row.transform.write(zeros).shape
    template = row.key(path) if callable(row.key) else match.expand(row.key)
    for index, layer in enumerate([None] if layers is None else layers):
      key = template.replace("{layer}", str(layer))
      if key in found:
        raise ValueError(f"{path} and {found[key].path} both come from {key}.")
      index = None if layers is None else index
      found[key] = Entry(key, path, index, row.transform, shape)
  return found


def match(
  table: Table, abstract: Any, tensors: Mapping[str, Any]
) -> tuple[dict[str, Entry], dict[str, str]]:
  """Holds a file's tensors against a model, reading no values.

  Args:
    table: the table.
    abstract: as for `entries`.
    tensors: by name, things with a shape and a dtype.

  Returns:
    The entries by canonical key, and the file's own name of each.

  Raises:
    TableError: with every key that is missing, unknown, twice there or of
      another shape or type.
  """
  wanted = entries(table, abstract)
  names, extra, twice = {}, [], []
  stored = collections.defaultdict(list)
  for name in tensors:
    key = table.canonical(name)
    if key in names:
      twice.append(name)
    elif key in wanted:
      names[key] = name
    elif not table.ignores(key):
      extra.append(name)
  misshapen = []
  for key, name in names.items():
    shape = tuple(tensors[name].shape)
    if shape != wanted[key].shape:
      misshapen.append((name, shape, wanted[key].shape))
    try:
      _ = tensors[name].dtype
    except WeightsError:
      stored[tensors[name].stored].append(name)
  missing = [key for key in wanted if key not in names]
  faults = [
    f"{grouped(keys)} stored as {kind}, but only float32, float16 and bfloat16"
    " can be read, nothing quantised"
    for kind, keys in stored.items()
  ]
  if twice:
    faults.append(f"{grouped(twice)} there a second time by another name")
  if missing or extra or misshapen or faults:
    error = TableError(table.name, missing, extra, misshapen, faults)
    if details := error.details():
      logging.error("What does not fit:\n%s", details)
    raise error
  return wanted, names


def read(
  table: Table,
  abstract: Any,
  tensors: Mapping[str, Any],
  dtype: Any = None,
  place: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> dict[str, Any]:
  """Reads the parameters of a part, a tensor at a time.

  Args:
    table: the table.
    abstract: as for `entries`.
    tensors: by name, arrays or `files.Tensor`s.
    dtype: of the parameters; None keeps that of the tensors (the widest,
      where the layers of one parameter differ).
    place: what becomes of each finished parameter, for example
      `jax.device_put` with its sharding.

  Returns:
    Nested dict like `abstract`.

  Raises:
    TableError: the tensors do not fit, see `match`.
    WeightsError: a value is NaN or infinite.
  """
  wanted, names = match(table, abstract, tensors)
  by_path = collections.defaultdict(list)
  for entry in wanted.values():
    by_path[entry.path].append(entry)

  def filled(path, shape):
    stored = [np.dtype(tensors[names[e.key]].dtype) for e in by_path[path]]
    out = np.empty(shape, dtype or _widest(stored))
    for entry in by_path[path]:
      name = names[entry.key]
      tensor = np.asarray(tensors[name])
      if not _finite(tensor):
        raise WeightsError(
          f"{name} in the weights of {table.name} has values that are NaN or "
          "infinite; fetch them again, or take another checkpoint."
        )
      layer = out if entry.index is None else out[entry.index]
      entry.transform.read(tensor, layer)
      del tensor  # Before the next one is read.
    return out

  # No name for the array here: it is gone before the next one is made.
  return partition.unflatten(
    {
      path: place(path, filled(path, leaf.shape))
      for path, leaf in partition.flatten(abstract).items()
    }
  )


def write(table: Table, params: Any) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (their key, their tensor) for a part's parameters.

  Args:
    table: the table.
    params: nested dict of arrays; one at a time is brought to the host.
  """
  leaves = partition.flatten(params)
  path, array = None, None
  # Entries come parameter by parameter, each with all its layers.
  for entry in entries(table, params).values():
    if entry.path != path:
      path, array = entry.path, np.asarray(leaves[entry.path])
    layer = array if entry.index is None else array[entry.index]
    yield entry.key, entry.transform.write(layer)


def _widest(dtypes: Sequence[np.dtype]) -> np.dtype:
  """What holds all of them; the two half precisions meet in float32."""
  if len(set(dtypes)) == 1:
    return dtypes[0]
  return np.result_type(np.float32, *(d for d in dtypes if d.itemsize > 2))


def _finite(array: np.ndarray) -> bool:
  """Whether all values are finite, at the speed of memory.

  The bits of floats, read as integers, are in the order of their sizes: the
  positive ones signed, the negative ones unsigned.
  """
  if np.issubdtype(array.dtype, np.integer):
    return True
  signed, unsigned = (f"{kind}{array.dtype.itemsize}" for kind in "iu")
  limit = np.array([np.inf, -np.inf], array.dtype)
  return bool(
    array.view(signed).max(initial=0) < limit.view(signed)[0]
    and array.view(unsigned).max(initial=0) < limit.view(unsigned)[1]
  )
