"""Fills a store with what a run's frozen networks make of photos.

Each host takes every n-th photo and writes shards of its own
(`data/moments_files.py`). Hosts never wait for each other, so that they need
not even be connected, and each divides its batches over its devices. All
batches have one shape, the last one padded: one program. While a batch is
encoded, threads decode the photos of the next.
"""

import collections
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from photochat_jax import record
from photochat_jax.checkpoints import manager
from photochat_jax.config import RunConfig
from photochat_jax.data import (
  bars,
  images,
  moments,
  moments_files,
  records,
  sources,
)
from photochat_jax.encoders import Encoder, identity
from photochat_jax.models.photochat import Params, PhotoChat
from photochat_jax.ops import partition

_NAMED = 20  # Damaged photos that a report spells out.


class Report(NamedTuple):
  """What became of a host's photos.

  Attributes:
    kind: 'moments' or 'features'.
    folder: of the store.
    encoded: number of photos encoded now.
    there: number of photos that the store had already.
    broken: photo id -> why it cannot be used.
    seconds: that encoding took, compilation and all.
  """

  kind: str
  folder: str
  encoded: int
  there: int
  broken: dict[str, str]
  seconds: float

  def __str__(self):
    lines = [
      f"{self.kind}: {self.encoded} photos encoded, each with its mirror "
      f"image, in {self.seconds:.0f} s; {self.there} were there already, "
      f"{len(self.broken)} are damaged; in {self.folder}"
    ]
    named = list(self.broken.items())[:_NAMED]
    lines += [f"  damaged: {photo_id}: {why}" for photo_id, why in named]
    if len(self.broken) > _NAMED:
      lines.append(f"  damaged: and {len(self.broken) - _NAMED} more")
    return "\n".join(lines)


def find_photos(
  source: str, path: epath.PathLike
) -> tuple[dict[str, epath.Path], int]:
  """The photos of all splits of a data set.

  Args:
    source: its name, of `data.sources.READERS`.
    path: its folder.

  Returns:
    Photo id -> file, and the number of photos that have none.

  Raises:
    ValueError: it cannot be read.
  """
  files: dict[str, epath.Path | None] = {}
  for split in sources.list_splits(source, path) or ("train",):
    dialogues, _ = sources.read_split(source, path, split)
    files |= {p.id: p.path for p in records.list_photos(dialogues)}
  found = {i: file for i, file in files.items() if file is not None}
  return found, len(files) - len(found)


