"""Compiles a run's step for devices that are not there, and says what it takes.

Sizes are those of one chip; GB are 1e9 bytes, also those on a chip's data
sheet, which mean 7 % more on some: the stricter reading.
"""

import dataclasses
import importlib.metadata
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from photochat_jax import sharding
from photochat_jax.compiled import memory, plan, usage
from photochat_jax.compiled.hlo import Program
from photochat_jax.compiled.step import abstract_step
from photochat_jax.compiled.topology import Topology
from photochat_jax.config import RunConfig
from photochat_jax.runtime import flops, xla_flags

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")


@dataclasses.dataclass(frozen=True)
class Report:
  """What the compiler says of a step.

  Attributes:
    about: topology, mesh, batch and versions.
    hbm: bytes of a chip.
    state: of `memory.state_bytes`.
    batch: bytes of a chip's rows.
    vocabulary_map: bytes of the bridge's map.
    memory: None where the step does not compile.
    overflow: where it does not, for want of memory.
    traffic: of `usage.traffic`.
    buffers: the largest.
    buffers_at_peak: whether they are those that are there when the temporaries
      take most; else the largest results, not all there at once.
    vocabulary: of `vocabulary_arrays`.
    flops: of a step by part, over the whole batch.
    seconds: {"lower" | "compile": seconds}.
  """

  about: Mapping[str, Any]
  hbm: float
  state: Mapping[str, Mapping[str, int]]
  batch: int
  vocabulary_map: int
  memory: memory.Memory | None
  overflow: memory.Overflow | None
  traffic: list[usage.Traffic]
  buffers: list[usage.Buffer]
  buffers_at_peak: bool
  vocabulary: Mapping[str, Any]
  flops: Mapping[str, float]
  seconds: Mapping[str, float]

  @property
  def used(self) -> int:
    """Bytes of a chip that the step takes."""
    return self.memory.total if self.memory else self.overflow.used

  @property
  def fits(self) -> bool:
    """Whether it compiles, and a chip has so much."""
    return self.memory is not None and self.used <= self.hbm

  @property
  def aliased_share(self) -> float | None:
    """Share of the state that an update is written over; wanted is >= 95 %."""
    state = sum(sum(row.values()) for row in self.state.values())
    return min(self.memory.aliased / state, 1.0) if self.memory else None

  @property
  def last_line(self) -> str:
    """`fits: X of Y GB per chip (Z %)`, or `does not fit: ...`."""
    word = "fits" if self.fits else "does not fit"
    return (
      f"{word}: {self.used / 1e9:.2f} of {self.hbm / 1e9:g} GB per chip "
      f"({100 * self.used / self.hbm:.1f} %)"
    )

  def as_dict(self) -> dict[str, Any]:
    """Everything, for JSON."""
    found = dict(vars(self))
    for name in ("memory", "overflow"):
      if found[name] is not None:
        found[name] = found[name]._asdict()
    found["traffic"] = [row._asdict() for row in self.traffic]
    found["buffers"] = [
      row._asdict() | {"array": str(row.array)} for row in self.buffers
    ]
    return found | {
      "used": self.used,
      "fits": self.fits,
      "aliased_share": self.aliased_share,
      "last_line": self.last_line,
    }


