"""Going on: after a run, a kill, a full disk, a damaged manifest."""

import dataclasses
import errno
import json
import pathlib
import signal
import subprocess
import sys

import pytest

aiohttp = pytest.importorskip("aiohttp")

import fault_server as faults  # noqa: E402
from fault_server import FaultServer, photo  # noqa: E402
from fetching import GOOD, LIMITS, run  # noqa: E402

from photochat_jax.data import fetch, photo_store  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
HTML = b"<html>Not found</html>"
ANNOUNCED = {"content_length": "99999999999"}


@pytest.fixture
def server():
  with FaultServer() as server:
    yield server


def test_the_next_run_asks_for_what_may_come_and_no_more(tmp_path, server):
  answers = {
    "ok": faults.ok(GOOD),
    "gone": faults.status(410),
    "html": faults.ok(HTML),
    "large": faults.ok(GOOD, **ANNOUNCED),
    "down": faults.status(500),
  }
  wanted = {n: server.add(f"/{n}", answer) for n, answer in answers.items()}
  limits = dataclasses.replace(LIMITS, tries=1)
  run(tmp_path, wanted, limits)
  first = dict(server.asked)
  assert set(first.values()) == {1}
  lines = (tmp_path / "photos" / "manifest.jsonl").read_bytes().count(b"\n")
  told = []
  result = run(tmp_path, wanted, limits, on_start=told.append)
  assert told == [1]
  assert result.had == {"ok"}
  assert result.rows["html"].status == "not_photo"
  assert dict(server.asked) == first | {"/down": 2}
  # It failed as before, which is not written twice.
  manifest = (tmp_path / "photos" / "manifest.jsonl").read_bytes()
  assert manifest.count(b"\n") == lines
  run(tmp_path, wanted, limits, retry=True)
  assert dict(server.asked) == dict.fromkeys(first, 2) | {
    "/ok": 1,
    "/down": 3,
  }


def test_another_address_is_asked_though_the_first_was_gone(tmp_path, server):
  run(tmp_path, {"a": server.add("/a", faults.status(410))})
  result = run(tmp_path, {"a": server.add("/b", faults.ok(GOOD))})
  assert result.fetched == {"a"}


def test_photos_that_were_damaged_since_are_fetched_again(tmp_path, server):
  wanted = {
    n: server.add(f"/{n}", faults.ok(photo(seed=seed)))
    for seed, n in enumerate(["short", "deleted", "changed", "sound"])
  }
  wanted["mine"] = server.add("/mine", faults.ok(photo(seed=9)))
  wanted["empty"] = server.add("/empty", faults.ok(photo(seed=8)))
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "mine.jpg").write_bytes(HTML)
  (tmp_path / "photos" / "empty.jpg").write_bytes(b"")
  result = run(tmp_path, wanted)
  assert result.had == {"mine"}  # It is there; nobody looked.
  files = {
    name: tmp_path / "photos" / result.rows[name].file
    for name in ("short", "deleted", "changed")
  }
  files["short"].write_bytes(files["short"].read_bytes()[:-1])
  files["deleted"].unlink()
  whole = files["changed"].read_bytes()
  files["changed"].write_bytes(whole[:-1] + b"?")
  server.asked.clear()
  assert run(tmp_path, wanted).fetched == {"short", "deleted"}
  result = run(tmp_path, wanted, check=True)
  assert result.fetched == {"changed", "mine"}
  assert files["changed"].read_bytes() == whole
  assert set(server.asked.values()) == {1}
  assert run(tmp_path, wanted, check=True).had == wanted.keys()


def test_a_damaged_manifest_costs_its_lines_only(tmp_path, server):
  wanted = {
    n: server.add(f"/{n}", faults.ok(photo(seed=ord(n)))) for n in "abc"
  }
  run(tmp_path, wanted)
  manifest = tmp_path / "photos" / "manifest.jsonl"
  lines = manifest.read_bytes().splitlines()
  lost = json.loads(lines[1])["id"]
  manifest.write_bytes(b"\n".join([lines[0], b"\0\xff", lines[2][:40], b"{}"]))
  result = run(tmp_path, wanted)
  assert result.damaged_lines == 3
  assert len(result.had) == 1
  assert lost in result.fetched
  assert len(photo_store.find(tmp_path, wanted)) == 3