def precompute(
  workdir: str,
  photos: Mapping[str, epath.PathLike],
  out: epath.PathLike,
  kind: str = "moments",
  batch_size: int = 16,
  host: int = 0,
  hosts: int = 1,
  photos_per_shard: int = 512,
  source: str = "NAME",
  path: str = "DIR",
) -> Report:
  """Encodes the photos that a store does not have, or has of another file.

  Args:
    workdir: of the run whose newest weights are used.
    photos: photo id -> file; the same on every host.
    out: folder of the store.
    kind: 'moments' or 'features'.
    batch_size: photos at a time, rounded up to a multiple of the devices.
    host: index of this machine. It takes the photos host, host + hosts, ...
      in the order of their ids.
    hosts: number of machines.
    photos_per_shard: what is lost at most when the process is killed.
    source: the data set's name, for what the store says later.
    path: its folder, likewise.

  Raises:
    ValueError: the run or the store cannot be used, or no photo can.
  """
  run = record.read(workdir)
  params = read_part(run, workdir, kind)
  encoder = Encoder(PhotoChat(run.model), kind)
  devices = jax.local_devices()
  rows = -(-batch_size // len(devices)) * len(devices)
  pixels = jax.ShapeDtypeStruct((rows, encoder.size, encoder.size, 3), np.uint8)
  shape = jax.eval_shape(encoder, params, pixels).shape[2:]
  weights_hash, transform = identity(run, params, kind)
  about = moments_files.About(
    kind, weights_hash, transform, shape, source=source, path=path
  )
  broken: dict[str, str] = {}
  with moments_files.Writer(out, about, host, photos_per_shard) as writer:
    store = moments.open_store(out, kind=kind)
    mine = {i: photos[i] for i in sorted(photos)[host::hosts]}
    old = {*store.missing(mine), *store.changed(mine)}
    todo = {i: file for i, file in mine.items() if i in old}
    started = time.monotonic()
    with bars.Bar(f"Encoding {kind}", len(todo), shown=host == 0) as bar:
      batches = _load(encoder, todo, rows, broken)
      encode = _on_devices(encoder, params, devices, rows)
      done = 0
      for batch, arrays in _one_late(encode, batches):
        for loaded, straight, mirrored in zip(batch, *arrays, strict=False):
          writer.add(loaded.id, loaded.facts, straight, mirrored)
        done += len(batch)
        said = f"Encoding {kind}, {len(broken)} damaged"
        bar.reach(done + len(broken), said)
      bar.reach(len(todo), f"Encoding {kind}, {len(broken)} damaged")
  if broken and len(broken) == len(mine):
    raise moments.MomentsError(
      f"None of {len(mine)} photos can be used; {next(iter(broken.values()))}"
    )
  return Report(
    kind=kind,
    folder=os.fspath(writer.folder),
    encoded=len(todo) - len(broken),
    there=len(mine) - len(todo),
    broken=broken,
    seconds=time.monotonic() - started,
  )


def read_part(run: RunConfig, workdir: str, kind: str) -> Params:
  """What a kind applies of the parameters, from the newest checkpoint.

  Nothing else is read: the rest may be a hundred times as large.

  Args:
    run: the settings.
    workdir: their folder.
    kind: 'moments' or 'features'.

  Returns:
    Numpy arrays in their part; averaged ones where the run averages the part.

  Raises:
    CheckpointError: there is none, or it is damaged.
  """
  encoder = Encoder(PhotoChat(run.model), kind)
  with manager.Checkpoints(workdir, model=run.as_dict()["model"]) as saved:
    step = saved.latest()
    dtypes = saved.dtypes(step)
    averaged = any(path.startswith(f"ema/{encoder.part}/") for path in dtypes)
    top = f"{'ema' if averaged else 'params'}/{encoder.part}"
    leaves = {
      f"{top}/{path}": jax.ShapeDtypeStruct(
        leaf.shape, dtypes.get(f"{top}/{path}", leaf.dtype)
      )
      for path, leaf in encoder.shapes().items()
    }
    found = saved.read_part(leaves, step)
  (part,) = partition.unflatten(found).values()
  return part


def _on_devices(
  encoder: Encoder, params: Params, devices: Sequence[Any], rows: int
) -> Callable[[Sequence["_Loaded"]], jax.Array]:
  """Encodes up to `rows` photos, divided over devices of this process."""
  mesh = jax.make_mesh(
    (len(devices),), ("photos",), (AxisType.Auto,), devices=devices
  )

  def place(*axes):
    return NamedSharding(mesh, PartitionSpec(*axes))

  params = jax.device_put(params, place())
  program = jax.jit(encoder, out_shardings=place(None, "photos"))

  def encode(batch):
    pixels = np.stack([loaded.pixels for loaded in batch])
    pixels = np.pad(pixels, ((0, rows - len(batch)), *[(0, 0)] * 3))
    return program(params, jax.device_put(pixels, place("photos")))

  return encode


def _one_late(function: Callable, items: Iterable) -> Iterator[tuple]:
  """(item, numpy array of what `function` makes of it), the next begun."""
  waiting = None
  for item in items:
    made = function(item)
    if waiting:
      yield waiting[0], np.asarray(waiting[1])
    waiting = item, made
  if waiting:
    yield waiting[0], np.asarray(waiting[1])


class _Loaded(NamedTuple):
  """A photo on its way to a device."""

  id: str
  facts: moments_files.FileFacts
  pixels: np.ndarray


def _load(
  encoder: Encoder,
  paths: Mapping[str, epath.PathLike],
  rows: int,
  broken: dict[str, str],
) -> Iterator[list[_Loaded]]:
  """Batches of photos, decoded by threads; why others are not: in `broken`."""

  def load(photo_id):
    path = epath.Path(paths[photo_id])
    try:
      content = path.read_bytes()
      image = images.decode(content, str(path))
    except images.ImageError as error:
      return photo_id, str(error)
    except OSError as error:
      return photo_id, f"{path} cannot be read: {error}"
    digest = hashlib.sha256(content).hexdigest()
    facts = moments_files.FileFacts(len(content), digest)
    return photo_id, _Loaded(photo_id, facts, encoder.prepare(image))

  batch: list[_Loaded] = []
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    ids = iter(paths)
    waiting = collections.deque(
      pool.submit(load, i) for i in itertools.islice(ids, 2 * rows)
    )
    while waiting:
      photo_id, found = waiting.popleft().result()
      waiting.extend(pool.submit(load, i) for i in itertools.islice(ids, 1))
      if isinstance(found, str):
        broken[photo_id] = found
        continue
      batch.append(found)
      if len(batch) == rows:
        yield batch
        batch = []
  if batch:
    yield batch
