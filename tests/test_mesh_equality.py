"""Any mesh computes what one device computes, and creates its share alone."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

# Compiled in half the time; how a program is divided among devices stays.
FAST = "--xla_backend_optimization_level=0"
# Leaves that are smaller than this at their largest are compared with it: the
# largest gradients are above 1, and some (of keys' biases) are 0 but for
# rounding.
SMALL = 1e-2


def run(folder, what, meshes):
  """The rows that `mesh_gradients.py` prints, by mesh."""
  tests = pathlib.Path(__file__).parent
  program = subprocess.run(
    [sys.executable, tests / "mesh_gradients.py", folder, what, *meshes],
    capture_output=True,
    text=True,
    check=False,
    env={
      **os.environ,
      "JAX_NUM_CPU_DEVICES": "8",
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent))),
      "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FAST}",
    },
  )
  assert program.returncode == 0, program.stderr
  rows = map(json.loads, program.stdout.splitlines())
  return {row["mesh"]: row for row in rows}


def assert_equal_gradients(rows, meshes):
  assert list(rows) == meshes
  for mesh, row in rows.items():
    found, wanted = row["loss"]
    assert abs(found - wanted) <= 1e-6 * wanted, mesh
    sizes = [size for _, size in row["gradients"].values()]
    assert len(sizes) > 500 and max(sizes) > 1
    wrong = {
      path: (difference, size)
      for path, (difference, size) in row["gradients"].items()
      if not difference <= 1e-5 * max(size, SMALL)
    }
    assert not wrong, mesh


def assert_created_alike(rows, meshes):
  assert list(rows) == meshes
  for mesh, row in rows.items():
    assert row["unequal"] == [], mesh
    data, fsdp, tensor = map(int, mesh.split("x"))
    share = row["whole"] / (fsdp * tensor)
    # Small arrays are repeated, and there are many in a small model.
    assert share <= max(row["held"]) <= share + 0.1 * row["whole"], mesh
    # Never the whole of it, on the way there either.
    assert row["made"] <= 1.1 * max(row["held"]), mesh
    assert row["working"] <= 0.25 * row["whole"], mesh


def test_loss_and_gradients_are_those_of_one_device(tmp_path):
  meshes = ["8x1x1", "1x8x1", "2x4x1", "2x2x2"]
  assert_equal_gradients(run(tmp_path, "gradients", meshes), meshes)


@pytest.mark.slow
def test_on_two_and_four_devices_too(tmp_path):
  meshes = ["2x1x1", "1x1x2", "1x4x1", "1x2x2", "1x2x4"]
  assert_equal_gradients(run(tmp_path, "gradients", meshes), meshes)


def test_a_state_is_created_divided_and_equal_bit_for_bit(tmp_path):
  meshes = ["1x8x1"]
  assert_created_alike(run(tmp_path, "creation", meshes), meshes)


@pytest.mark.slow
def test_created_alike_on_a_mesh_of_three_axes(tmp_path):
  meshes = ["2x2x2"]
  assert_created_alike(run(tmp_path, "creation", meshes), meshes)
