"""Which instruction wrote a value that is handed from place to place."""

from photochat_jax.compiled.hlo import Instruction, Program


class Origins:
  """Follows a program's values back, through tuples, copies and loops."""

  def __init__(self, program: Program):
    """Notes to which loop each loop's computations belong."""
    self._program = program
    self._operands: dict[str, list[str]] = {}
    self._home: dict[str, str] = {}
    self._loops: dict[str | None, Instruction] = {}
    for name, instructions in program.computations.items():
      for instruction in instructions:
        if instruction.opcode == "parameter":
          self._home[instruction.name] = name
        elif instruction.opcode == "while":
          for role in ("body", "condition"):
            self._loops[instruction.attribute(role)] = instruction

  def of(self, name: str, index: str = "") -> Instruction | None:
    """The instruction that wrote a value.

    Args:
      name: of the instruction whose result it is.
      index: which of its results, '0,1' in nested tuples.

    Returns:
      None if the program has no such instruction.
    """
    path = [int(place) for place in index.split(",") if place]
    find, seen = self._program.instructions.get, set()
    found = find(name)
    while found is not None and (found.name, *path) not in seen:
      seen.add((found.name, *path))
      before, onward = self._before(found, path, seen)
      if before is None or find(before) is None:
        break
      found, path = find(before), onward
    return found

  def _before(
    self, instruction: Instruction, path: list[int], seen: set
  ) -> tuple[str | None, list[int]]:
    """Where a value comes from: a name, and which of its results."""
    opcode, operands = instruction.opcode, self._read(instruction)
    if opcode == "tuple" and path:
      return operands[path[0]], path[1:]
    if opcode == "get-tuple-element":
      return operands[0], [int(instruction.attribute("index")), *path]
    if opcode in ("bitcast", "copy", "copy-start", "copy-done"):
      return operands[0], path[1:] if opcode == "copy-start" else path
    loop = instruction
    if opcode == "parameter":
      loop = self._loops.get(self._home[instruction.name])
    if loop is None or loop.opcode != "while" or not path:
      return None, path
    root = self._program.roots[loop.attribute("body")]
    if (root.name, *path) in seen:  # Handed round: it came from outside.
      return self._read(loop)[0], path
    return root.name, path

  def _read(self, instruction: Instruction) -> list[str]:
    """Its operands; a loop's tuple has thousands."""
    if instruction.name not in self._operands:
      self._operands[instruction.name] = instruction.operands
    return self._operands[instruction.name]
