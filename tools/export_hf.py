r"""A run's weights to folders that transformers and diffusers open.

  python tools/export_hf.py --workdir=RUN --out=DIR

DIR/llm opens as `LlamaForCausalLM`, DIR/blip2 (the whole perceiving model, the
language model once more) as `Blip2ForConditionalGeneration`, DIR/diffusion as
`StableDiffusionPipeline`. Neither torch nor they are needed to write them.
"""

import sys

import ml_dtypes
import numpy as np
from absl import app, flags, logging

from photochat_jax import export

_WORKDIR = flags.DEFINE_string("workdir", None, "The run.", required=True)
_OUT = flags.DEFINE_string("out", None, "A new folder.", required=True)
_PARTS = flags.DEFINE_list("parts", list(export.PARTS), "Which folders.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16", "float16"], "Of the tensors."
)
_VOCAB_SIZE = flags.DEFINE_integer(
  "vocab_size",
  None,
  "Rows of the language model in llm/; the original's number, 32000 for "
  "Llama 2, takes [img] and [/img] out again.",
)
_AVERAGE = flags.DEFINE_bool("average", True, "Averaged weights, if any.")
_ADAPTERS = flags.DEFINE_bool(
  "adapters", False, "LoRA into adapters/ instead of into the kernels."
)
_DTYPES = {
  "float32": np.float32,
  "bfloat16": ml_dtypes.bfloat16,
  "float16": np.float16,
}


def main(argv: list[str]) -> None:
  """Exports, or says in one sentence why not."""
  logging.set_verbosity(logging.WARNING)  # Orbax tells much.
  if len(argv) > 1:
    sys.exit(f"{argv[1]!r} is not a flag; flags are written --name=value.")
  try:
    export.export(
      _WORKDIR.value,
      _OUT.value,
      _PARTS.value,
      _DTYPES[_DTYPE.value],
      _VOCAB_SIZE.value,
      _AVERAGE.value,
      _ADAPTERS.value,
    )
  except ValueError as error:
    sys.exit(f"export_hf: {error}")
  print(f"Written to {_OUT.value}: {', '.join(_PARTS.value)}.")


if __name__ == "__main__":
  app.run(main)
