"""What a compiled program sends and holds, told from its text."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from photochat_jax.compiled.hlo import Instruction, Program, arrays, size_of

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
# Names for places, and what allocates nothing of its own.
_NOT_ALLOCATED = frozenset(
  "parameter get-tuple-element tuple bitcast while conditional call constant "
  "after-all partition-id replica-id opt-barrier".split()
)
# In a chip's own memories rather than its HBM: layouts such as {0:T(8)S(1)}.
_ELSEWHERE = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\(\d+\)[^}]*\}")


class Array(NamedTuple):
  """An array on one chip."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def elements(self) -> int:
    """How many numbers it holds."""
    return math.prod(self.dims)

  @property
  def nbytes(self) -> int:
    """Bytes without the padding of its layout."""
    return int(size_of(str(self)))

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Traffic(NamedTuple):
  """Collectives of one kind in one place.

  Attributes:
    part: the module they are for: `Llama`, `UNet`, `other`.
    place: "each layer", "each chunk" of something, or "once".
    direction: "forward" or "backward"; recomputation is of the latter.
    kind: one of `COLLECTIVES`.
    trips: how often the place runs in a step.
    count: of collectives each time.
    nbytes: of all their results each time, on one chip; of a reduction that is
      scattered on the spot, of what goes into it.
  """

  part: str
  place: str
  direction: str
  kind: str
  trips: int
  count: int
  nbytes: int


class Buffer(NamedTuple):
  """A result that has memory of its own.

  Attributes:
    array: its type.
    opcode: what made it.
    op_name: where JAX traced it.
    source: `file:line` in the package, or the nearest there is.
    count: how many alike there are.
    nbytes: of one, with padding where the compiler's plan is known.
  """

  array: Array
  opcode: str
  op_name: str
  source: str
  count: int
  nbytes: int


def traffic(program: Program) -> list[Traffic]:
  """Collectives by part and place, those that send most in a step first."""
  counts: collections.Counter = collections.Counter()
  sizes: collections.Counter = collections.Counter()
  seen = set()
  starts = frozenset(COLLECTIVES) | {f"{kind}-start" for kind in COLLECTIVES}
  for made, computation, loops, op_name in program.walk(starts):
    kind = made.opcode.removesuffix("-start")
    # One that runs beside products is printed in each fusion it runs beside.
    channel = re.search(r"channel_id=(\d+)", made.rest)
    key = loops, kind, channel[1] if channel else made.name
    if key in seen:
      continue
    seen.add(key)
    if computation.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"  # As a TPU's program has it.
    loop = loops[-1].op_name if loops else ""
    where = op_name or loop
    place = (
      part_of(where),
      place_of(loop),
      "backward" if "transpose(" in where else "forward",
      kind,
      math.prod(loop.trips or 1 for loop in loops),
    )
    counts[place] += 1
    sizes[place] += _received(made)
  rows = [Traffic(*place, counts[place], sizes[place]) for place in counts]
  return sorted(rows, key=lambda row: -row.trips * row.nbytes)


def allocated(program: Program) -> Iterator[tuple[Instruction, Array]]:
  """Results that have memory of their own in HBM: nothing inside fusions."""
  waiting, seen = [program.entry], set()
  while waiting:
    name = waiting.pop()
    if name in seen:
      continue
    seen.add(name)
    for made in program.computations.get(name, ()):
      if made.opcode in ("while", "call", "conditional"):
        waiting.extend(made.called())
      # What is started gives its operands too; its end gives the result.
      if made.opcode in _NOT_ALLOCATED or made.opcode.endswith("-start"):
        continue
      for array in arrays(_ELSEWHERE.sub("", made.shape)):
        yield made, Array(*array)


def gathers(program: Program, made: Instruction, array: Array) -> bool:
  """Whether a result of `made` is an all-gather's, its own or one inside."""
  inside = [
    instruction
    for name in made.called()
    for instruction in program.computations.get(name, ())
  ]
  return any(
    instruction.opcode.startswith("all-gather")
    and array in [Array(*one) for one in arrays(instruction.shape)]
    for instruction in (made, *inside)
  )


def largest(program: Program, limit: int = 20) -> list[Buffer]:
  """The largest results, those of one shape and one line together.

  Not all of them are there at once: `plan.largest` knows which are.
  """
  found: dict[tuple[Array, str], Buffer] = {}
  for made, array in allocated(program):
    source = program.source(made)
    buffer = found.get((array, source))
    if buffer is None:
      buffer = Buffer(array, made.opcode, made.op_name, source, 0, array.nbytes)
    found[array, source] = buffer._replace(count=buffer.count + 1)
  return sorted(found.values(), key=lambda b: -b.nbytes)[:limit]


def part_of(op_name: str) -> str:
  """The module an op_name belongs to: `Llama`, `Llama.logits`, `UNet`, ..."""
  found = re.search(r"\b[A-Z]\w+(?:\.\w+)?", op_name)
  return found[0] if found else "other"


def place_of(loop: str) -> str:
  """What a loop repeats, by its op_name; that of no loop is ""."""
  if re.search(r"\([A-Z]\w+\)+/while$", loop):
    return "each layer"
  # The loop over the parts of a batch is round the differentiation.
  return "each chunk" if "jvp(" in loop else "once"


def _received(made: Instruction) -> int:
  """Bytes of a collective's result; a start's tuple holds its input too."""
  found = [Array(*array).nbytes for array in arrays(made.shape)]
  if made.opcode in ("all-gather-start", "collective-permute-start"):
    return found[1]
  return sum(found)
