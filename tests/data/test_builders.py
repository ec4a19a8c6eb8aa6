"""The builders of prepared data sets, on made-up data, and the way back.

The data are in each builder's `dummy_data`: a photo that is there, one that is
missing, one that is a web page; own fields of a turn; words beyond ASCII.
"""

import functools
import hashlib
import http.server
import json
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from photochat_jax.data import photo_store, photochat, records, sources
from photochat_jax.data.builders import base, prepared
from photochat_jax.data.builders.dialogcc import dialogcc_dataset_builder
from photochat_jax.data.builders.photochat import photochat_dataset_builder

SAMPLE = pathlib.Path(__file__).parent / "photochat_sample"
BUILDERS = {
  "photochat": photochat_dataset_builder.Builder,
  "dialogcc": dialogcc_dataset_builder.Builder,
}
CONFIGS = {
  "photochat": ("text", "with_photos"),
  "dialogcc": ("noncommercial", "noncommercial_with_photos"),
}


class TestPhotoChat(tfds.testing.DatasetBuilderTestCase):
  DATASET_CLASS = photochat_dataset_builder.Builder
  SPLITS = {"train": 4, "dev": 1, "test": 1}


class TestDialogCC(tfds.testing.DatasetBuilderTestCase):
  DATASET_CLASS = dialogcc_dataset_builder.Builder
  SPLITS = {"train": 2, "dev": 1, "test": 1}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  """TFDS asks Google's bucket whether it has a data set."""
  monkeypatch.setattr(tfds.core.utils.gcs_utils, "_is_gcs_disabled", True)
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def dummy(name):
  return BUILDERS[name].code_path.parent / "dummy_data"


def build(folder, name, config, to=None, cls=None, **options):
  """Prepares the data set of a folder, in that folder."""
  builder = (cls or BUILDERS[name])(
    data_dir=to or folder, config=config, file_format="array_record"
  )
  options.setdefault("manual_dir", folder)
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(**options)
  )
  return builder


def examples(builder, split):
  found = builder.as_data_source(split)
  return sorted(found, key=lambda example: example["position"])


CASES = [(name, config) for name in CONFIGS for config in CONFIGS[name]]


@pytest.mark.parametrize(("name", "config"), CASES)
def test_reading_what_is_prepared_is_reading_the_folder(name, config, tmp_path):
  shutil.copytree(dummy(name), tmp_path, dirs_exist_ok=True)
  some = sources.read_split(name, tmp_path, "train")[0]
  shown = [photo.id for photo in records.list_photos(some)]
  (tmp_path / records.CAPTION_FILE).write_text(
    json.dumps({"photo_id": shown[0], "caption": "written"}) + "\nhalf a row {"
  )
  build(tmp_path, name, config)
  assert prepared.list_splits(tmp_path) == ("train", "dev", "test")
  for split in ("train", "dev", "test"):
    for source in records.CAPTION_SOURCES:
      theirs, ours = records.Quarantine(), records.Quarantine()
      there = sources.read_split(
        name, tmp_path, split, source, quarantine=theirs
      )
      here = prepared.read_split(tmp_path, split, source, quarantine=ours)
      assert here == there
      assert ours.rows == theirs.rows
      assert len(theirs.rows) == (source == "written")
  assert any(d.facts for d in some)
  assert [photo.path for photo in records.list_photos(some)].count(None) == 1


def test_real_dialogues_come_back_in_order(tmp_path):
  build(SAMPLE, "photochat", "text", tmp_path)
  for split, count in (("train", 40), ("dev", 16), ("test", 16)):
    here, there = (
      read(path, split)
      for read, path in (
        (prepared.read_split, tmp_path),
        (photochat.read_split, SAMPLE),
      )
    )
    assert here == there
    assert len(here[0]) == count


def test_what_is_broken_is_borne_told_and_quarantined(tmp_path):
  whole = json.loads((SAMPLE / "train/train_00.json").read_text("utf-8"))
  (tmp_path / "train").mkdir()
  (tmp_path / "train/train_00.json").write_text(
    json.dumps([*whole[:3], {"dialogue": "\ud800"}, 7])
  )
  with pytest.raises(ValueError, match="2 of 5 records .* cannot be used"):
    build(tmp_path, "photochat", "text")
  config = base.DialogueConfig(name="lenient", max_broken=0.5)
  build(tmp_path, "photochat", config)
  with pytest.raises(ValueError, match="2 of 5 records .* cannot be used"):
    prepared.read_split(tmp_path, "train")
  theirs, ours = records.Quarantine(), records.Quarantine()
  there = photochat.read_split(
    tmp_path, "train", max_broken=0.5, quarantine=theirs
  )
  here = prepared.read_split(tmp_path, "train", max_broken=0.5, quarantine=ours)
  assert here == there
  assert ours.rows == theirs.rows
  assert [row.position for row in ours.rows] == ["record 3", "record 4"]
  metadata = (tmp_path / "photochat/lenient/1.0.0/metadata.json").read_text()
  assert str(tmp_path) not in metadata  # What is built can be passed on.


