"""What is written is whole; what is damaged is told in one sentence."""

import json
import os
import pathlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_store import (
  ABOUT,
  IDS,
  arrays,
  check_whole,
  facts,
  fill,
  is_sentence,
)

from photochat_jax.data import moments, moments_files
from photochat_jax.data.moments import DamagedRecord, MomentsError
from photochat_jax.data.moments_files import Writer


def test_an_unfinished_shard_is_none(tmp_path):
  with pytest.raises(KeyError), Writer(tmp_path, ABOUT, 0, 2) as writer:
    for photo_id in IDS[:3]:
      writer.add(photo_id, facts(photo_id), *arrays(photo_id))
    raise KeyError
  check_whole(moments.open_store(tmp_path), IDS[:2])
  # As if it had been killed between the shard and its index.
  (tmp_path / "moments/00001-000.array_record").write_bytes(b"half")
  check_whole(moments.open_store(tmp_path), IDS[:2])
  (left,) = tmp_path.glob("moments/*.tmp")
  fill(tmp_path, IDS[2:])
  assert not left.exists()
  check_whole(moments.open_store(tmp_path))


def test_what_another_host_is_writing_stays(tmp_path):
  with Writer(tmp_path, ABOUT, host=1) as writer:
    writer.add(IDS[0], facts(IDS[0]), *arrays(IDS[0]))
    fill(tmp_path, IDS[1:], host=0)
  check_whole(moments.open_store(tmp_path))


def test_ctrl_c_keeps_what_is_done(tmp_path):
  with pytest.raises(KeyboardInterrupt), Writer(tmp_path, ABOUT) as writer:
    writer.add(IDS[0], facts(IDS[0]), *arrays(IDS[0]))
    raise KeyboardInterrupt
  check_whole(moments.open_store(tmp_path), IDS[:1])


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_numbers_that_are_none_are_refused(tmp_path, value):
  broken = arrays(IDS[0])
  broken[1, 2, 3, 4] = value
  with pytest.raises(MomentsError, match=f"{IDS[0]} are not finite") as error:
    with Writer(tmp_path, ABOUT) as writer:
      writer.add(IDS[0], facts(IDS[0]), *broken)
  assert is_sentence(error.value)
  assert len(moments.open_store(tmp_path)) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(tmp_path):
  fill(tmp_path, IDS[:4])
  with pytest.raises(MomentsError, match="No space left on device") as error:
    with Writer(tmp_path, ABOUT) as writer:
      (tmp_path / "moments/00001-000.array_record.tmp").symlink_to("/dev/full")
      for photo_id in IDS[4:]:
        writer.add(photo_id, facts(photo_id), *arrays(photo_id))
  assert is_sentence(error.value)
  check_whole(moments.open_store(tmp_path), IDS[:4])


def test_a_flipped_bit_is_named_and_the_rest_is_read(tmp_path):
  fill(tmp_path)
  path = tmp_path / "moments/00000-000.array_record"
  content = bytearray(path.read_bytes())
  place = content.index(arrays(IDS[3])[1].tobytes())
  content[place + 100] ^= 4
  path.write_bytes(content)
  store = moments.open_store(tmp_path)
  with pytest.raises(DamagedRecord, match=IDS[3]) as error:
    store.get(IDS[3], True)
  assert is_sentence(error.value) and str(path) in str(error.value)
  np.testing.assert_array_equal(store.get(IDS[3]), arrays(IDS[3])[0])
  np.testing.assert_array_equal(store.get(IDS[4], True), arrays(IDS[4])[1])
  # What the sentence says to do helps.
  path.with_suffix(".json").unlink()
  store = moments.open_store(tmp_path)
  fill(tmp_path, store.missing(IDS))
  check_whole(moments.open_store(tmp_path))


def rewrite(path, change):
  """Changes a JSON file and makes its digest fit, as no accident would."""
  content = json.loads(path.read_text())
  del content["sha256"]
  change(content)
  moments_files._write_json(path, content, 0)


def test_a_record_in_anothers_place_is_damaged(tmp_path):
  fill(tmp_path)
  path = tmp_path / "moments/00000-000.json"
  rewrite(path, lambda index: index["photos"].reverse())
  store = moments.open_store(tmp_path)
  for photo_id in IDS:
    with pytest.raises(DamagedRecord):
      store.get(photo_id)
  more = [*IDS, "beyond the end"]
  rewrite(path, lambda index: index.update(photos=[[i, 1, ""] for i in more]))
  with pytest.raises(DamagedRecord):
    moments.open_store(tmp_path).get("beyond the end")


