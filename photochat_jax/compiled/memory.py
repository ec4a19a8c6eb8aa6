"""The memory of a chip: what a compiled step takes of it, by kind."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from photochat_jax import optim
from photochat_jax.compiled.step import AbstractStep
from photochat_jax.config import StageConfig
from photochat_jax.ops import partition

_SIZE = r"([\d.]+)([KMGT]?)"
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_TEMPORARIES = re.compile(
  rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
  """Bytes of a chip's HBM, as the compiler counts them.

  Attributes:
    arguments: state, batch and vocabulary map.
    aliased: of the arguments, what the results are written over.
    outputs: the results.
    temporaries: everything between, at its height.
    code: the program.
    peak: the compiler's own figure of what is live at once, without the
      program; 0 where it gives none.
  """

  arguments: int
  aliased: int
  outputs: int
  temporaries: int
  code: int
  peak: int = 0

  @property
  def total(self) -> int:
    """What the step takes."""
    return (
      self.arguments
      + self.outputs
      - self.aliased
      + self.temporaries
      + self.code
    )


class Overflow(NamedTuple):
  """What the compiler says of a step that does not fit.

  Attributes:
    used: bytes of a chip that it would take.
    limit: bytes that the compiler has to give.
    largest: (bytes, shape, op_name) of what it takes most for.
  """

  used: int
  limit: int
  largest: tuple[tuple[int, str, str], ...]


def read_analysis(analysis: Any) -> Memory:
  """Reads what `Compiled.memory_analysis` returns."""
  return Memory(
    analysis.argument_size_in_bytes,
    analysis.alias_size_in_bytes,
    analysis.output_size_in_bytes,
    analysis.temp_size_in_bytes,
    analysis.generated_code_size_in_bytes,
    getattr(analysis, "peak_memory_in_bytes", 0),
  )


def read_overflow(message: str, arguments: int = 0) -> Overflow | None:
  """Reads the compiler's message; None if it is about something else.

  Args:
    message: of the error.
    arguments: bytes of the step's, which one of the messages leaves out.
  """
  used = _USED.search(message)
  found = used or _TEMPORARIES.search(message)
  if found is None:
    return None
  largest = []
  for block in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
    size = re.match(_SIZE, block)
    shape = re.search(r"Shape: ([^\n{]*)", block)
    name = re.search(r'op_name="([^"]*)"', block)
    if size:
      largest.append(
        (
          _bytes(size[1], size[2]),
          shape[1].strip() if shape else "",
          name[1] if name else "",
        )
      )
  return Overflow(
    _bytes(found[1], found[2]) + (0 if used else arguments),
    _bytes(found[3], found[4]),
    tuple(largest),
  )


def state_bytes(
  step: AbstractStep, stage: StageConfig
) -> dict[str, Mapping[str, int]]:
  """Bytes of a chip that the state takes, without padding.

  Args:
    step: of `abstract_step`.
    stage: whose step it is.

  Returns:
    {part: {"trained" | "frozen" | "optimiser" | "averages": bytes}}; counters
    are of the part "step".
  """
  state = step.state
  trained, frozen = optim.split(state.params, stage.trainable)
  found: dict[str, dict[str, int]] = {part: {} for part in state.params}

  def add(kind: str, tree: Any) -> None:
    for path, leaf in partition.flatten(tree).items():
      names = path.split("/")
      part = next((name for name in names if name in state.params), "step")
      row = found.setdefault(part, {})
      row[kind] = row.get(kind, 0) + _shard_bytes(leaf)

  add("trained", trained)
  add("frozen", frozen)
  add("optimiser", state.opt_state)
  add("averages", state.ema)
  add("trained", {"step": state.step, "latent_scale": state.latent_scale})
  return found


def tree_bytes(tree: Any) -> int:
  """Bytes of a chip that arrays take, without padding."""
  return sum(map(_shard_bytes, jax.tree.leaves(tree)))


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
  count = leaf.dtype.itemsize
  for size in leaf.sharding.shard_shape(leaf.shape):
    count *= size
  return count


def _bytes(number: str, unit: str) -> int:
  return round(float(number) * _UNITS[unit])
