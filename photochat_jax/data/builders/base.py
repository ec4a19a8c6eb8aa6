"""What the builders of prepared data sets share: TFDS on top of the readers.

A builder takes the annotations from `--manual_dir`, where they lie as the
data set's reader wants them, or downloads them and lays such a folder,
`<download_dir>/<name>/annotations`. Photos are those that are in the folder.
`metadata.json` of what was built says

  source           name of the reader
  annotations      published file -> its `sha256`, and whether it is
                   `as_published`: the one of checksums.tsv; null where that
                   file has none
  <split>          `photos_asked` and `photos_found`, both of different photos;
                   `photos_broken`, id -> why it was not packed; `left_out`,
                   the records that cannot be used, as rows of
                   `data/quarantine.py` with the file below the folder
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from photochat_jax.data import fetch_rules, records, sources
from photochat_jax.data.builders import examples
from photochat_jax.data.schema import Photo

_BLOCK = 1 << 20


@dataclasses.dataclass(eq=False)
class DialogueConfig(tfds.core.BuilderConfig):
  """How a data set is prepared.

  Attributes:
    photos: pack the photos' files into the examples.
    max_broken: the share of broken records, 0 to 1, that is borne.
  """

  photos: bool = False
  max_broken: float = records.MAX_BROKEN


def _features(photos: bool) -> tfds.features.FeaturesDict:
  """The features of an example; `examples` says what they are."""
  text = tfds.features.Text
  turn = {
    "speaker": np.int32,
    "text": text(),
    "share_photo": np.bool_,
    "photo_id": text(),
    "photo_description": text(doc="PhotoChat: a list of labels"),
    "photo_caption": text(doc="'' where none is given"),
    "photo_url": text(),
    "has_photo": np.bool_,
  }
  if photos:
    # Not `Image`, which can neither be missing nor differ in size in a turn.
    turn["photo"] = tfds.features.Scalar(np.object_, doc="a file's bytes")
  return tfds.features.FeaturesDict({
    "position": np.int64,
    "dialogue_id": text(),
    "facts": text(doc="JSON; '' where there are none"),
    "turns": tfds.features.Sequence(turn),
  })


def _digest(file: epath.Path) -> str:
  """SHA-256 of a file, in hexadecimal digits."""
  digest = hashlib.sha256()
  with file.open("rb") as stream:
    while block := stream.read(_BLOCK):
      digest.update(block)
  return digest.hexdigest()


class _Packer:
  """Reads photos to be packed, those that are photos.

  Attributes:
    broken: id -> why it is none.
  """

  def __init__(self):
    self.broken: dict[str, str] = {}
    self._sound: set[str] = set()

  def __call__(self, photo: Photo) -> bytes:
    """The file of a photo that has one; b'' where it cannot be used."""
    if photo.id in self.broken:
      return b""
    try:
      data = photo.path.read_bytes()
      if photo.id not in self._sound:
        fetch_rules.examine(data)
    except (OSError, fetch_rules.Failure) as e:
      self.broken[photo.id] = str(e)
      logging.warning("Photo %s is not packed: %s", photo.id, e)
      return b""
    self._sound.add(photo.id)
    return data


class DialogueBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Prepares a data set that `sources.READERS` reads.

  Attributes:
    SOURCE: its name there.
    URLS: the published files: name in the reader's folder -> address.
    HOMEPAGE: where it is described.
    LICENSE: its licence, in a line.
  """

  SOURCE: ClassVar[str]
  URLS: ClassVar[Mapping[str, str]]
  HOMEPAGE: ClassVar[str]
  LICENSE: ClassVar[str]
  # One host has all of them.
  MAX_SIMULTANEOUS_DOWNLOADS = 4

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=_features(self.builder_config.photos),
      supervised_keys=None,
      homepage=self.HOMEPAGE,
      license=self.LICENSE,
      metadata=tfds.core.MetadataDict(source=self.SOURCE),
    )

  def _find_folder(
    self, dl_manager: tfds.download.DownloadManager
  ) -> epath.Path:
    """The folder to read: the user's own, or one of downloaded files."""
    try:
      folder = epath.Path(dl_manager.manual_dir)
    except AssertionError:  # There is none, or nothing in it.
      folder = None
    if folder is not None and sources.list_splits(self.SOURCE, folder):
      return folder
    target = epath.Path(dl_manager.download_dir) / self.name / "annotations"
    logging.warning(
      "%s has no annotations of %s: they are downloaded to %s.",
      folder or "The manual_dir",
      self.name,
      target,
    )
    for name, file in dl_manager.download(dict(self.URLS)).items():
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      epath.Path(file).copy(target / name, overwrite=True)
    return target

  def _look_at_annotations(self, folder: epath.Path) -> dict[str, Any]:
    """Hashes the published files that a folder has, and compares them."""
    found = {}
    for name, url in self.URLS.items():
      file = folder / name
      if not file.exists():
        continue
      digest = _digest(file)
      known = (self.url_infos or {}).get(url)
      same = None if known is None else known.checksum == digest
      if same is False:
        logging.warning(
          "%s is not the file of %s, whose SHA-256 is %s: it is used as it is.",
          file,
          url,
          known.checksum,
        )
      found[name] = {"sha256": digest, "as_published": same}
    return found

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator]:
    folder = self._find_folder(dl_manager)
    self.info.metadata["annotations"] = self._look_at_annotations(folder)
    return {
      split: self._generate_examples(folder, split)
      for split in sources.list_splits(self.SOURCE, folder)
    }

  def _generate_examples(
    self, folder: epath.Path, split: str
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a split; what was found goes into the metadata."""
    config, quarantine = self.builder_config, records.Quarantine()
    dialogues, coverage = sources.read_split(
      self.SOURCE,
      folder,
      split,
      max_broken=config.max_broken,
      quarantine=quarantine,
    )
    lacks = coverage.missing or coverage.broken
    logging.log(logging.WARNING if lacks else logging.INFO, "%s", coverage)
    packer = _Packer()
    self.info.metadata[split] = {
      "photos_asked": coverage.photos_asked,
      "photos_found": coverage.photos_found,
      "photos_broken": packer.broken,  # Filled below.
      "left_out": [
        row._replace(
          file=epath.Path(row.file).relative_to(folder).as_posix()
        )._asdict()
        for row in quarantine.rows
      ],
    }
    pack = packer if config.photos else None
    for position, dialogue in enumerate(dialogues):
      yield dialogue.id, examples.encode(dialogue, position, pack)
