r"""Prints what a data set holds, and writes a page to look at it.

  python tools/inspect_data.py --dataset=photochat --path=DIR

OUT/inspect.html has the tables, histograms, and random dialogues with photos
and every token of what training sees of them, coloured by mask; it opens
without a network. OUT/inspect.json has the numbers.

For the layout of a certain model:

  python tools/inspect_data.py --dataset=photochat --path=DIR \
    --llm_tokenizer=LLAMA_DIR --clip_tokenizer=SD_DIR/tokenizer

The flags of the layout are called as the fields of config.data are. Records
that cannot be used are counted, however many there are.
"""

import pathlib
import sys

from absl import app, flags, logging

from photochat_jax import inspect_data
from photochat_jax.data import records, sources, spec, tokenizers

_DATASET = flags.DEFINE_enum(
  "dataset", "photochat", sorted(sources.READERS), "What --path holds."
)
_PATH = flags.DEFINE_string("path", None, "The data set.", required=True)
_OUT = flags.DEFINE_string(
  "out", "", "Folder of page and numbers; '' is runs/inspect_DATASET."
)
_DIALOGUES = flags.DEFINE_integer(
  "dialogues", 20, "Random dialogues on the page.", lower_bound=0
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Chooses the dialogues.", lower_bound=0
)
_CAPTION_SOURCE = flags.DEFINE_enum(
  "caption_source",
  "",
  ["", *records.CAPTION_SOURCES],
  "What the model is to write; '' is the source with the most captions.",
)
_LLM = flags.DEFINE_string(
  "llm_tokenizer", "", "The language model's folder; '' is a small one."
)
_CLIP = flags.DEFINE_string(
  "clip_tokenizer", "", "The text encoder's; '' is a small one."
)
_SLOTS = flags.DEFINE_integer(
  "clip_slots", 77, "Slots of the text encoder.", lower_bound=3
)
_TEMPLATE = flags.DEFINE_enum(
  "template",
  "",
  ["", *spec.TEMPLATES],
  "How turns are written; '' is the one that the tokenizer is made for.",
)
_SYSTEM_PROMPT = flags.DEFINE_string(
  "system_prompt", "You chat and share photos.", "'' leaves it out."
)
_LENGTH = flags.DEFINE_integer(
  "length", 1024, "Tokens of a packed row.", lower_bound=1
)
_VISUAL = flags.DEFINE_integer(
  "num_visual_tokens", 32, "Visual slots of a photo.", lower_bound=1
)
_PHOTOS_IN = flags.DEFINE_integer(
  "photos_in", 6, "Photos that a row can see.", lower_bound=1
)
_PHOTOS_OUT = flags.DEFINE_integer(
  "photos_out", 4, "Photos that a row can share.", lower_bound=1
)
_CAPTION_TOKENS = flags.DEFINE_integer(
  "caption_tokens", 96, "Longest caption (bridge.max_tokens).", lower_bound=1
)


def main(argv: list[str]) -> None:
  """Inspects, or says in one sentence why not."""
  logging.set_verbosity(logging.WARNING)
  if len(argv) > 1:
    sys.exit(f"{argv[1]!r} is not a flag; flags are written --name=value.")
  name = _DATASET.value
  try:
    llm = tokenizers.load_llm_tokenizer(_LLM.value or None)
    clip = tokenizers.load_clip_tokenizer(_CLIP.value or None, _SLOTS.value)
    layout = spec.DataSpec(
      batch_size=1,
      length=_LENGTH.value,
      photos_in=_PHOTOS_IN.value,
      photos_out=_PHOTOS_OUT.value,
      num_visual_tokens=_VISUAL.value,
      vision_size=1,  # No photo is made an array.
      photo_size=1,
      caption_tokens=_CAPTION_TOKENS.value,
      template=_TEMPLATE.value or spec.template_of(llm),
      system_prompt=_SYSTEM_PROMPT.value,
    )
    inspect_data.inspect_data(
      name,
      _PATH.value,
      llm,
      clip,
      layout,
      _CAPTION_SOURCE.value,
      _DIALOGUES.value,
      _SEED.value,
      out=_OUT.value or pathlib.Path("runs") / f"inspect_{name}",
    )
  except ValueError as error:
    sys.exit(f"inspect_data: {error}")


if __name__ == "__main__":
  app.run(main)