def test_photos_are_packed_as_they_are(tmp_path):
  builder = build(dummy("photochat"), "photochat", "with_photos", tmp_path)
  photos = dummy("photochat") / "photos"
  boat = (photos / "train/00000000000000b0.jpg").read_bytes()
  dog = (photos / "train/00000000000000b2.png").read_bytes()
  found = [e["turns"]["photo"] for e in examples(builder, "train")]
  assert found == [
    [b"", b"", boat, b""],
    [b"", b"", b"", b""],  # It is missing.
    [b"", dog, b"", boat, b""],
    [b"", b""],
  ]
  flags = [e["turns"]["has_photo"] for e in examples(builder, "train")]
  assert flags == [[data != b"" for data in row] for row in found]
  [page] = examples(builder, "dev")  # A web page where the photo was.
  assert page["turns"]["share_photo"] == [False, False, True]
  assert page["turns"]["has_photo"] == [False, False, False]
  assert page["turns"]["photo"] == [b"", b"", b""]
  train, dev = (builder.info.metadata[s] for s in ("train", "dev"))
  assert (train["photos_asked"], train["photos_found"]) == (3, 2)
  assert train["photos_broken"] == {}
  [(photo, why)] = dev["photos_broken"].items()
  assert photo == "validation/00000000000000c0"
  assert why.startswith("not_photo")


def test_without_packing_a_photo_s_file_is_flagged(tmp_path):
  builder = build(dummy("photochat"), "photochat", "text", tmp_path)
  first, second, *_ = examples(builder, "train")
  assert first["turns"]["has_photo"] == [False, False, True, False]
  assert second["turns"]["has_photo"] == [False] * 4
  assert "photo" not in first["turns"]
  assert first["turns"]["photo_id"][2] == b"train/00000000000000b0"
  flag = builder.info.features["turns"]["share_photo"]
  assert flag.np_dtype == np.bool_


@pytest.mark.parametrize(("name", "config"), [c for c in CASES if "_" in c[1]])
def test_photos_can_be_unpacked_again(name, config, tmp_path):
  build(dummy(name), name, config, tmp_path / "set")
  there = {}
  for split in ("train", "dev", "test"):
    for photo in records.list_photos(
      sources.read_split(name, dummy(name), split)[0]
    ):
      if photo.path is not None and b"<html>" not in photo.path.read_bytes():
        there[photo.id] = photo.path.read_bytes()
  assert prepared.unpack_photos(tmp_path / "set") == len(there)
  found = photo_store.find(tmp_path / "set", there)
  assert {i: path.read_bytes() for i, path in found.items()} == there
  dialogues, coverage = prepared.read_split(tmp_path / "set", "train")
  shown = {photo.id for photo in records.list_photos(dialogues)}
  assert coverage.photos_found == len(shown & set(there)) > 0
  assert prepared.unpack_photos(tmp_path / "set") == 0
  elsewhere = tmp_path / "elsewhere"
  assert prepared.unpack_photos(tmp_path / "set", elsewhere) == len(there)
  assert photo_store.find(elsewhere, there).keys() == there.keys()


PROGRAM = """
import runpy, sys
import tensorflow_datasets as tfds
from photochat_jax.data.builders import prepared
tfds.core.utils.gcs_utils._is_gcs_disabled = True
folder = sys.argv[1]
sys.argv = [
  "build", "photochat", "--config=text", "--file_format=array_record",
  f"--manual_dir={folder}", f"--data_dir={sys.argv[2]}",
]
try:
  runpy.run_module("photochat_jax.data.builders", run_name="__main__")
except SystemExit as e:
  assert not e.code, e.code
print(len(prepared.read_split(sys.argv[-1].partition("=")[2], "train")[0]))
print([name for name in ("tensorflow", "jax", "torch") if name in sys.modules])
"""


