r"""Hugging Face checkpoints to a workdir that chats and trains.

  python tools/convert_hf.py --llm=DIR --blip2=DIR --diffusion=DIR --out=DIR

Each DIR is a folder as `save_pretrained` or `git clone` leaves it, or a hub
id. Any may be left out: its parts are then random, at the published sizes.
Prints what was read; OUT holds one Orbax checkpoint, with a digest of each
array and the SHA-256 of each source file, and the tokenizers.
"""

import importlib.util
import pathlib
import sys

import ml_dtypes
import numpy as np
from absl import app, flags, logging

from photochat_jax import config as config_lib
from photochat_jax import convert

_LLM = flags.DEFINE_string("llm", "", "A Llama checkpoint.")
_BLIP2 = flags.DEFINE_string("blip2", "", "A BLIP-2 checkpoint.")
_DIFFUSION = flags.DEFINE_string("diffusion", "", "A Stable Diffusion.")
_OUT = flags.DEFINE_string("out", None, "The workdir to write.", required=True)
_PERCEIVER = flags.DEFINE_enum(
  "perceiver", "qformer", ["qformer", "linear"], "linear has no Q-Former."
)
_ARGUMENTS = flags.DEFINE_string(
  "arguments", "", "More arguments of configs/photochat.py: size=tiny, ..."
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "same",
  ["same", "float32", "bfloat16"],
  "Of the parameters; same keeps the files'.",
)
_LLM_LORA = flags.DEFINE_string(
  "llm_lora", "", "peft's folder of an adapter of the language model."
)
_UNET_LORA = flags.DEFINE_string(
  "unet_lora", "", "A LoRA file of the UNet, as of diffusers or kohya."
)
_MERGE = flags.DEFINE_bool(
  "merge_lora", True, "Add the adapters into the kernels, or train them on."
)
_DTYPES = {"same": None, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def main(argv: list[str]) -> None:
  """Converts, or says in one sentence why not."""
  logging.set_verbosity(logging.WARNING)  # Orbax tells much.
  if len(argv) > 1:
    sys.exit(f"{argv[1]!r} is not a flag; flags are written --name=value.")
  arguments = [
    f"{flag.name}={flag.value}"
    for flag in (_LLM, _BLIP2, _DIFFUSION, _PERCEIVER)
    if flag.value
  ]
  arguments += filter(None, _ARGUMENTS.value.split(","))
  try:
    settings = _config_file().get_config(",".join(arguments))
    lines = convert.convert(
      config_lib.build(settings),
      _OUT.value,
      _DTYPES[_DTYPE.value],
      _LLM_LORA.value,
      _UNET_LORA.value,
      _MERGE.value,
    )
  except ValueError as error:
    sys.exit(f"convert_hf: {error}")
  print(*lines, sep="\n")
  print(
    f"Written to {_OUT.value}; talk to it with\n  python -m photochat_jax.main "
    f"--mode=chat --workdir={_OUT.value}"
  )


def _config_file():
  """The module configs/photochat.py, which lies beside this folder."""
  path = pathlib.Path(__file__).parents[1] / "configs" / "photochat.py"
  spec = importlib.util.spec_from_file_location("photochat_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


if __name__ == "__main__":
  app.run(main)