def test_a_full_disk_ends_it_with_a_sentence(tmp_path, server, monkeypatch):
  wanted = {
    n: server.add(f"/{n}", faults.ok(photo(seed=ord(n)))) for n in "abc"
  }
  limits = dataclasses.replace(LIMITS, concurrency=1)
  keep = photo_store.Writer.keep
  kept = []

  def keep_one(self, data, extension):
    if kept:
      raise OSError(errno.ENOSPC, "No space left on device")
    kept.append(data)
    return keep(self, data, extension)

  with monkeypatch.context() as patch:
    patch.setattr(photo_store.Writer, "keep", keep_one)
    with pytest.raises(fetch.FetchError, match="No space left.*same command"):
      run(tmp_path, wanted, limits)
  assert run(tmp_path, wanted).had == {"a"}


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / "photos").write_bytes(b"")
  with pytest.raises(fetch.FetchError, match="cannot be used"):
    run(tmp_path, {})


def test_without_aiohttp_there_is_a_sentence(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "aiohttp", None)
  monkeypatch.delitem(sys.modules, "photochat_jax.data.download")
  monkeypatch.delattr("photochat_jax.data.download")
  with pytest.raises(fetch.FetchError, match=r"pip install -e '\.\[data\]'"):
    run(tmp_path, {})


def test_an_aiohttp_that_strangers_can_crash_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(aiohttp, "__version__", "3.13.3")
  monkeypatch.delitem(sys.modules, "photochat_jax.data.download")
  monkeypatch.delattr("photochat_jax.data.download")
  with pytest.raises(fetch.FetchError, match="3.13.4 or later, not 3.13.3"):
    run(tmp_path, {})


def test_aiohttp_is_imported_when_fetching_only():
  program = (
    "import sys; from photochat_jax.data import fetch_dataset, photo_store; "
    "print([m for m in ('aiohttp', 'tensorflow', 'jax') if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
  )
  assert done.stdout.strip() == "[]", done.stderr


def test_open_images_has_photos_by_id():
  url = fetch.open_images_url("train/976baf0e84752a68")
  assert url == (
    "https://open-images-dataset.s3.amazonaws.com/train/976baf0e84752a68.jpg"
  )
  for other in (
    "a",
    "train/../x",
    "train/976baf0e84752a68?x",
    "url/" + "0" * 32,
  ):
    assert fetch.open_images_url(other) == ""


CHILD = """
import asyncio, json, sys
from photochat_jax.data import fetch
from photochat_jax.data.fetch_rules import Limits

folder, wanted = sys.argv[1], json.loads(sys.argv[2])
result = fetch.fetch(
  folder,
  wanted,
  Limits(concurrency=1, allow_http=True, rate=1e6, host_rate=1e6),
  allowed=frozenset({"127.0.0.1"}),
)
print(json.dumps([sorted(result.fetched), result.stopped]))
"""


def start_child(folder, wanted):
  return subprocess.Popen(
    [sys.executable, "-c", CHILD, str(folder), json.dumps(wanted)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_gone_on_with(tmp_path, server, ending):
  names = [f"photo{n}" for n in range(9)]
  wanted = {
    name: server.add(f"/{name}", faults.ok(photo(seed=n)))
    for n, name in enumerate(names)
  }
  server.add("/photo5", server.hold, faults.ok(photo(seed=5)))
  with start_child(tmp_path, wanted) as child:
    assert server.held.wait(60), child.communicate()
    child.send_signal(ending)
    said, errors = child.communicate()
  assert "Traceback" not in errors
  if ending == signal.SIGINT:
    assert json.loads(said) == [names[:5], True]
  rows = photo_store.read_manifest(tmp_path).rows
  assert list(rows) == names[:5]
  manifest = tmp_path / "photos" / "manifest.jsonl"
  with manifest.open("ab") as file:
    file.write(b'{"id": "photo5", "status": "o')  # Killed while it wrote.
  before = dict(server.asked)
  result = run(tmp_path, wanted)
  assert result.had == set(names[:5])
  assert result.fetched == set(names[5:])
  assert result.damaged_lines == 1
  # Nothing is lost, and nothing that had come was asked for twice.
  assert dict(server.asked) == before | {
    f"/{name}": 1 + (name == "photo5") for name in names[5:]
  }
  assert len(photo_store.find(tmp_path, names)) == 9
