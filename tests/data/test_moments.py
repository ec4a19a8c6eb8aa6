"""A store gives back what was written, to whom it belongs."""

import dataclasses
import hashlib
import os
import pathlib
import struct
import subprocess
import sys
import tracemalloc
from concurrent import futures

import ml_dtypes
import numpy as np
import pytest
from small_store import (
  ABOUT,
  IDS,
  arrays,
  check_whole,
  facts,
  fill,
  is_sentence,
)

from photochat_jax.data import moments
from photochat_jax.data.moments import MomentsError
from photochat_jax.data.moments_files import FileFacts, Writer


def test_a_photo_and_its_mirror_image_come_back(tmp_path):
  fill(tmp_path, photos_per_shard=4)
  store = moments.open_store(tmp_path, ABOUT.weights_hash, ABOUT.transform)
  check_whole(store)
  assert store.about == ABOUT
  assert len(list(tmp_path.glob("moments/*.array_record"))) == 3
  assert store.get("train/other") is None and "train/other" not in store
  assert store.missing(["z", *IDS, "a"]) == ["z", "a"]


def test_ids_may_be_any_text(tmp_path):
  ids = ["url/ä", "\ud83d", "😀/..", "", '"\\\n', "a" * 5000]
  about = dataclasses.replace(ABOUT, shape=(3,))
  with Writer(tmp_path, about) as writer:
    for i, photo_id in enumerate(ids):
      array = np.full(3, i, np.float16)
      writer.add(photo_id, FileFacts(i, ""), array, -array)
  store = moments.open_store(tmp_path)
  for i, photo_id in enumerate(ids):
    np.testing.assert_array_equal(store.get(photo_id), [i] * 3)
    np.testing.assert_array_equal(store.get(photo_id, True), [-i] * 3)


def test_kinds_lie_beside_each_other(tmp_path):
  features = dataclasses.replace(ABOUT, kind="features", shape=(5, 16))
  fill(tmp_path)
  fill(tmp_path, IDS[:3], features)
  check_whole(moments.open_store(tmp_path))
  store = moments.open_store(tmp_path, kind="features")
  check_whole(store, IDS[:3])
  with pytest.raises(MomentsError, match="must be one of"):
    moments.open_store(tmp_path, kind="latents")


def test_the_shards_of_two_hosts_are_those_of_one(tmp_path):
  one, two = (Writer(tmp_path, ABOUT, host, 2) for host in range(2))
  with one, two:
    for i, photo_id in enumerate(IDS):
      writer = two if i % 2 else one
      writer.add(photo_id, facts(photo_id), *arrays(photo_id))
  names = sorted(path.name for path in tmp_path.glob("moments/*.json"))
  assert names == [
    *(f"{n:05d}-{host:03d}.json" for n in range(3) for host in range(2)),
    "about.json",
  ]
  check_whole(moments.open_store(tmp_path))


def test_a_photo_written_again_counts_from_then_on(tmp_path):
  fill(tmp_path, photos_per_shard=3)
  new = np.ones((2, *ABOUT.shape), np.float16)
  # By another host, whose first shard it is.
  with Writer(tmp_path, ABOUT, host=7) as writer:
    writer.add(IDS[1], FileFacts(3, "f"), *new)
  store = moments.open_store(tmp_path)
  np.testing.assert_array_equal(store.get(IDS[1]), new[0])
  np.testing.assert_array_equal(store.get(IDS[2]), arrays(IDS[2])[0])
  assert len(store) == len(IDS)


def test_a_replaced_file_is_noticed(tmp_path):
  fill(tmp_path)
  store = moments.open_store(tmp_path)
  blob = tmp_path / "blobs" / f"{facts(IDS[0]).sha256}.jpg"  # Not looked at.
  same, longer = tmp_path / "same.jpg", tmp_path / "longer.jpg"
  same.write_bytes(IDS[1].encode())
  longer.write_bytes(IDS[2].encode() + b"!")
  paths = {
    IDS[0]: str(blob),
    IDS[1]: same,
    IDS[2]: longer,
    IDS[3]: tmp_path / "gone.jpg",
    IDS[4]: tmp_path / "blobs" / f"{'0' * 64}.jpg",
    "train/other": longer,
  }
  assert store.changed(paths) == [IDS[2], IDS[3], IDS[4]]


def test_the_hash_of_weights_is_that_of_their_values():
  kernel = np.array([[1.5, -2.0, 0.25]], np.float32)
  bias = np.array(3.0, np.float32)
  got = moments.weights_hash({"b": bias, "a/kernel": kernel}, {"y": 1, "x": 2})
  parts = [
    ("a/kernel", "(1, 3)", struct.pack("<3f", 1.5, -2.0, 0.25)),
    ("b", "()", struct.pack("<f", 3.0)),
  ]
  text = '{"x": 2, "y": 1}' + "".join(
    f"\n{path} {shape} {hashlib.sha256(content).hexdigest()}"
    for path, shape, content in parts
  )
  assert got == hashlib.sha256(text.encode()).hexdigest()


