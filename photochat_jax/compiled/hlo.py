"""Reading the text of a compiled program (HLO).

A program is a set of computations, one of which is the entry; an instruction
may call others: a fusion its body, a loop its condition and body. The shapes
are those of one chip. Each instruction knows where it comes from: `op_name` is
the path of JAX's name stack (`jit(step)/jvp(Llama)/while/body/...`), and a
table at the top of the text holds the Python stack.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = re.compile(r"[a-z]+(\d+)")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{")
_INSTRUCTION = re.compile(
  r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)"
)
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)"
  r"=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_MINE = "photochat_jax/"


class Instruction(NamedTuple):
  """One line of a computation.

  Attributes:
    name: unique in the program.
    shape: of one chip's result, with its layout; a tuple's in brackets.
    opcode: what it does.
    rest: the text behind the opcode's bracket: operands, attributes.
  """

  name: str
  shape: str
  opcode: str
  rest: str

  @property
  def op_name(self) -> str:
    """The path of JAX's name stack, '' if there is none."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else ""

  @property
  def operands(self) -> list[str]:
    """Names of what it reads."""
    depth, text = 1, ""
    for letter in self.rest:
      depth += (letter in "({") - (letter in ")}")
      if not depth:
        break
      text += letter
    return re.findall(r"%([\w.\-]+)", text) or re.findall(
      r"(?:^|, )([\w.\-]+)", text
    )

  def called(self) -> list[str]:
    """Names of the computations that it calls."""
    names = []
    for one, several in _CALLED.findall(self.rest):
      names += [one] if one else re.findall(r"[\w.\-]+", several)
    return names

  def attribute(self, name: str) -> str | None:
    """The word behind `name=`, without a %."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
    return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Loop:
  """A loop round an instruction.

  Attributes:
    op_name: of the loop.
    trips: how often its body runs; None if that is not fixed.
  """

  op_name: str
  trips: int | None


class Occurrence(NamedTuple):
  """An instruction where it runs.

  Attributes:
    instruction: what runs.
    computation: the name of the one it is in.
    loops: those round it, outermost first.
    op_name: its own, or that of the nearest fusion or loop round it.
  """

  instruction: Instruction
  computation: str
  loops: tuple[Loop, ...]
  op_name: str


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
  """Dtype and sizes of each array in a shape's text."""
  return [
    (dtype, tuple(int(size) for size in sizes.split(",") if size))
    for dtype, sizes in _SHAPE.findall(shape)
  ]


def size_of(shape: str) -> int:
  """Bytes of all arrays in a shape's text, without padding."""
  return sum(_itemsize(d) * math.prod(s) for d, s in arrays(shape))


def _itemsize(dtype: str) -> float:
  bits = _BITS.match(dtype)
  return int(bits[1]) / 8 if bits else 1  # pred, token


