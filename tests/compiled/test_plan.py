"""What is in memory at once: by a plan written by hand, and by libtpu."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from photochat_jax.compiled import hlo, origins, plan

ROOT = pathlib.Path(__file__).parents[2]

ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 512, parameter 0, shape |f32[8,16]| at ShapeIndex {}:
 value: <1 x @0> (size=512,offset=0): f32[8,16]{1,0:T(8,128)}
allocation 1: size 9216, preallocated-temp:
 value: <2 early @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
 value: <3 stack{} @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
 value: <4 arg{1} (phi) @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
 value: <5 other @0> (size=1024,offset=4096): bf16[8,16]{1,0:T(8,128)(2,1)}
 value: <6 late @0> (size=2048,offset=4096): f32[4,128]{1,0:T(4,128)}
 value: <7 init{} @0> (size=512,offset=8192): (s32[], f32[8,128]{1,0})
allocation 2: size 99999, color 1, preallocated-temp:
 value: <8 inside @1> (size=99999,offset=0): f32[9,9]{1,0:T(8,128)S(1)}
"""
RANGES = """\
HloLiveRange (max 9):
  InstructionSequence:
    0:early
  BufferLiveRange:
    early{}:0-1
    stack{}:2-5
    arg{1}:4-8
    other{}:5-6
    late{}:7-9
    inside{}:0-9
  Live ranges at 4 (peak):
    stack{}: 4096 bytes (cumulative: 4096 bytes)
"""
# A loop that writes into room made before it, and hands a constant round.
PROGRAM = """\
%body (arg: (s32[], f32[8,128], f32[2])) -> (s32[], f32[8,128], f32[2]) {
  %arg = (s32[], f32[8,128], f32[2]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %room = f32[8,128] get-tuple-element(%arg), index=1
  %same = f32[2] get-tuple-element(%arg), index=2
  %written = f32[8,128] fusion(%room), kind=kLoop, metadata={op_name="w" source_file="/x/photochat_jax/a.py" source_line=3}
  ROOT %out = (s32[], f32[8,128], f32[2]) tuple(%i, %written, %same)
}

ENTRY %main (x: f32[8,16]) -> f32[8,128] {
  %x = f32[8,16] parameter(0)
  %zero = s32[] constant(0)
  %two = f32[2] constant({1, 2})
  %stack = f32[8,128] broadcast(%zero), dimensions={}
  %init = (s32[], f32[8,128], f32[2]) tuple(%zero, %stack, %two)
  %loop = (s32[], f32[8,128], f32[2]) while(%init), condition=%cond, body=%body
  %got = f32[8,128] get-tuple-element(%loop), index=1
  ROOT %copied = f32[8,128] copy(%got)
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def made():
  return plan.Plan(
    PROGRAM, plan.read_values(ASSIGNMENT), plan.read_ranges(RANGES)
  )


def test_only_arrays_among_the_temporaries_in_hbm_are_read(made):
  assert [v.key for v in made.values] == [
    ("early", ""), ("stack", ""), ("arg", "1"), ("other", ""), ("late", ""),
  ]
  assert made.ranges["arg", "1"] == (4, 8)


def test_what_shares_its_bytes_counts_once_and_the_peak_is_found(made):
  # 4096 + 1024 from 5 to 6, but 4096 + 2048 from 7 to 8: `arg` is `stack`,
  # updated in place.
  at_peak = plan.at_peak(made.values, made.ranges)
  names = [[value.key[0] for value in alive] for alive in at_peak]
  assert names == [["arg"], ["late"]]
  early = {**made.ranges, ("late", ""): (9, 9)}
  at_peak = plan.at_peak(made.values, early)
  names = [[value.key[0] for value in alive] for alive in at_peak]
  assert names == [["stack", "arg"], ["other"]]


def test_the_line_is_that_which_writes_into_the_room(made):
  first, second = plan.largest(made, hlo.Program(PROGRAM))
  assert (str(first.array), first.nbytes) == ("f32[8,128]", 4096)
  assert first.source == "photochat_jax/a.py:3" and first.op_name == "w"
  # The program has no instruction of this name.
  assert (second.nbytes, second.source, second.op_name) == (2048, "", "")


@pytest.mark.parametrize(
  "name, index, writer",
  [
    ("arg", "1", "written"),
    ("loop", "1", "written"),
    ("copied", "", "written"),
    ("init", "1", "stack"),
    ("loop", "2", "two"),
    ("x", "", "x"),
  ],
)
def test_values_are_followed_through_tuples_copies_and_loops(
  name, index, writer
):
  found = origins.Origins(hlo.Program(PROGRAM)).of(name, index)
  assert found.name == writer
  assert origins.Origins(hlo.Program(PROGRAM)).of("nobody") is None


# Four layers whose results are kept for the way back, on rows of 1,024.
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from photochat_jax.compiled import hlo, plan, topology

topology.use_environment("v5e:2x2")
devices = topology.describe("v5e:2x2").devices
mesh = Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))

def shape(*sizes):
  place = NamedSharding(mesh, PartitionSpec())
  return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=place)

def loss(w, x):
  def layer(h, w):
    return jnp.tanh(h @ w), None
  return jnp.sum(jax.lax.scan(layer, x, w)[0].astype(jnp.float32) ** 2)

rows = int(sys.argv[1])
lowered = jax.jit(jax.grad(loss)).lower(shape(4, 1024, 1024), shape(rows, 1024))
compiled, found, message = plan.compile_with_plan(lowered)
largest = plan.largest(found, hlo.Program(found.text))
print(json.dumps({
  "message": message,
  "temporaries": compiled and compiled.memory_analysis().temp_size_in_bytes,
  "largest": [(str(b.array), b.nbytes, b.count, b.source) for b in largest],
  "peak": sum(a[0].nbytes for a in plan.at_peak(found.values, found.ranges)),
}))
"""


@pytest.mark.parametrize("rows, fits", [(200_000, True), (4_000_000, False)])
def test_the_compilers_own_plan_is_read(rows, fits, tmp_path):
  pytest.importorskip("libtpu", reason="needs pip install -e '.[tpu]'")
  (tmp_path / "layers.py").write_text(SCRIPT)
  told = subprocess.run(
    [sys.executable, tmp_path / "layers.py", str(rows)],
    env={
      **os.environ,
      "JAX_ENABLE_COMPILATION_CACHE": "0",
      "PYTHONPATH": str(ROOT),
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert told.returncode == 0, told.stderr
  found = json.loads(told.stdout)
  assert bool(found["message"]) is not fits
  array, nbytes, count, source = found["largest"][0]
  # The layers' results, two bytes each.
  assert array == f"bf16[4,{rows},1024]"
  assert nbytes == 4 * rows * 1024 * 2 and count >= 1
  line = SCRIPT.splitlines().index("    return jnp.tanh(h @ w), None") + 1
  assert source.endswith((f"layers.py:{line}", f"layers.py:{line + 1}"))
  assert found["peak"] >= count * nbytes
  if fits:
    assert 0.9 < found["peak"] / found["temporaries"] <= 1.0
  else:
    assert found["peak"] > 16 * 2**30