def test_the_hash_of_weights_does_not_know_their_dtype():
  rng = np.random.default_rng(0)
  half = rng.normal(size=(4, 4)).astype(ml_dtypes.bfloat16)
  same = moments.weights_hash({"a": half}, {})
  wide = half.astype(np.float32)
  assert moments.weights_hash({"a": wide}, {}) == same
  assert moments.weights_hash({"a": np.asfortranarray(wide)}, {}) == same
  bit = wide.copy()
  bit.view(np.uint32)[2, 3] ^= 1
  for other in ({"a": bit}, {"b": wide}, {"a": wide[None]}):
    assert moments.weights_hash(other, {}) != same
  assert moments.weights_hash({"a": wide}, {"norm_num_groups": 8}) != same


def test_transforms_differ_where_photos_do():
  names = {
    moments.photo_transform(512),
    moments.photo_transform(256),
    moments.photo_transform(1024, 512),
    moments.vision_transform(512),
    moments.vision_transform(224),
  }
  assert len(names) == 5
  # A photo no larger than a tile is encoded whole.
  assert moments.photo_transform(512, 512) == moments.photo_transform(512)


@pytest.mark.parametrize(
  "changes, match",
  [
    ({"weights_hash": "ab" * 31 + "ac"}, "other weights"),
    ({"transform": "of 16 px"}, "other photos, 'of 8 px' there and 'of 16 px'"),
  ],
)
def test_a_store_of_something_else_is_refused(tmp_path, changes, match):
  fill(tmp_path)
  other = dataclasses.replace(ABOUT, **changes)
  with pytest.raises(MomentsError, match=match) as opened:
    moments.open_store(tmp_path, other.weights_hash, other.transform)
  with pytest.raises(MomentsError, match=match):
    Writer(tmp_path, other)
  assert is_sentence(opened.value)
  assert str(tmp_path) in str(opened.value)
  assert (
    "`python tools/precompute.py --workdir=RUN --dataset=photochat "
    "--path=/photos --out=NEW_FOLDER`"
  ) in str(opened.value)
  check_whole(moments.open_store(tmp_path))  # Nothing was touched.


def test_no_store_names_the_command(tmp_path):
  with pytest.raises(MomentsError, match=r"--features`\.$") as error:
    moments.open_store(tmp_path / "new", kind="features")
  assert is_sentence(error.value)
  assert not (tmp_path / "new").exists()
  with pytest.raises(MomentsError, match="must be on a disk"):
    moments.open_store("gs://bucket/moments")


def test_threads_share_a_store(tmp_path, monkeypatch):
  monkeypatch.setattr(moments, "_OPEN", 2)
  fill(tmp_path, photos_per_shard=2)  # Five shards, of which two stay open.
  store = moments.open_store(tmp_path)

  def read(seed):
    rng = np.random.default_rng(seed)
    for _ in range(200):
      photo_id, flipped = IDS[rng.integers(len(IDS))], rng.random() < 0.5
      want = arrays(photo_id)[int(flipped)]
      np.testing.assert_array_equal(store.get(photo_id, flipped), want)

  with futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(read, range(8)))
  assert len(store._readers) == 2


def resident():
  """Bytes of memory that this process holds."""
  pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
  return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs Linux")
def test_memory_is_flat(tmp_path):
  about = dataclasses.replace(ABOUT, shape=(64, 64, 8))  # 128 KiB a photo.
  ids = [f"{i}" for i in range(200)]
  with Writer(tmp_path, about, photos_per_shard=50) as writer:
    array = np.zeros(about.shape, np.float16)
    for photo_id in ids:
      writer.add(photo_id, facts(photo_id), array, array)
  store = moments.open_store(tmp_path)

  def epoch():
    for photo_id in ids:
      store.get(photo_id)
      store.get(photo_id, True)

  epoch()
  tracemalloc.start()
  epoch()
  held, before = tracemalloc.get_traced_memory()[0], resident()
  for _ in range(3):
    epoch()
  grown = tracemalloc.get_traced_memory()[0] - held
  tracemalloc.stop()
  assert grown < 1 << 16
  # Of 75 MiB that were read.
  assert resident() - before < 4 << 20


def test_the_speed_is_counted_in_photos_and_their_bytes(tmp_path):
  store = moments.open_store(fill(tmp_path))
  for threads in (1, 2):
    speed = moments.reading_speed(store, threads, reads=50)
    assert speed.photos > 0
    np.testing.assert_allclose(
      speed.megabytes / speed.photos, 4 * 4 * 8 * 2 / 1e6
    )


def test_reading_loads_no_framework(tmp_path):
  fill(tmp_path)
  code = (
    "import sys; from photochat_jax.data import moments; "
    f"store = moments.open_store({str(tmp_path)!r}); "
    f"print(store.get({IDS[0]!r}).shape, sorted("
    "{'tensorflow', 'jax', 'torch'} & set(sys.modules)))"
  )
  program = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=False,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert program.stdout == "(4, 4, 8) []\n", program.stderr