class Program:
  """A compiled program.

  Attributes:
    header: its first line.
    computations: name -> instructions.
    entry: name of the computation that starts.
    roots: computation -> the instruction whose result is its own.
  """

  def __init__(self, text: str):
    """Reads a program's text, as `compiled.as_text()` gives it."""
    self.header, self.entry = "", ""
    self.computations: dict[str, list[Instruction]] = {}
    self._tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    self.roots: dict[str, Instruction] = {}
    rows, current = None, ""
    for line in text.splitlines():
      if line.startswith("HloModule"):
        self.header = line
      elif line in self._tables:
        rows = self._tables[line]
      elif line[:1].isdigit() and rows is not None:
        number, _, content = line.partition(" ")
        rows[int(number)] = content
      elif line[:1] in " \t":
        self._read(current, line)
      elif match := _COMPUTATION.match(line):
        current = match[2]
        self.computations[current] = []
        if match[1]:
          self.entry = current

  def _read(self, computation: str, line: str) -> None:
    if match := _INSTRUCTION.match(line):
      root, *fields = match.groups()
      instruction = Instruction(*fields)
      self.computations[computation].append(instruction)
      if root:
        self.roots[computation] = instruction

  @functools.cached_property
  def instructions(self) -> dict[str, Instruction]:
    """All instructions by name."""
    return {i.name: i for some in self.computations.values() for i in some}

  def walk(self, opcodes: frozenset[str]) -> Iterator[Occurrence]:
    """All instructions with one of the opcodes, wherever they run."""

    @functools.cache
    def holds(computation: str) -> bool:
      return any(
        instruction.opcode in opcodes
        or any(holds(name) for name in instruction.called())
        for instruction in self.computations.get(computation, ())
      )

    def visit(computation, loops, outer):
      for instruction in self.computations.get(computation, ()):
        op_name = instruction.op_name or outer
        if instruction.opcode in opcodes:
          yield Occurrence(instruction, computation, loops, op_name)
        # The other halves of an asynchronous call name what it calls again.
        if instruction.opcode in ("async-update", "async-done"):
          continue
        for name in instruction.called():
          if not holds(name):
            continue
          inside = loops
          if instruction.opcode == "while":
            inside = (*loops, self.loop(instruction))
          yield from visit(name, inside, op_name)

    return visit(self.entry, (), "")

  def loop(self, instruction: Instruction) -> Loop:
    """How often a `while` runs.

    Where the compiler does not say so, the condition does, `i < n`; i begins
    at 0 and grows by 1 unless something else is found.
    """
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', instruction.rest)
    if known:
      return Loop(instruction.op_name, int(known[1]))
    return Loop(instruction.op_name, self._count(instruction))

  def _count(self, instruction: Instruction) -> int | None:
    compare = self.roots.get(instruction.attribute("condition") or "")
    if compare is None or compare.attribute("direction") != "LT":
      return None
    index, bound = (self.instructions.get(n) for n in compare.operands[:2])
    if index is None or index.opcode != "get-tuple-element":
      return None
    place = int(index.attribute("index"))
    start = self._element(instruction.operands[0], place)
    end = _constant(bound)
    if end is None and bound is not None and bound.attribute("index"):
      bound = int(bound.attribute("index"))
      end = self._element(instruction.operands[0], bound)
    if end is None:
      return None
    body = self.roots.get(instruction.attribute("body") or "")
    step = self._step(body, place) if body else None
    return max(0, math.ceil((end - (start or 0)) / (step or 1)))

  def _element(self, name: str, place: int) -> int | None:
    """The constant at a place of a tuple."""
    found = self.instructions.get(name)
    if found is None or found.opcode != "tuple":
      return None
    found = self.instructions.get(found.operands[place])
    while found is not None and found.opcode in ("copy", "bitcast"):
      found = self.instructions.get(found.operands[0])
    return _constant(found)

  def _step(self, root: Instruction, place: int) -> int | None:
    """What a loop's body adds to its index."""
    if root.opcode != "tuple":
      return None
    added = self.instructions.get(root.operands[place])
    if added is None or added.opcode != "add":
      return None
    terms = (self.instructions.get(name) for name in added.operands)
    found = [value for value in map(_constant, terms) if value is not None]
    return found[0] if found else None

  def stack(self, instruction: Instruction) -> list[str]:
    """The Python stack of an instruction, innermost first: `file:line`."""
    if found := re.search(r"stack_frame_id=(\d+)", instruction.rest):
      return [self._frames[i] for i in self._chain(int(found[1]))]
    found = re.search(
      r'source_file="([^"]*)"(?: source_line=(\d+))?', instruction.rest
    )
    return [f"{found[1]}:{found[2] or 0}"] if found else []

  def source(self, instruction: Instruction) -> str:
    """The line of this package that made an instruction, '' if unknown.

    The innermost one; a line of another package where there is none of ours.
    """
    stack = self.stack(instruction)
    for place in stack:
      if _MINE in place:
        return _MINE + place.rpartition(_MINE)[2]
    return stack[0] if stack else ""

  @functools.cached_property
  def _frames(self) -> dict[int, str]:
    names, places = self._tables["FileNames"], self._tables["FileLocations"]
    frames = {}
    for number, frame in self._tables["StackFrames"].items():
      place = places.get(_field(frame, "file_location_id"), "")
      file = names.get(_field(place, "file_name_id"), "").strip('"')
      frames[number] = f"{file}:{_field(place, 'line')}"
    return frames

  @functools.cached_property
  def _parents(self) -> dict[int, int]:
    parents = {
      number: _field(frame, "parent_frame_id")
      for number, frame in self._tables["StackFrames"].items()
    }
    # Some versions print parents one too high, so that a root is its own.
    if any(number == parent for number, parent in parents.items()):
      parents = {number: parent - 1 for number, parent in parents.items()}
    return parents

  def _chain(self, frame: int) -> Iterator[int]:
    seen = set()
    while frame in self._parents and frame not in seen:
      seen.add(frame)
      yield frame
      frame = self._parents[frame]


def _field(text: str, name: str) -> int:
  found = re.search(rf"\b{name}=(\d+)", text)
  return int(found[1]) if found else 0


def _constant(instruction: Instruction | None) -> int | None:
  if instruction is None or instruction.opcode != "constant":
    return None
  found = re.match(r"(-?\d+)\)", instruction.rest)
  return int(found[1]) if found else None
