"""Regex tables over parameter paths: the one way to speak about parameters.

Sharding, freezing, learning rates and weight decay are all tables of
`(regex, value)`. A parameter's path is its keys joined by '/', for example
`language_model/layers/self_attn/q_proj/kernel`. A regex must match the whole
path, the first row which does wins, and a parameter which no row matches is an
error naming it, so that a new layer cannot slip through unnoticed.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

# The mesh axes that divide a batch.
BATCH = ("data", "fsdp")


def _name(key: Any) -> str:
  for attribute in ("key", "name", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def path_of(key_path: Sequence[Any]) -> str:
  """Returns the path 'a/b/0' of a `jax.tree_util` key path."""
  return "/".join(_name(key) for key in key_path)


def flatten(tree: Any) -> dict[str, Any]:
  """Returns `{path: leaf}` for any pytree, in the tree's own order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path_of(key_path): leaf for key_path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the nested dict of `{path: leaf}`, the inverse of `flatten`."""
  tree = {}
  for path, leaf in leaves.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def match_paths(
  table: Sequence[tuple[str, Any]], paths: Iterable[str]
) -> dict[str, Any]:
  """Looks every path up in a table.

  Args:
    table: rows `(regex, value)`; the first whose regex matches a whole path
      gives that path's value.
    paths: the parameters' paths.

  Returns:
    `{path: value}` in the order of `paths`.

  Raises:
    ValueError: if paths are matched by no row; all of them are named.
  """
  rows = [(re.compile(regex), value) for regex, value in table]
  values, unmatched = {}, []
  for path in paths:
    for regex, value in rows:
      if regex.fullmatch(path):
        values[path] = value
        break
    else:
      unmatched.append(path)
  if unmatched:
    raise ValueError(
      f"No row of the table {[regex for regex, _ in table]} matches the "
      f"parameters {unmatched}; add a row whose regex matches the whole path."
    )
  return values


def match(table: Sequence[tuple[str, Any]], tree: Any) -> Any:
  """Returns a tree of the same structure whose leaves are the table's values.

  Args:
    table: as for `match_paths`.
    tree: any pytree; only its structure counts.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  paths = [path_of(key_path) for key_path, _ in leaves]
  values = match_paths(table, paths)
  return jax.tree_util.tree_unflatten(
    structure, [values[path] for path in paths]
  )


def select(
  regexes: Sequence[str], paths: Iterable[str]
) -> tuple[list[str], list[str]]:
  """Divides paths into those matched by any regex and the others.

  Args:
    regexes: each must match at least one whole path.
    paths: the parameters' paths.

  Returns:
    (matched, others), both in the order of `paths`.

  Raises:
    ValueError: if a regex matches nothing, which is a typing error in it.
  """
  paths = list(paths)
  for regex in regexes:
    if not any(re.fullmatch(regex, path) for path in paths):
      tops = sorted({path.split("/")[0] for path in paths})
      raise ValueError(
        f"The regex {regex!r} matches no parameter; it must match a whole "
        f"path, and the paths begin with {tops}."
      )
  matched = [p for p in paths if any(re.fullmatch(r, p) for r in regexes)]
  chosen = set(matched)
  return matched, [path for path in paths if path not in chosen]


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Says where an activation lies; its rows always over the batch's axes.

  Left to itself the compiler may divide an activation as the parameters beside
  it are, and then sends activations about instead of parameters.

  Args:
    x: rows first.
    *axes: mesh axes of the last dimensions, as many as there are given.

  Returns:
    x. Without a mesh (`jax.set_mesh`) nothing is said; an axis whose size does
    not divide its dimension is left out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  middle = (None,) * (x.ndim - 1 - len(axes))
  spec = [
    axis if axis and not size % _ways(mesh, axis) else None
    for size, axis in zip(x.shape, (BATCH, *middle, *axes), strict=True)
  ]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _ways(mesh: Any, axis: str | tuple[str, ...]) -> int:
  names = (axis,) if isinstance(axis, str) else axis
  return math.prod(mesh.shape.get(name, 1) for name in names)
