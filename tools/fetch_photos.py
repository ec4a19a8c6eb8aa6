r"""Fetches the photos of a data set, as far as they can still be had.

  python tools/fetch_photos.py --dataset=photochat --path=DIR
  python tools/fetch_photos.py --dataset=dialogcc --path=DIR --allow_http

Needs aiohttp: pip install 'photochat_jax[data]'. DIR holds the data set's own
files. The photos of PhotoChat and PhotoChat++ come from the public copy of Open
Images, by id; DialogCC's from all over the web, by address: many of these are
http:// only, and many dead. MMDialog's come with it. Proxies are not used.

Ctrl-C ends it, and the same command goes on. In DIR/photos stand the photos,
manifest.jsonl (what became of each) and coverage.json (the report).
"""

import dataclasses
import sys

from absl import app, flags, logging

from photochat_jax.data import fetch_dataset, schema

_DATASET = flags.DEFINE_string(
  "dataset", None, f"Whose photos: {', '.join(fetch_dataset.SOURCES)}."
)
_PATH = flags.DEFINE_string("path", None, "Its folder, on this machine.")
_SPLITS = flags.DEFINE_list(
  "splits", [], f"Some of {','.join(schema.SPLITS)}; without, all there are."
)
_RETRY = flags.DEFINE_bool(
  "retry", False, "Ask again for photos that failed for good, too."
)
_CHECK = flags.DEFINE_bool(
  "check", False, "Decode the photos that are there; fetch damaged ones again."
)
_ALLOW_HTTP = flags.DEFINE_bool(
  "allow_http", False, "http:// too, which anyone on the way can change."
)
_CONCURRENCY = flags.DEFINE_integer(
  "concurrency", None, "Requests at once.", lower_bound=1, upper_bound=512
)
_RATE = flags.DEFINE_float(
  "rate", None, "Most requests a second.", lower_bound=0.001
)
_HOST_RATE = flags.DEFINE_float(
  "host_rate", None, "Most requests a second to a host.", lower_bound=0.001
)
_MAX_MEGABYTES = flags.DEFINE_float(
  "max_megabytes", None, "Largest file, in units of 2^20.", lower_bound=0.001
)


def _stop(sentence: object, code: int) -> None:
  sys.stderr.write(f"fetch_photos: {sentence}\n")
  sys.exit(code)


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; a wrong one ends the program with one sentence."""
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    _stop(" ".join(str(error).split()), 2)
  if len(rest) > 1:
    _stop(f"{rest[1]!r} is not a flag; flags are written --name=value.", 2)
  known = ", ".join(fetch_dataset.SOURCES)
  if _DATASET.value not in fetch_dataset.SOURCES:
    _stop(f"Give --dataset=NAME, which is one of {known}.", 2)
  if not _PATH.value:
    _stop("Give --path=DIR, the folder of the data set's own files.", 2)
  if wrong := set(_SPLITS.value) - set(schema.SPLITS):
    _stop(f"There is no split {wrong.pop()!r}: {', '.join(schema.SPLITS)}.", 2)
  return rest


def main(argv: list[str]) -> None:
  """Fetches and reports, or says in one sentence why not."""
  del argv
  logging.set_verbosity(logging.ERROR)  # The report tells the rest.
  _, limits = fetch_dataset.SOURCES[_DATASET.value]
  megabytes = _MAX_MEGABYTES.value
  changed = {
    "concurrency": _CONCURRENCY.value,
    "rate": _RATE.value,
    "host_rate": _HOST_RATE.value,
    "max_bytes": megabytes and int(megabytes * 2**20),
    "allow_http": _ALLOW_HTTP.value,
  }
  changed = {name: v for name, v in changed.items() if v is not None}
  try:
    report = fetch_dataset.fetch_dataset(
      _DATASET.value,
      _PATH.value,
      dataclasses.replace(limits, **changed),
      splits=_SPLITS.value,
      retry=_RETRY.value,
      check=_CHECK.value,
    )
  except ValueError as error:
    _stop(error, 2)
  except KeyboardInterrupt:  # Before the first photo, or a second time.
    _stop("stopped; the same command goes on.", 130)
  if report["stopped"]:
    _stop("stopped; the same command goes on.", 130)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