def test_a_checksum_knows_the_photo_and_its_side():
  content = np.frombuffer(b"12345678", np.uint8)
  got = moments_files.checksum("a/b", True, content)
  assert got == struct.pack("<I", zlib.crc32(b"1 a/b12345678"))
  got = moments_files.checksum("a/b", False, content)
  assert got == struct.pack("<I", zlib.crc32(b"0 a/b12345678"))


@pytest.mark.parametrize(
  "damage, match",
  [
    (lambda path: path.unlink(), "has no shard"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes of"),
    (lambda path: path.write_bytes(b""), "bytes of"),
    (
      lambda path: rewrite(
        path.with_suffix(".json"), lambda index: index.update(transform="x")
      ),
      "another store",
    ),
    (
      lambda path: rewrite(
        path.with_suffix(".json"),
        lambda index: index["photos"].append(index["photos"][0]),
      ),
      "twice",
    ),
  ],
)
def test_a_shard_that_is_not_whole_is_named(tmp_path, damage, match):
  fill(tmp_path, photos_per_shard=5)
  damage(tmp_path / "moments/00001-000.array_record")
  with pytest.raises(MomentsError, match=match) as error:
    moments.open_store(tmp_path)
  assert is_sentence(error.value) and "00001-000.json" in str(error.value)
  (tmp_path / "moments/00001-000.json").unlink()
  fill(tmp_path, moments.open_store(tmp_path).missing(IDS), photos_per_shard=5)
  check_whole(moments.open_store(tmp_path))


def test_a_store_of_another_format_is_refused(tmp_path):
  fill(tmp_path)
  rewrite(tmp_path / "moments/about.json", lambda about: about.update(format=2))
  with pytest.raises(MomentsError, match="is of format 2") as error:
    moments.open_store(tmp_path)
  assert is_sentence(error.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return fill(tmp_path_factory.mktemp("whole"), photos_per_shard=5)


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner, max_size=3)
  | st.dictionaries(
    st.sampled_from(["format", "photos", "bytes", "sha256", "shape", "kind"]),
    inner,
    max_size=4,
  ),
  max_leaves=6,
)


@pytest.mark.parametrize("name", ["about", "00000-000"])
@given(data=st.data())
def test_a_damaged_index_is_one_sentence(whole, name, data):
  path = pathlib.Path(whole) / "moments" / f"{name}.json"
  good = path.read_bytes()
  place = data.draw(st.integers(0, len(good) - 1))
  bad = data.draw(
    st.one_of(
      st.sampled_from([b"", b"[" * 100_000, b"\xff", b"{}", good * 2]),
      st.just(good[:place]),
      st.integers(1, 255).map(
        lambda bits: good[:place]
        + bytes([good[place] ^ bits])
        + good[place + 1 :]
      ),
      JSON.map(lambda value: json.dumps(value).encode()),
    )
  )
  path.write_bytes(bad)
  try:
    store = moments.open_store(whole)
  except MomentsError as error:
    assert is_sentence(error) and name in str(error)
  else:
    # Another way to write the same, such as one space less.
    assert json.loads(bad) == json.loads(good)
    check_whole(store)
  finally:
    path.write_bytes(good)


@given(place=st.integers(0, 1 << 17), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_shard_gives_a_wrong_value(whole, place, bit):
  path = pathlib.Path(whole) / "moments" / "00000-000.array_record"
  good = path.read_bytes()
  bad = bytearray(good)
  # The records are at the file's beginning, and its index at the end.
  bad[place % len(bad) if place % 2 else place % 12_000] ^= 1 << bit
  path.write_bytes(bad)
  try:
    store = moments.open_store(whole)
    for photo_id in IDS[:5]:
      for flipped in (False, True):
        try:
          got = store.get(photo_id, flipped)
        except DamagedRecord as error:
          assert is_sentence(error)
        else:
          want = arrays(photo_id)[int(flipped)]
          np.testing.assert_array_equal(got, want)
  finally:
    path.write_bytes(good)