def examine(
  run: RunConfig,
  index: int,
  topology: Topology,
  tell: Callable[[str, int], None] = lambda what, seconds: None,
  keep_text: Callable[[str], None] = lambda text: None,
) -> Report:
  """Compiles a stage's step and reads what came out.

  Args:
    run: the run.
    index: which of its stages.
    topology: for what.
    tell: told each second what is being done, and for how many.
    keep_text: given the text of the compiled program.

  Raises:
    ValueError: mesh or batch do not fit the devices.
  """
  stage = run.stages[index]
  mesh = sharding.make_mesh(
    run.mesh.data, run.mesh.fsdp, run.mesh.tensor, topology.devices
  )
  seconds = {}
  step = abstract_step(run, mesh, index)
  with jax.set_mesh(mesh):
    with _Clock("tracing", tell) as clock:
      lowered = step.function.lower(*step.arguments)
    seconds["lower"] = clock.seconds
    found = overflow = program = None
    with _Clock("compiling", tell) as clock:
      compiled, planned, message = plan.compile_with_plan(lowered)
    seconds["compile"] = clock.seconds
    text = planned.text
    if compiled is None:
      overflow = memory.read_overflow(
        message, memory.tree_bytes(step.arguments)
      )
      if overflow is None:
        raise RuntimeError(message)
    else:
      found = memory.read_analysis(compiled.memory_analysis())
      text = text or compiled.as_text()
  if text:
    keep_text(text)
    program = Program(text)
  buffers = plan.largest(planned, program) if program else []
  at_peak = bool(buffers)
  if program and not at_peak:
    buffers = usage.largest(program)
  return Report(
    about={
      "topology": topology.name,
      "chip": topology.chip.name,
      "chips": len(topology.devices),
      "mesh": dict(mesh.shape),
      "stage": stage.name,
      "batch_size": stage.batch_size,
      "accumulate": stage.accumulate,
      "length": run.data.length,
      "moments": bool(run.data.moments),
      "captions": f"{run.bridge.draw}, {run.bridge.retokenise}",
      "peak_tflops": topology.chip.tflops,
      "flags": os.environ.get(xla_flags.variable(topology.chip.name), ""),
      "versions": {
        name: importlib.metadata.version(name) for name in _PACKAGES
      },
    },
    hbm=topology.hbm,
    state=memory.state_bytes(step, stage),
    batch=memory.tree_bytes(step.batch),
    vocabulary_map=memory.tree_bytes(step.vocabulary_map),
    memory=found,
    overflow=overflow,
    traffic=usage.traffic(program) if program else [],
    buffers=buffers,
    buffers_at_peak=at_peak,
    vocabulary=vocabulary_arrays(program, run, stage, mesh) if program else {},
    flops=flops.train_flops(run, stage),
    seconds=seconds,
  )


def vocabulary_arrays(
  program: Program, run: RunConfig, stage: Any, mesh: Any
) -> dict[str, Any]:
  """Looks for what must never be there: whole logits, a matrix of vocabularies.

  Sought are arrays with a dimension of the language model's vocabulary, whole
  or a device's share. Its tables are not meant: the vocabulary and the hidden
  width, a share of it, or a piece of it that is gathered, in any order.

  Returns:
    `forbidden`, the names of what is not allowed; `largest`, the largest array
    with the vocabulary but for the tables, with its `elements`; the bounds
    `batch_length_vocabulary`, of a chip's rows, and `vocabularies`.
  """
  language, tensor = run.model.language, mesh.shape["tensor"]
  words, pieces = (
    {size for whole in sizes for size in (whole, -(-whole // tensor))}
    for sizes in (
      {language.vocab_size, language.padded_vocab_size},
      {run.model.text.vocab_size},
    )
  )
  width = language.hidden_size
  tables = ([width], [width // mesh.shape["fsdp"]])
  rows = stage.batch_size // stage.accumulate // sharding.batch_ways(mesh)
  # As many as the whole logits of a chip's rows, its share of the vocabulary.
  logits = rows * run.data.length * min(words)
  # The last position predicts nothing.
  whole = rows * (run.data.length - 1) * min(words)
  matrix = min(words) * min(pieces)
  found, forbidden = [], set()
  for made, array in usage.allocated(program):
    others = [size for size in array.dims if size != 1]
    word = next((size for size in others if size in words), None)
    if word is None:
      continue
    others.remove(word)
    if set(others) & pieces:
      forbidden.add(f"{array} {program.source(made)}")
    if others in tables:
      continue
    # A TPU gathers a large table in pieces, each beside other work; one may
    # have as many columns as a chip has positions.
    piece = len(others) == 1 and not width % others[0]
    if piece and usage.gathers(program, made, array):
      continue
    found.append((array.elements, str(array), program.source(made)))
    if array.elements >= whole:
      forbidden.add(f"{array} {program.source(made)}")
  elements, array, source = max(found, default=(0, "", ""))
  return {
    "forbidden": sorted(forbidden),
    "largest": array,
    "source": source,
    "elements": elements,
    "batch_length_vocabulary": logits,
    "vocabularies": matrix,
  }


class _Clock:
  """Measures, and tells the time."""

  def __init__(self, what: str, tell: Callable[[str, int], None]):
    self._what, self._tell, self._done = what, tell, threading.Event()
    self._thread = threading.Thread(target=self._tick, daemon=True)
    self.seconds = 0.0

  def __enter__(self) -> "_Clock":
    self._started = time.monotonic()
    self._thread.start()
    return self

  def __exit__(self, *error) -> None:
    self.seconds = time.monotonic() - self._started
    self._done.set()
    self._thread.join()

  def _tick(self) -> None:
    seconds = 0
    while True:
      self._tell(self._what, seconds)
      seconds += 1
      wanted = self._started + seconds
      if self._done.wait(max(0.0, wanted - time.monotonic())):
        return
