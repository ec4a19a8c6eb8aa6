"""TPUs by name, for compiling without having them.

A topology is named as libtpu names it, `v5p:4x4x2`, or as people order it:
`v5p-64`. Versions 4 and 5p are sold by TensorCores, two of which are a chip;
5e and 6e by chips:

| name    | chips | libtpu's name |
|---------|-------|---------------|
| v4-128  | 64    | v4:4x4x4      |
| v5e-256 | 256   | v5e:16x16     |
| v5p-64  | 32    | v5p:4x4x2     |
| v6e-64  | 64    | v6e:8x8       |
"""

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from photochat_jax.config_check import ConfigError
from photochat_jax.runtime import flops, xla_flags

# What libtpu reads when it is loaded.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",  # Else it asks Google's metadata server.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # No lock: no device is opened.
  # Unset, it complains that it does not know them.
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  # Nothing but what is fatal on standard error.
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}


class Version(NamedTuple):
  """A version of the TPU.

  Attributes:
    axes: of its network.
    cores: by which it is counted in names such as `v5p-64`, a chip.
    options: for libtpu.
  """

  axes: int
  cores: int
  options: Mapping[str, Any] = {}


# Source: Google's pages of each version. Without its option a v4's two cores
# are devices of half the memory each; Cloud TPUs join them.
_VERSIONS = {
  "v4": Version(3, 2, {"chip_config_name": "megacore"}),
  "v5p": Version(3, 2),
  "v5e": Version(2, 1),
  "v6e": Version(2, 1),
}


class Topology(NamedTuple):
  """TPUs that need not be there.

  Attributes:
    name: libtpu's, `v5p:4x4x2`.
    devices: one a chip; they can be compiled for and nothing else.
    chip: what one is.
  """

  name: str
  devices: Sequence[jax.Device]
  chip: flops.Chip

  @property
  def hbm(self) -> float:
    """Bytes of a chip's memory, its GB read as 1e9: the stricter reading."""
    return self.chip.hbm_gb * 1e9


def use_environment(name: str) -> None:
  """Sets what compiling without devices needs; call it before JAX is used.

  The compiler gets the flags that a run on such chips gets (`xla_flags`).

  Args:
    name: of the topology.

  Raises:
    ConfigError: no TPU is called that.
  """
  kind, _ = parse(name)
  variable = xla_flags.variable(kind)
  flags = xla_flags.value(kind, os.environ.get(variable, ""))
  os.environ.update(ENVIRONMENT | {variable: flags})
  jax.config.update("jax_platforms", "cpu")


def parse(name: str) -> tuple[str, tuple[int, ...]]:
  """Reads a topology's name.

  Returns:
    The version and the chips along each axis: `v5p`, (4, 4, 2).

  Raises:
    ConfigError: no TPU is called that.
  """
  match = re.fullmatch(r"(\w+)(?::([\dx]+)|-(\d+))", name)
  version = _VERSIONS.get(match[1]) if match else None
  if version is not None:
    if match[2]:
      shape = tuple(int(size) for size in match[2].split("x") if size)
    else:
      shape = _shape_of(int(match[3]), version)
    if len(shape) == version.axes and min(shape) > 0:
      return match[1], shape
  raise ConfigError(
    f"No topology is called {name!r}; write a TPU's version and its chips "
    "along each axis, such as v5p:4x4x2 or v5e:16x16, or its name, such as "
    "v5p-64, v5e-256, v6e-64 or v4-128."
  )


def _shape_of(count: int, version: Version) -> tuple[int, ...]:
  """Chips along each axis of `v5p-64`, as even as powers of two can be."""
  chips = count // version.cores
  if chips < 1 or chips & (chips - 1) or chips * version.cores != count:
    return ()
  power, axes = chips.bit_length() - 1, version.axes
  shape = tuple(2 ** ((power + axis) // axes) for axis in range(axes))
  return shape[::-1] if axes == 3 else shape  # 4x4x2, but 2x4.


def describe(name: str) -> Topology:
  """Returns the topology of a name.

  Raises:
    ConfigError: there is none of this name, or libtpu is not installed.
  """
  kind, shape = parse(name)
  name = f"{kind}:{'x'.join(map(str, shape))}"
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      "The TPUs' compiler is not installed; install it with "
      'pip install -e ".[tpu]" (no TPU is needed).'
    )
  try:
    found = topologies.get_topology_desc(
      name, "tpu", **_VERSIONS[kind].options
    )
  except (RuntimeError, ValueError) as error:
    sentence = " ".join(str(error).split())[:300]
    raise ConfigError(f"libtpu has no topology {name}: {sentence}") from error
  return Topology(
    name, found.devices, flops.PEAKS[found.devices[0].device_kind]
  )
