"""LoRA's two matrices, between their layout and ours.

There every module has `down` (r, in) and `up` (out, r), ranks as they please.
Here layers that are stacked share arrays: ranks are filled up with zeros, which
stay zeros in training, and a layer without LoRA has the scale 0. On the way
back the zeros and those layers are left out again.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from safetensors import numpy as safetensors_numpy

from photochat_jax.checkpoints import lora_settings, tables
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.models import lora
from photochat_jax.ops import partition


@dataclasses.dataclass(frozen=True)
class Factors:
  """The change to one module's kernel, scale * up @ down.

  Attributes:
    down: (r, in), an array or a `files.Tensor`. Files of 1x1 convolutions have
      two more axes of one.
    up: (out, r), likewise.
    scale: of the product.
  """

  down: Any
  up: Any
  scale: float

  @property
  def rank(self) -> int:
    """r."""
    return self.down.shape[0]


@dataclasses.dataclass
class Faults:
  """What is wrong with a file, collected to be told at once.

  Attributes:
    name: what the file is called.
    missing: see `tables.TableError`; so are the others.
    extra: see there.
    misshapen: see there.
    told: parts of a sentence.
  """

  name: str
  missing: list = dataclasses.field(default_factory=list)
  extra: list = dataclasses.field(default_factory=list)
  misshapen: list = dataclasses.field(default_factory=list)
  told: list = dataclasses.field(default_factory=list)

  def check(self) -> None:
    """Raises a `TableError` if anything is."""
    faults = self.missing, self.extra, self.misshapen, self.told
    if any(faults):
      raise tables.TableError(self.name, *faults)


def dense_modules(
  wanted: Mapping[str, tables.Entry],
) -> dict[str, tables.Entry]:
  """Of a table's entries the dense kernels, by their modules' names."""
  return {
    key.removesuffix(".weight"): entry
    for key, entry in wanted.items()
    if entry.path.endswith("/kernel") and entry.shape[2:] in ((), (1, 1))
  }


def expect(
  modules: Mapping[str, tables.Entry],
  settings: lora_settings.Settings,
  found: Mapping[str, Any],
  faults: Faults,
) -> None:
  """Notes the modules that an adapter says it has and its file lacks."""
  faults.missing += [
    f"{module}.lora_{letter}.weight"
    for module in modules
    if module not in found and settings.targets_module(module)
    for letter in "AB"
  ]


def pair(
  found: Mapping[str, Mapping[str, str]],
  tensors: Mapping[str, Any],
  modules: Mapping[str, tables.Entry],
  faults: Faults,
) -> dict[str, tuple[Any, Any]]:
  """Holds every module's two matrices against its kernel.

  Args:
    found: for each module the tensors' names, by 'down' and 'up'.
    tensors: by name; no values are read.
    modules: of `dense_modules`.
    faults: gets what is wrong.

  Returns:
    (down, up) of each module where nothing is.
  """
  pairs = {}
  for module, names in found.items():
    for kind, letter in (("down", "A"), ("up", "B")):
      if kind not in names:
        faults.missing.append(f"{module}.lora_{letter}.weight")
    if not {"down", "up"} <= names.keys():
      continue
    features, width = modules[module].shape[:2]
    down, up = tensors[names["down"]], tensors[names["up"]]
    rank = max(down.shape[0], 1) if down.shape else 1
    fits = True
    for name, tensor, shape in (
      (names["down"], down, (rank, width)),
      (names["up"], up, (features, rank)),
    ):
      if tuple(tensor.shape) not in (shape, (*shape, 1, 1)):
        faults.misshapen.append((name, tuple(tensor.shape), shape))
        fits = False
    if fits:
      pairs[module] = down, up
  return pairs


def scaled(
  pairs: Mapping[str, tuple[Any, Any]],
  settings: lora_settings.Settings | None,
  faults: Faults,
) -> dict[str, Factors]:
  """Each pair with the scale that the settings give it, 1 without any."""
  factors, other = {}, []
  for module, (down, up) in pairs.items():
    rank = down.shape[0]
    if settings and settings.rank_of(module) != rank:
      other.append(
        f"{module} has the rank {rank} and not {settings.rank_of(module)}"
      )
    scale = settings.scale(module) if settings else 1.0
    factors[module] = Factors(down, up, scale)
  if other:
    more = f", and so {len(other) - 1} more" if other[1:] else ""
    faults.told.append(f"{other[0]} as its settings say{more}")
  return factors


def insert(
  params: Mapping[str, Any],
  modules: Mapping[str, tables.Entry],
  factors: Mapping[str, Factors],
  dtype: Any = None,
) -> dict[str, Any]:
  """Adds LoRA to a part's parameters.

  Args:
    params: without LoRA; only shapes are looked at.
    modules: of `dense_modules`.
    factors: by module.
    dtype: of A and B; None keeps that of the tensors.

  Returns:
    The parameters and the new leaves, in numpy.
  """
  leaves = partition.flatten(params)
  stacks = collections.defaultdict(list)
  for module, its in factors.items():
    stacks[modules[module].path].append((modules[module], its))
  for path, parts in stacks.items():
    *layers, width, features = leaves[path].shape
    rank = max(its.rank for _, its in parts)
    stored = {t.dtype for _, its in parts for t in (its.down, its.up)}
    kind = dtype or np.result_type(*stored)
    a = np.zeros((*layers, width, rank), kind)
    b = np.zeros((*layers, rank, features), kind)
    scale = np.zeros(layers, np.float32)
    for entry, its in parts:
      at = () if entry.index is None else entry.index
      down, up = values(its.down), values(its.up)
      a[at][:, : its.rank] = down.reshape(its.rank, width).T
      up = up.reshape(*up.shape[:2], *entry.shape[2:])
      entry.transform.read(up, b[at][: its.rank])
      scale[at] = its.scale
    new = zip(lora.LEAVES, (a, b, scale), strict=True)
    leaves |= {path.removesuffix("kernel") + name: leaf for name, leaf in new}
  return partition.unflatten(leaves)


def extract(
  params: Mapping[str, Any], table: tables.Table
) -> Iterator[tuple[str, Factors]]:
  """Yields every module that has LoRA, and its matrices in their layout.

  Args:
    params: of a part.
    table: of that part.
  """
  leaves = {
    path: np.asarray(leaf)
    for path, leaf in partition.flatten(params).items()
    if path.rpartition("/")[2] in lora.LEAVES
  }
  wanted = tables.entries(table, lora.strip(params))
  for module, entry in dense_modules(wanted).items():
    start = entry.path.removesuffix("kernel")
    if f"{start}lora_a" not in leaves:
      continue
    at = () if entry.index is None else entry.index
    a, b, scale = (leaves[start + name][at] for name in lora.LEAVES)
    if not scale:
      continue
    used = np.flatnonzero(a.any(0) | b.any(1))
    rank = used[-1] + 1 if used.size else 1
    down = a[:, :rank].T
    yield (
      module,
      Factors(
        down.reshape(*down.shape, *entry.shape[2:]),
        entry.transform.write(b[:rank]),
        float(scale),
      ),
    )


def replace(
  params: Mapping[str, Any],
  tensors: Mapping[str, Any],
  wanted: Mapping[str, tables.Entry],
) -> dict[str, Any]:
  """Puts whole parameters in the place of a part's own.

  Args:
    params: of the part.
    tensors: the new ones, by their canonical names.
    wanted: the part's entries.

  Returns:
    Parameters of the same shapes and dtypes; the new ones are numpy.
  """
  leaves = partition.flatten(params)
  by_path = collections.defaultdict(list)
  for key, tensor in tensors.items():
    by_path[wanted[key].path].append((wanted[key], tensor))
  for path, parts in by_path.items():
    leaf = leaves[path]
    # The old values count only where layers keep theirs.
    whole = len(parts) == (1 if parts[0][0].index is None else leaf.shape[0])
    out = np.empty(leaf.shape, leaf.dtype) if whole else np.array(leaf)
    for entry, tensor in parts:
      layer = out if entry.index is None else out[entry.index]
      entry.transform.read(values(tensor), layer)
    leaves[path] = out
  return partition.unflatten(leaves)


def values(tensor: Any) -> np.ndarray:
  """A tensor's values.

  Raises:
    WeightsError: one of them is no number.
  """
  array = np.asarray(tensor)
  if not np.isfinite(array).all():
    raise WeightsError(
      f"{getattr(tensor, 'name', 'A tensor')} of the adapter has values that "
      "are NaN or infinite; take another save of it."
    )
  return array


def sizes(
  factors: Mapping[str, Factors], part: str
) -> dict[str, tuple[int, float]]:
  """Rank and scale of each module.

  Raises:
    WeightsError: there are none.
  """
  if not factors:
    raise WeightsError(
      f"The {part} has no LoRA to write; it comes with model.lora."
    )
  return {module: (its.rank, its.scale) for module, its in factors.items()}


def tensors(factors: Mapping[str, Factors], prefix: str) -> dict[str, Any]:
  """The matrices by peft's names."""
  found = {}
  for module, its in factors.items():
    found[f"{prefix}{module}.lora_A.weight"] = its.down
    found[f"{prefix}{module}.lora_B.weight"] = its.up
  return found


def save(
  folder: epath.PathLike,
  stem: str,
  arrays: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes one safetensors file into a folder that has none.

  Raises:
    WeightsError: it has.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for old in folder.glob("*.safetensors"):
    raise WeightsError(
      f"{folder} already holds {old.name}; give a new folder, nothing is "
      "overwritten."
    )
  arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
  safetensors_numpy.save_file(
    arrays, folder / f"{stem}.safetensors", {"format": "pt", **(metadata or {})}
  )
