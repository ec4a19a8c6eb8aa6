"""XLA's flags: the compilers know them, and a run says which it found."""

import importlib.util
import os
import shlex
import subprocess
import sys

import pytest

from photochat_jax.runtime import xla_flags

TPUS = [chip for chip in xla_flags.FLAGS if chip.startswith("v")]
GPUS = [chip for chip in xla_flags.FLAGS if not chip.startswith("v")]
TOPOLOGIES = {
  "v4": "v4:2x2x1",
  "v5e": "v5e:2x2",
  "v5p": "v5p:2x2x1",
  "v6e": "v6e:2x2",
}

# A product of a divided matrix: XLA gathers it.
COMPILE = """
import sys
import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P

devices = topologies.get_topology_desc(
  platform="tpu", topology_name=sys.argv[1]
).devices
mesh = jax.sharding.Mesh(np.array(devices), ("fsdp",))
shape = jax.ShapeDtypeStruct(
  (512, 512), "bfloat16", sharding=NamedSharding(mesh, P("fsdp"))
)
program = jax.jit(lambda x: x @ x, out_shardings=shape.sharding)
print(program.lower(shape).compile().as_text()[:10])
"""


def compile_for_tpu(chip, flags):
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed (pip install libtpu)")
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    # Several tests compile at once; libtpu thinks of chips, and locks.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "LIBTPU_INIT_ARGS": flags,
    # A program read back was compiled with whatever flags.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
  }
  return subprocess.run(
    [sys.executable, "-c", COMPILE, TOPOLOGIES[chip]],
    capture_output=True,
    text=True,
    check=False,
    env=environment,
  )


@pytest.mark.parametrize("chip", TPUS)
def test_libtpu_knows_the_flags(chip):
  program = compile_for_tpu(chip, xla_flags.value(chip))
  assert program.returncode == 0, program.stderr
  assert program.stdout.startswith("HloModule")


def test_libtpu_refuses_others():
  program = compile_for_tpu("v5e", "--xla_tpu_enable_miracles=true")
  assert program.returncode != 0
  assert "xla_tpu_enable_miracles" in program.stderr


def run_with_xla_flags(flags):
  return subprocess.run(
    [sys.executable, "-c", "import jax; print(jax.numpy.zeros(2))"],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
  )


# jaxlib reads the flags of all platforms, and aborts at one it does not know.
@pytest.mark.parametrize("flags", sorted({xla_flags.value(c) for c in GPUS}))
def test_jaxlib_knows_the_flags(flags):
  program = run_with_xla_flags(flags)
  assert program.returncode == 0, program.stderr
  assert program.stdout == "[0. 0.]\n"


def test_jaxlib_refuses_others():
  program = run_with_xla_flags("--xla_gpu_enable_miracles=true")
  assert program.returncode != 0
  assert "xla_gpu_enable_miracles" in program.stderr


def test_every_flag_has_one_reason_that_names_its_source():
  for chip, flags in xla_flags.FLAGS.items():
    names = [flag.name for flag in flags]
    assert len(set(names)) == len(names), chip
    for flag in flags:
      assert "(" in flag.reason, flag
      assert any(who in flag.reason for who in ("MaxText", "NVIDIA", "JAX"))
      assert flag.name.startswith("xla_") and " " not in flag.value


def exported(chip, **variables):
  """What a shell has in the variable after the line was evaluated."""
  line = subprocess.run(
    [sys.executable, "-m", "photochat_jax.runtime.xla_flags", chip],
    capture_output=True,
    text=True,
    check=True,
    env={**os.environ, **variables},
  ).stdout
  name = xla_flags.variable(chip)
  return subprocess.run(
    ["bash", "-c", f'eval {shlex.quote(line)}; printenv {name} || echo "none"'],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.rstrip("\n")


def test_a_shell_gets_the_flags():
  assert exported("v5p", LIBTPU_INIT_ARGS="") == (
    "--xla_enable_async_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
  )
  assert exported("v5e", LIBTPU_INIT_ARGS="") == ""


def test_what_is_set_already_stays():
  mine = "--xla_enable_async_all_gather=false --xla_mine='a'"
  assert exported("v4", LIBTPU_INIT_ARGS=mine) == (
    f"{mine} --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
  )


@pytest.mark.parametrize("arguments", [[], ["v9"], ["v4", "v5p"]])
def test_an_unknown_chip_is_told_in_a_sentence(arguments, capsys):
  assert xla_flags.main(arguments) == 2
  assert capsys.readouterr() == (
    "",
    "xla_flags: Give one chip: v4, v5e, v5p, v6e, a100, h100, h200.\n",
  )
  with pytest.raises(ValueError, match="no XLA flags for 'v9'; give one of v4"):
    xla_flags.value("v9")


@pytest.mark.parametrize(
  "kind, chip",
  [
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA A100-SXM4-80GB", "a100"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA GeForce RTX 4090", None),
    ("TPU v3", None),
    ("cpu", None),
  ],
)
def test_the_chip_is_known_by_its_kind(kind, chip):
  assert xla_flags.chip_of(kind) == chip


def test_a_run_says_what_it_found_and_what_is_missing():
  lines = xla_flags.describe(
    "TPU v6 lite",
    {
      "LIBTPU_INIT_ARGS": "--xla_enable_async_all_gather "
      "--xla_tpu_scoped_vmem_limit_kib=65536",
      "XLA_FLAGS": "--xla_dump_to=/tmp/x",
    },
  )
  assert lines[0].startswith("LIBTPU_INIT_ARGS=--xla_enable_async_all_gather ")
  assert lines[1] == "XLA_FLAGS=--xla_dump_to=/tmp/x"
  assert lines[2].startswith(
    "Set for v6e: --xla_enable_async_all_gather=true: parameters"
  )
  assert lines[3].startswith(
    "Not set for v6e: "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true: "
  )
  assert lines[4].startswith(
    "Set to 65536 for v6e, where --xla_tpu_scoped_vmem_limit_kib=98304 is "
    "recommended: "
  )
  assert len(lines) == 5


def test_a_chip_without_flags_is_told_too():
  assert xla_flags.describe("cpu", {}) == [
    "No XLA flags are recommended for cpu."
  ]
  assert xla_flags.describe("TPU v5 lite", {}) == [
    "No XLA flags are recommended for TPU v5 lite."
  ]


def test_it_needs_no_jax():
  program = subprocess.run(
    [
      sys.executable,
      "-c",
      "import sys\n"
      "from photochat_jax.runtime import xla_flags\n"
      "print('jax' in sys.modules)",
    ],
    capture_output=True,
    text=True,
    check=True,
  )
  assert program.stdout == "False\n"
