"""Flags of XLA, the compiler, for each chip: the one place for them.

They are environment variables, which the compiler reads before the first
program: what starts a run sets them, and the run logs what it finds.

eval "$(python -m photochat_jax.runtime.xla_flags v5p)"

prints and so exports the variable of a chip, with what it held before: a flag
that is set already stays as it is. Importing this needs no jax.

Few flags, because most of what published recipes set has become the default.
Those for TPUs are the ones of MaxText's recipes that changed the program when
libtpu 0.0.42 compiled a layer-scanned transformer with its gradient for eight
chips of each generation, on a mesh that divides data, parameters and heads;
`xla_tpu_enable_async_collective_fusion`, its `..._multiple_steps` and
`xla_tpu_overlap_compute_collective_tc` changed nothing, and on v5e none did but
the limit of the on-chip memory, which MaxText does not raise there. Nothing
here has been timed by this project: each flag says whose recipe it is.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from typing import NamedTuple


class Flag(NamedTuple):
  """A flag and why it is set.

  Attributes:
    name: without hyphens.
    value: as it is written.
    reason: what it changes, and whose recipe it is.
  """

  name: str
  value: str
  reason: str

  def __str__(self):
    return f"--{self.name}={self.value}"


# Both or neither: either alone changes nothing. MaxText:
# src/maxtext/configs/tpu/v5p/llama2_7b.sh, and CF_FOR_ALL_GATHER of
# benchmarks/xla_flags_library.py for v6e. On v5e they are the default
# (https://openxla.org/xla/flags_guidance).
_ASYNC_GATHER = (
  Flag(
    "xla_enable_async_all_gather",
    "true",
    "parameters that fsdp divides are gathered while the step computes "
    "(MaxText's recipe); needs the next flag",
  ),
  Flag(
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "true",
    "the gathering is fused with the computation that hides it (MaxText's "
    "recipe); needs the flag before",
  ),
)

# DENSE_VMEM_LIMIT_FLAG of MaxText's library, in its Trillium recipes.
_VMEM = Flag(
  "xla_tpu_scoped_vmem_limit_kib",
  "98304",
  "one operation may use 96 MiB of the on-chip memory instead of 16, for "
  "larger tiles (MaxText's recipe for dense models); costs some HBM",
)

# https://docs.jax.dev/en/latest/gpu_performance_tips.html, and NVIDIA's guide,
# docs/GPU_performance.md of JAX-Toolbox.
_GPU = (
  Flag(
    "xla_gpu_enable_latency_hiding_scheduler",
    "true",
    "communication is moved to where computation hides it (JAX's tips, "
    "NVIDIA's images)",
  ),
  Flag(
    "xla_gpu_enable_pipelined_all_gather",
    "true",
    "the next layer's parameters are gathered in this layer's turn of the "
    "scan (NVIDIA's guide)",
  ),
  Flag(
    "xla_gpu_enable_pipelined_reduce_scatter",
    "true",
    "the last layer's gradients are summed in this layer's turn of the scan "
    "(NVIDIA's guide)",
  ),
  Flag(
    "xla_gpu_all_gather_combine_threshold_bytes",
    "536870912",
    "one message for a whole layer, 405 MB of the 7B in bfloat16, instead of "
    "30 MB (NVIDIA's guide: at least a layer)",
  ),
  Flag(
    "xla_gpu_reduce_scatter_combine_threshold_bytes",
    "536870912",
    "as for the gathering (NVIDIA's guide: at least a layer)",
  ),
)

FLAGS: dict[str, tuple[Flag, ...]] = {
  "v4": _ASYNC_GATHER,
  "v5e": (),
  "v5p": _ASYNC_GATHER,
  "v6e": (*_ASYNC_GATHER, _VMEM),
  "a100": _GPU,
  "h100": _GPU,
  "h200": _GPU,
}

_KINDS = (
  (r"TPU v4.*", "v4"),
  (r"TPU (v5 lite.*|v5e.*)", "v5e"),
  (r"TPU v5p?", "v5p"),
  (r"TPU (v6 lite.*|v6e.*)", "v6e"),
  (r".*\bA100\b.*", "a100"),
  (r".*\bH100\b.*", "h100"),
  (r".*\bH200\b.*", "h200"),
)


def chip_of(device_kind: str) -> str | None:
  """Finds the chip of a `jax.Device.device_kind`; None if it has no flags."""
  for pattern, chip in _KINDS:
    if re.fullmatch(pattern, device_kind):
      return chip
  return None


def variable(chip: str) -> str:
  """The environment variable that holds the flags of a chip."""
  return "LIBTPU_INIT_ARGS" if chip.startswith("v") else "XLA_FLAGS"


def value(chip: str, already: str = "") -> str:
  """Flags of a chip as its variable holds them.

  Args:
    chip: a key of `FLAGS`.
    already: what the variable holds; its flags come first and stay.

  Raises:
    ValueError: naming the chips there are.
  """
  if chip not in FLAGS:
    raise ValueError(
      f"There are no XLA flags for {chip!r}; give one of {', '.join(FLAGS)}."
    )
  given = _read(already)
  added = [str(flag) for flag in FLAGS[chip] if flag.name not in given]
  return " ".join([*already.split(), *added])


def _read(text: str) -> dict[str, str]:
  """Flags of a variable by name; one without a value is true."""
  found = {}
  for word in text.split():
    name, _, given = word.lstrip("-").partition("=")
    found[name] = given or "true"
  return found


def describe(
  device_kind: str, environment: Mapping[str, str] | None = None
) -> list[str]:
  """Says what a run should log: the flags in use and the recommended ones.

  Args:
    device_kind: of one of the run's devices.
    environment: variables; those of the process by default.

  Returns:
    Sentences, none of which is an error: a flag may be left out on purpose.
  """
  environment = os.environ if environment is None else environment
  lines = [
    f"{name}={environment[name]}"
    for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
    if environment.get(name)
  ]
  chip = chip_of(device_kind)
  if not FLAGS.get(chip):
    return [*lines, f"No XLA flags are recommended for {device_kind}."]
  given = _read(environment.get(variable(chip), ""))
  for flag in FLAGS[chip]:
    if flag.name not in given:
      lines.append(f"Not set for {chip}: {flag}: {flag.reason}.")
    elif given[flag.name].lower() != flag.value:
      lines.append(
        f"Set to {given[flag.name]} for {chip}, where {flag} is recommended: "
        f"{flag.reason}."
      )
    else:
      lines.append(f"Set for {chip}: {flag}: {flag.reason}.")
  return lines


def main(arguments: list[str]) -> int:
  """Prints the export of a chip's flags for a shell; returns an exit code."""
  if len(arguments) != 1 or arguments[0] not in FLAGS:
    sys.stderr.write(f"xla_flags: Give one chip: {', '.join(FLAGS)}.\n")
    return 2
  name = variable(arguments[0])
  flags = value(arguments[0], os.environ.get(name, ""))
  print(f"export {name}={shlex.quote(flags)}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
