r"""What a run's autoencoder makes of every photo of a data set, on the disk.

  python tools/precompute.py --workdir=RUN --dataset=photochat --path=DIR \
    --out=OUT

Training with --config.data.moments=OUT then encodes nothing. `--features` adds
what the ViT makes of them, for runs in which it is frozen. RUN is a trained
run, or one that tools/convert_hf.py made. OUT/moments has, for a photo of 512
pixels, 64 KiB, and as much for its mirror image; OUT/features 0.7 MB each for
BLIP-2's.

After a kill or new photos the same command goes on where it was. On several
machines, start it on each one, with OUT on a disk that all of them see; where
JAX does not connect them, --host=0 --hosts=4 and so on divide the photos.
"""

import sys

import jax
from absl import app, flags, logging

from photochat_jax import precompute
from photochat_jax.data import sources
from photochat_jax.runtime import cluster

_WORKDIR = flags.DEFINE_string("workdir", None, "The run.", required=True)
_DATASET = flags.DEFINE_enum(
  "dataset", "photochat", list(sources.READERS), "Of which kind the data are."
)
_PATH = flags.DEFINE_string("path", None, "Their folder.", required=True)
_OUT = flags.DEFINE_string("out", None, "The store's folder.", required=True)
_FEATURES = flags.DEFINE_bool("features", False, "What the ViT sees, too.")
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 16, "Photos encoded at a time.", lower_bound=1
)
_PHOTOS_PER_SHARD = flags.DEFINE_integer(
  "photos_per_shard", 512, "What a kill loses at most.", lower_bound=1
)
_HOST = flags.DEFINE_integer("host", None, "Which of --hosts this one is.")
_HOSTS = flags.DEFINE_integer("hosts", None, "Machines that share the work.")


def _hosts() -> tuple[int, int]:
  """This machine's index, and the number of machines."""
  if _HOSTS.value is None and _HOST.value is None:
    cluster.start()
    return jax.process_index(), jax.process_count()
  host, hosts = _HOST.value, _HOSTS.value
  if host is None or hosts is None or not 0 <= host < hosts:
    raise ValueError(
      f"--host={host} --hosts={hosts} must be given together, host from 0 to "
      "hosts - 1."
    )
  return host, hosts


def main(argv: list[str]) -> None:
  """Encodes, or says in one sentence why not."""
  logging.set_verbosity(logging.ERROR)  # Orbax tells much.
  if len(argv) > 1:
    sys.exit(f"{argv[1]!r} is not a flag; flags are written --name=value.")
  try:
    host, hosts = _hosts()
    photos, missing = precompute.find_photos(_DATASET.value, _PATH.value)
    if host == 0:
      print(f"{len(photos)} photos have a file, {missing} have none.")
    for kind in ("moments", *["features"] * _FEATURES.value):
      report = precompute.precompute(
        _WORKDIR.value,
        photos,
        _OUT.value,
        kind,
        _BATCH_SIZE.value,
        host,
        hosts,
        _PHOTOS_PER_SHARD.value,
        _DATASET.value,
        _PATH.value,
      )
      print(report)
  except ValueError as error:
    sys.exit(f"precompute: {error}")
  except KeyboardInterrupt:
    print("Stopped; the same command goes on from here.")
    sys.exit(130)


if __name__ == "__main__":
  app.run(main)
