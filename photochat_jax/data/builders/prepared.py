"""Reads what the builders have prepared, as their readers read its source.

`PATH` is any folder above it: where `tfds build` put it with --data_dir, or
<name>, <name>/<config> or <name>/<config>/<version> below that. Photos and
written captions are looked for in the same `PATH`. So after

    tfds build photochat_jax/data/builders/photochat --config=text \
        --manual_dir=DIR --data_dir=DIR --file_format=array_record

`read_split(DIR, split)` is `photochat.read_split(DIR, split)`, and reads no
JSON. The files are ArrayRecord, because those are read without TensorFlow.
"""

import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from photochat_jax.data import fetch_rules, photo_store, records
from photochat_jax.data.builders import examples
from photochat_jax.data.records import MAX_BROKEN, Captions
from photochat_jax.data.schema import SPLITS, Coverage, Dialogue

_NAMES = ("photochat", "dialogcc")
_INFO = "dataset_info.json"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_FORMAT = "array_record"


def _number(folder: epath.Path) -> tuple[int, ...]:
  return tuple(map(int, folder.name.split(".")))


def find(path: epath.PathLike) -> epath.Path:
  """Finds the newest version of the one data set prepared in a folder.

  Args:
    path: the folder, as the module says.

  Returns:
    The folder with its `dataset_info.json`.

  Raises:
    ValueError: there is none, or more than one.
  """
  path = epath.Path(path)
  if (path / _INFO).exists():
    return path
  versions: dict[epath.Path, list[epath.Path]] = {}
  for folder in (path, *(path / name for name in _NAMES)):
    for pattern in (f"*/{_INFO}", f"*/*/{_INFO}"):
      for file in folder.glob(pattern):
        if _VERSION.fullmatch(file.parent.name):
          versions.setdefault(file.parent.parent, []).append(file.parent)
  if not versions:
    raise ValueError(
      f"No data set is prepared in {path}: build one with --data_dir={path}, "
      "as photochat_jax/data/builders/photochat/README.md says."
    )
  if len(versions) > 1:
    raise ValueError(
      f"{path} has several prepared data sets; give the path of one: "
      f"{', '.join(sorted(map(str, versions)))}."
    )
  [folders] = versions.values()
  return max(folders, key=_number)


def _open(path: epath.PathLike) -> Any:
  """The `tfds.core.DatasetBuilder` of what is prepared in a folder.

  Raises:
    ValueError: it cannot be read here.
  """
  # Half a second, which who reads other data sets need not wait for.
  import tensorflow_datasets as tfds

  folder = find(path)
  builder = tfds.builder_from_directory(folder)
  info = builder.info
  if "annotations" not in (info.metadata or {}):
    raise ValueError(
      f"{folder} was not prepared by a builder of photochat_jax: name the "
      "folder of one that was."
    )
  kind = info.file_format.value if info.file_format else None
  if kind != _FORMAT:
    raise ValueError(
      f"{folder} has files of the format {kind}: build it with "
      f"--file_format={_FORMAT} --overwrite."
    )
  return builder


def list_splits(path: epath.PathLike) -> tuple[str, ...]:
  """The splits, of `SPLITS`, that a prepared data set has.

  Raises:
    ValueError: there is none that can be read.
  """
  splits = _open(path).info.splits
  return tuple(s for s in SPLITS if s in splits)


def read_split(
  path: epath.PathLike,
  split: str,
  caption_source: str = "given",
  max_broken: float = MAX_BROKEN,
  quarantine: records.Quarantine | None = None,
) -> tuple[list[Dialogue], Coverage]:
  """Reads one split of a prepared data set.

  Args:
    path: the folder, as the module says.
    split: 'train', 'dev' or 'test'.
    caption_source: one of `records.CAPTION_SOURCES`.
    max_broken: the share of broken records, 0 to 1, that is borne: those that
      were left out when it was built.
    quarantine: takes these.

  Returns:
    The dialogues, in the order of the source, and what was found.

  Raises:
    ValueError: there is no such data set, or no such split, or it cannot be
      read, or too many records were broken.
  """
  captions = Captions(caption_source, path)
  builder = _open(path)
  if split not in builder.info.splits:
    raise ValueError(
      f"There is no {split} split in {builder.data_path}; it has "
      f"{', '.join(builder.info.splits)}."
    )
  placed = [
    (int(example["position"]), examples.decode(example, split, captions))
    for example in builder.as_data_source(split)
  ]
  dialogues = [d for _, d in sorted(placed, key=lambda item: item[0])]
  path = epath.Path(path)
  rows = [
    records.Row(**{**row, "file": str(path / row["file"])})
    for row in builder.info.metadata[split]["left_out"]
  ]
  read = records.Read(dialogues, rows, len(dialogues) + len(rows))
  return records.finish(read, split, path, captions, max_broken, quarantine)


def _packed_photos(builder: Any) -> Iterator[tuple[str, str, bytes]]:
  """The id, address and file of every photo packed, each time it is."""
  for split in builder.info.splits:
    for example in builder.as_data_source(split):
      turns = example["turns"]
      names = ("photo_id", "photo_url", "photo")
      for photo_id, url, data in zip(*(turns[n] for n in names), strict=True):
        if data:
          yield photo_id.decode(), url.decode(), data


def unpack_photos(
  path: epath.PathLike, folder: epath.PathLike | None = None
) -> int:
  """Makes files of the photos that a data set was prepared with.

  Training opens photos by path. They are written where `photo_store.find`
  looks for them, once; what is there already stays as it is.

  Args:
    path: the prepared data set's folder, as the module says.
    folder: gets them, below its `photos/`; without, `path` does.

  Returns:
    How many were written.

  Raises:
    ValueError: there is no such data set, it was prepared without photos, or
      the folder is not on this machine.
  """
  builder, count = _open(path), 0
  folder = path if folder is None else folder
  if "photo" not in builder.info.features["turns"].feature:
    raise ValueError(
      f"{builder.data_path} was prepared without photos: unpack one of a "
      "config whose name ends in with_photos."
    )
  with photo_store.Writer(folder) as writer:
    rows = photo_store.read_manifest(folder).rows
    there = {i for i, row in rows.items() if row.status == photo_store.OK}
    for photo_id, url, data in _packed_photos(builder):
      if photo_id in there:
        continue
      there.add(photo_id)
      photo = fetch_rules.examine(data)
      extension = fetch_rules.EXTENSIONS[photo.format]
      digest, name = writer.keep(data, extension)
      writer.append(
        photo_store.Row(
          id=photo_id,
          url=url,
          status=photo_store.OK,
          sha256=digest,
          file=name,
          bytes=len(data),
          width=photo.width,
          height=photo.height,
          format=photo.format,
        )
      )
      count += 1
  return count
