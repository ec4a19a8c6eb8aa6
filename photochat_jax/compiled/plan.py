"""Where the compiler puts a program's arrays, and which are there at once.

Asked to write down what it does, XLA tells each piece of memory with the
values that lie in it (`*-buffer-assignment.txt`), when each value is alive
(`*-live-range.txt`), and the program itself. It does so before it refuses a
program for its size, too. Values updated in place share their bytes, and bytes
include the padding of a TPU's tiles: this is what is in memory, where a list
of a program's results is not.
"""

import collections
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from photochat_jax.compiled.hlo import Instruction, Program, arrays
from photochat_jax.compiled.origins import Origins
from photochat_jax.compiled.usage import Array, Buffer

_ALLOCATION = re.compile(r"allocation \d+: size \d+, (?:color (\d+), )?(.*):")
_VALUE = re.compile(
  r" value: <\d+ ([\w.\-]+)(?:\{([\d,]*)\})?(?: \(phi\))? @\d+> "
  r"\(size=(\d+),offset=(\d+)\): (.*)"
)
_RANGE = re.compile(r"    ([\w.\-]+)\{([\d,]*)\}:(\d+)-(\d+)")
_TEMPORARIES = "preallocated-temp"

# (name of an instruction, which of its results: '' of one, '0,1' in tuples).
Key = tuple[str, str]
Ranges = Mapping[Key, tuple[int, int]]


class Value(NamedTuple):
  """An array among a chip's temporaries in HBM.

  Attributes:
    key: what makes it.
    place: its allocation and where in it, shared by what is updated in place.
    nbytes: with padding.
    shape: with its layout.
  """

  key: Key
  place: tuple[int, int]
  nbytes: int
  shape: str


class Plan(NamedTuple):
  """What the compiler wrote down.

  Attributes:
    text: the program, as `compiled.as_text` has it; '' if it is not there.
    values: its temporaries in HBM.
    ranges: the first and the last moment of each, in the program's order.
  """

  text: str
  values: list[Value]
  ranges: Ranges


def compile_with_plan(lowered: Any) -> tuple[Any, Plan, str]:
  """Compiles, and reads what the compiler wrote down meanwhile.

  Args:
    lowered: of `jax.jit(...).lower`. A program from JAX's cache has no plan.

  Returns:
    What was compiled, or None; the plan; why it was refused for its size.
  """
  compiled, message = None, ""
  with tempfile.TemporaryDirectory(prefix="compile_for_tpu") as folder:
    try:
      compiled = lowered.compile(
        {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
      )
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      message = str(error)
    found = Plan(
      _read(folder, "after_optimizations.txt"),
      read_values(_read(folder, "after_optimizations-buffer-assignment.txt")),
      read_ranges(_read(folder, "after_optimizations-live-range.txt")),
    )
  return compiled, found, message


def read_values(text: str) -> list[Value]:
  """The temporaries in HBM, by `*-buffer-assignment.txt`.

  Tuples, which are tables of addresses, are left out.
  """
  found, number, wanted = [], 0, False
  for line in text.splitlines():
    if match := _ALLOCATION.match(line):
      number += 1
      wanted = not int(match[1] or 0) and _TEMPORARIES in match[2]
    elif wanted and (match := _VALUE.match(line)):
      name, index, size, offset, shape = match.groups()
      if not shape.startswith("("):
        key, place = (name, index or ""), (number, int(offset))
        found.append(Value(key, place, int(size), shape))
  return found


def read_ranges(text: str) -> Ranges:
  """When each value is alive, by `*-live-range.txt`."""
  return {
    (match[1], match[2]): (int(match[3]), int(match[4]))
    for match in map(_RANGE.match, text.splitlines())
    if match
  }


def at_peak(values: Iterable[Value], ranges: Ranges) -> list[list[Value]]:
  """What is there at the moment at which it takes the most bytes.

  Returns:
    For each place, those that share it then; the largest places first.
  """
  places = collections.defaultdict(list)
  for value in values:
    if value.key in ranges:
      places[value.place, value.nbytes].append(value)
  changes = collections.Counter()
  for (_, nbytes), sharing in places.items():
    for first, last in _united(ranges[value.key] for value in sharing):
      changes[first] += nbytes
      changes[last + 1] -= nbytes
  now, most, peak = 0, 0, 0
  for moment in sorted(changes):
    now += changes[moment]
    if now > most:
      most, peak = now, moment
  there = []
  for sharing in places.values():
    alive = [
      value
      for value in sharing
      if ranges[value.key][0] <= peak <= ranges[value.key][1]
    ]
    if alive:
      there.append(alive)
  return sorted(there, key=lambda alive: -alive[0].nbytes)


def _united(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
  """Joins spans that overlap, so that shared bytes count once."""
  united = []
  for first, last in sorted(spans):
    if united and first <= united[-1][1]:
      united[-1] = (united[-1][0], max(last, united[-1][1]))
    else:
      united.append((first, last))
  return united


def largest(plan: Plan, program: Program, limit: int = 20) -> list[Buffer]:
  """What takes most at the peak; alike ones of one line are together."""
  origins = Origins(program)
  found: dict[tuple[Array, str], Buffer] = {}
  for alive in at_peak(plan.values, plan.ranges):
    array = Array(*arrays(alive[0].shape)[0])
    made = _writer(alive, program, origins)
    source = program.source(made) if made else ""
    buffer = found.get((array, source))
    if buffer is None:
      opcode, op_name = (made.opcode, made.op_name) if made else ("", "")
      buffer = Buffer(array, opcode, op_name, source, 0, alive[0].nbytes)
    found[array, source] = buffer._replace(count=buffer.count + 1)
  return sorted(found.values(), key=lambda b: -b.nbytes * b.count)[:limit]


def _writer(
  alive: Iterable[Value], program: Program, origins: Origins
) -> Instruction | None:
  """Of all that wrote into a place, what tells most about it."""
  made = (origins.of(*value.key) for value in alive)

  def worth(instruction: Instruction) -> tuple[bool, bool, bool]:
    # Room that is only set aside tells less than what is written there.
    written = instruction.opcode not in ("custom-call", "broadcast")
    mine = program.source(instruction).startswith("photochat_jax/")
    return mine, written, bool(instruction.op_name)

  return max(filter(None, made), key=worth, default=None)


def _read(folder: str, ending: str) -> str:
  """The newest file with an ending, '' if there is none."""
  files = list(pathlib.Path(folder).glob(f"*.{ending}"))
  if not files:
    return ""
  return max(files, key=lambda file: file.stat().st_mtime).read_text("utf-8")
