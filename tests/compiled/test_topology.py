"""TPUs by name."""

import importlib.util
import os

import pytest

from photochat_jax.compiled import topology
from photochat_jax.config import ConfigError


@pytest.mark.parametrize(
  "name, kind, shape",
  [
    ("v5p:4x4x2", "v5p", (4, 4, 2)),
    ("v5e:2x2", "v5e", (2, 2)),
    # Two TensorCores are a chip of v4 and v5p.
    ("v5p-64", "v5p", (4, 4, 2)),
    ("v5p-8", "v5p", (2, 2, 1)),
    ("v4-128", "v4", (4, 4, 4)),
    ("v5e-256", "v5e", (16, 16)),
    ("v5e-32", "v5e", (4, 8)),
    ("v6e-64", "v6e", (8, 8)),
  ],
)
def test_both_ways_to_name_a_topology(name, kind, shape):
  assert topology.parse(name) == (kind, shape)


@pytest.mark.parametrize(
  "name", ["", "v5p", "v9-8", "v5p:4x4", "v5e:4x4x4", "v5e-48", "v5p:0x4x4"]
)
def test_a_wrong_name_is_a_sentence(name):
  with pytest.raises(ConfigError, match="write a TPU's version"):
    topology.parse(name)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r'pip install -e "\.\[tpu\]"'):
    topology.describe("v5e:2x2")


@pytest.fixture
def environment(monkeypatch):
  for name in (*topology.ENVIRONMENT, "LIBTPU_INIT_ARGS"):
    monkeypatch.setenv(name, os.environ.get(name, ""))  # To be put back.


def test_the_compiler_gets_what_a_run_on_the_chip_gets(
  monkeypatch, environment
):
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--mine=1")
  topology.use_environment("v5p-64")
  flags = os.environ["LIBTPU_INIT_ARGS"].split()
  assert flags[0] == "--mine=1"
  assert "--xla_enable_async_all_gather=true" in flags


def test_devices_and_memory_of_a_topology(environment):
  pytest.importorskip("libtpu", reason="needs pip install -e '.[tpu]'")
  topology.use_environment("v5e:2x2")
  v4, v5e = topology.describe("v4-8"), topology.describe("v5e:2x2")
  # Google's pages: 32 GB and 16 GB a chip.
  assert (v4.name, len(v4.devices), v4.hbm) == ("v4:2x2x1", 4, 32e9)
  assert (len(v5e.devices), v5e.hbm) == (4, 16e9)
