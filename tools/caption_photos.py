r"""Writes captions for the photos of a data set, whose descriptions are labels.

By a run of this package, which says what it is shown:

  python tools/caption_photos.py --path=DIR --workdir=RUN

By BLIP-2 (pip install 'photochat_jax[caption]', for torch), a folder or a hub
id:

  python tools/caption_photos.py --path=DIR --backend=blip2 \
    --model=Salesforce/blip2-opt-2.7b

Appends to DIR/photo_captions.jsonl; --config.data.caption_source=written then
trains on it. Stopped at any moment, the same command goes on. Other weights or
options caption anew, and the last caption of a photo counts.
"""

import pathlib
import sys

from absl import app, flags, logging

from photochat_jax import caption, captioners, decoding_options
from photochat_jax.data import sources

_DEFAULTS = decoding_options.Options()

_PATH = flags.DEFINE_string("path", None, "The data set.", required=True)
_DATASET = flags.DEFINE_enum(
  "dataset", "photochat", sorted(sources.READERS), "What --path holds."
)
_BACKEND = flags.DEFINE_enum("backend", "own", ["own", "blip2"], "Who writes.")
_WORKDIR = flags.DEFINE_string("workdir", "", "The run, of --backend=own.")
_MODEL = flags.DEFINE_string(
  "model", "Salesforce/blip2-opt-2.7b", "BLIP-2: a folder, or a hub id."
)
_METHOD = flags.DEFINE_enum(
  "method",
  _DEFAULTS.method,
  decoding_options.METHODS,
  "How a caption is decoded.",
)
_NUM_BEAMS = flags.DEFINE_integer(
  "num_beams", _DEFAULTS.num_beams, "beam: captions followed at a time."
)
_LENGTH_PENALTY = flags.DEFINE_float(
  "length_penalty", _DEFAULTS.length_penalty, "beam: more favours the long."
)
_TOP_P = flags.DEFINE_float(
  "top_p", _DEFAULTS.top_p, "nucleus: probability that may be sampled."
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", _DEFAULTS.temperature, "nucleus: logits are divided by it."
)
_SEED = flags.DEFINE_integer("seed", _DEFAULTS.seed, "nucleus: of the samples.")
_MAX_TOKENS = flags.DEFINE_integer(
  "max_tokens",
  None,
  "Longest caption; the run's own, or 30 tokens for BLIP-2.",
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 16, "Photos captioned at a time.", lower_bound=1
)
_LIMIT = flags.DEFINE_integer(
  "limit", None, "Most photos to caption now.", lower_bound=0
)


def main(argv: list[str]) -> None:
  """Captions, or says in one sentence why not."""
  logging.set_verbosity(logging.WARNING)  # Orbax tells much.
  if len(argv) > 1:
    sys.exit(f"{argv[1]!r} is not a flag; flags are written --name=value.")
  try:
    photos, missing = caption.find_photos(_DATASET.value, _PATH.value)
    print(f"{len(photos)} photos have a file and {missing} have none.")
    captioner = _captioner()
    summary = caption.caption_photos(
      photos, captioner, pathlib.Path(_PATH.value) / caption.FILE, _LIMIT.value
    )
  except ValueError as error:
    sys.exit(f"caption_photos: {error}")
  except KeyboardInterrupt:
    sys.exit("\ncaption_photos: stopped; the same command goes on.")
  print(summary)


def _captioner() -> captioners.Captioner:
  options = decoding_options.Options(
    method=_METHOD.value,
    num_beams=_NUM_BEAMS.value,
    length_penalty=_LENGTH_PENALTY.value,
    top_p=_TOP_P.value,
    temperature=_TEMPERATURE.value,
    seed=_SEED.value,
    max_tokens=_MAX_TOKENS.value,
  )
  if _BACKEND.value == "blip2":
    from photochat_jax import caption_blip2

    return caption_blip2.Blip2Captioner(
      _MODEL.value, options, _BATCH_SIZE.value
    )
  if not _WORKDIR.value:
    raise captioners.CaptionError(
      "Give --workdir=RUN, the run whose model captions, or --backend=blip2."
    )
  captioner, advice = captioners.open_own(
    _WORKDIR.value, options, _BATCH_SIZE.value
  )
  if advice:
    print(advice)
  return captioner


if __name__ == "__main__":
  app.run(main)