def test_the_command_and_the_way_back_need_no_tensorflow(tmp_path):
  run = subprocess.run(
    [sys.executable, "-c", PROGRAM, str(dummy("photochat")), str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert run.stdout.split("\n")[-3:] == ["4", "[]", ""], run.stdout + run.stderr


class QuietHandler(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *_):
    pass


@pytest.fixture
def server(tmp_path):
  """A folder, and the address that it is published at."""
  folder = tmp_path / "published"
  shutil.copytree(dummy("photochat"), folder)
  handler = functools.partial(QuietHandler, directory=folder)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()


def published_at(root, checksums):
  """PhotoChat's builder, for other addresses and another checksums.tsv."""

  class Local(photochat_dataset_builder.Builder, skip_registration=True):
    name = "photochat"
    pkg_dir_path = photochat_dataset_builder.Builder.code_path.parent
    _checksums_path = checksums
    URLS = {
      name: root + name
      for name in (
        "train/train_00.json",
        "train/train_01.json",
        "dev/dev_00.json",
        "test/test_00.json",
      )
    }

  return Local


def test_annotations_are_downloaded_registered_and_checked(server, tmp_path):
  folder, root = server
  checksums = tmp_path / "checksums.tsv"
  checksums.write_text("# Nothing yet.\n")

  def download(to, **options):
    cls = published_at(root, checksums)
    options["manual_dir"] = tmp_path / "nothing"
    return build(tmp_path / to, "photochat", "text", cls=cls, **options)

  builder = download("first", register_checksums=True)
  rows = [line.split("\t") for line in checksums.read_text().splitlines()]
  assert {row[0].removeprefix(root): row[2] for row in rows} == {
    name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
    for name in builder.URLS
  }
  # The files lie as the reader and tools/fetch_photos.py want them.
  downloaded = tmp_path / "first/downloads/photochat/annotations"
  read = photochat.read_split(downloaded, "train")[0]
  assert prepared.read_split(tmp_path / "first", "train")[0] == read

  builder = download("second")
  found = builder.info.metadata["annotations"]
  assert [about["as_published"] for about in found.values()] == [True] * 4
  (folder / "dev/dev_00.json").write_text("[]")
  wrong = tfds.download.download_manager.NonMatchingChecksumError
  with pytest.raises(wrong, match="dev_00.json"):
    download("third")


def test_a_folder_s_own_annotations_are_compared(tmp_path, caplog):
  shutil.copytree(dummy("dialogcc"), tmp_path, dirs_exist_ok=True)
  (tmp_path / "test.json").unlink()
  builder = build(tmp_path, "dialogcc", "noncommercial")
  assert list(builder.info.splits) == ["train", "dev"]
  found = builder.info.metadata["annotations"]
  digest = hashlib.sha256((tmp_path / "train.json").read_bytes()).hexdigest()
  assert found["train.json"] == {"sha256": digest, "as_published": False}
  assert list(found) == ["train.json", "valid.json"]
  assert "train.json is not the file of https://huggingface.co" in caplog.text


@pytest.mark.parametrize("name", BUILDERS)
def test_checksums_are_those_of_the_published_files(name):
  builder = BUILDERS[name]
  assert set(builder.url_infos) <= set(builder.URLS.values())
  for about in builder.url_infos.values():
    assert about.size > 0
    assert len(bytes.fromhex(about.checksum)) == 32


def test_published_files():
  urls = photochat_dataset_builder.Builder.URLS
  assert len(urls) == 21 + 2 + 2
  assert list(urls)[20:23] == [
    "train/train_20.json",
    "dev/dev_00.json",
    "dev/dev_01.json",
  ]
  builder = dialogcc_dataset_builder.Builder
  assert list(builder.URLS) == ["train.json", "valid.json", "test.json"]
  assert set(builder.url_infos) == set(builder.URLS.values())


@pytest.mark.parametrize("name", BUILDERS)
def test_licences_are_told(name, tmp_path):
  info = BUILDERS[name](data_dir=tmp_path, config=CONFIGS[name][0]).info
  licence = {"photochat": "CC BY 4.0", "dialogcc": "CC BY-NC-SA 4.0"}[name]
  assert licence in str(info.redistribution_info)
  assert licence in info.description
  assert {"photochat": "2021.acl-long.479", "dialogcc": "2212.04119"}[
    name
  ] in info.citation
  for config in dialogcc_dataset_builder.Builder.BUILDER_CONFIGS:
    assert config.name.startswith("noncommercial")


def test_faults_of_a_folder_are_one_sentence(tmp_path):
  with pytest.raises(ValueError, match="No data set is prepared in"):
    prepared.read_split(tmp_path, "train")
  one = build(dummy("photochat"), "photochat", "text", tmp_path / "one")
  folder = pathlib.Path(one.data_path)
  with pytest.raises(ValueError, match="There is no dev2 split in .* train"):
    prepared.read_split(folder, "dev2")
  with pytest.raises(ValueError, match="must be one of given, labels"):
    prepared.read_split(folder, "train", "guess")
  with pytest.raises(ValueError, match="prepared without photos"):
    prepared.unpack_photos(folder)

  newer = folder.with_name("1.10.0")
  shutil.copytree(folder, newer)
  shutil.copytree(folder, folder.with_name("incomplete.AB_1.11.0"))
  assert prepared.find(tmp_path / "one") == newer
  assert prepared.find(folder.parent) == newer
  assert prepared.find(folder.parent.parent) == newer
  assert prepared.find(folder) == folder
  shutil.copytree(folder.parent, folder.parent.with_name("other"))
  with pytest.raises(ValueError, match="several prepared data sets"):
    prepared.find(tmp_path / "one")

  foreign = folder / "metadata.json"
  foreign.write_text("{}")
  with pytest.raises(ValueError, match="not prepared by a builder of photo"):
    prepared.read_split(folder, "train")
  info = json.loads((newer / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  (newer / "dataset_info.json").write_text(json.dumps(info))
  with pytest.raises(ValueError, match="--file_format=array_record"):
    prepared.read_split(newer, "train")
