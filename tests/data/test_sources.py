"""Data sets by name: one form, one way to ask."""

import functools
import inspect
import json
import pathlib
import shutil

import pytest
from etils import epath

from photochat_jax.data import json_files, records, schema, sources

DATA = pathlib.Path(__file__).parent
SAMPLES = {
  "photochat": ("train", "dev", "test"),
  "dialogcc": ("train", "dev", "test"),
  "photochat_plus": ("test",),
  "mmdialog": ("train", "dev"),
}


@pytest.mark.parametrize("source", SAMPLES)
def test_every_source_gives_the_one_form(source):
  folder = DATA / f"{source}_sample"
  assert sources.list_splits(source, folder) == SAMPLES[source]
  splits = {}
  for split in SAMPLES[source]:
    dialogues, coverage = sources.read_split(source, folder, split)
    assert all(type(d) is schema.Dialogue for d in dialogues)
    assert {d.split for d in dialogues} == {split}
    assert coverage.split == split
    assert coverage.dialogues == len(dialogues) > 0
    assert (coverage.broken, coverage.reasons) == ((), ())
    json.dumps([d.facts for d in dialogues])
    splits[split] = dialogues
  shared = schema.shared_photos(splits)
  if source == "mmdialog":
    assert shared == {"1000000000000000002": ("train", "dev")}
  else:
    assert shared == {}


def test_the_readers_are_asked_alike():
  # What TFDS prepared is read back in test_builders.
  assert list(sources.READERS) == [*SAMPLES, "tfds"]
  names = ["path", "split", "caption_source", "max_broken", "quarantine"]
  for reader in sources.READERS.values():
    signature = inspect.signature(reader)
    assert list(signature.parameters) == names
    defaults = [p.default for p in signature.parameters.values()][2:]
    assert defaults == ["given", 0.05, None]


@pytest.mark.parametrize(
  ("source", "split", "file"),
  [
    ("photochat", "dev", "dev/dev_00.json"),
    ("dialogcc", "dev", "valid.json"),
    ("photochat_plus", "test", "photochat_plus.json"),
    ("mmdialog", "dev", "valid/conversations.json"),
  ],
)
def test_options_arrive(tmp_path, source, split, file):
  folder = tmp_path / "data"
  shutil.copytree(DATA / f"{source}_sample", folder)
  records_there = json_files.read_items(epath.Path(folder / file))
  good = next(records_there).record
  (folder / file).write_text(json.dumps([good, 3, 3, 3]))
  quarantine = records.Quarantine(tmp_path / "quarantine.jsonl")
  ask = functools.partial(sources.read_split, source, folder, split)
  dialogues, coverage = ask(max_broken=0.75, quarantine=quarantine)
  assert len(dialogues) == 1
  assert coverage.reasons == (("the record is not an object", 3),)
  assert quarantine.counts() == {"the record is not an object": 3}
  assert len(quarantine.path.read_text().splitlines()) == 3
  with pytest.raises(ValueError, match="3 of 4 records .* not an object"):
    ask(max_broken=0.74)
  with pytest.raises(ValueError, match="There is no .*photo_captions"):
    ask("written")


def test_an_unknown_source(tmp_path):
  for ask in (
    lambda: sources.read_split("imagechat", tmp_path, "train"),
    lambda: sources.list_splits("imagechat", tmp_path),
  ):
    with pytest.raises(ValueError, match="'imagechat'.*photochat, dialogcc"):
      ask()
