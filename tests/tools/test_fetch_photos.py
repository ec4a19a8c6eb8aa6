"""The photos of whole data sets: the command, the bar, the report."""

import asyncio
import dataclasses
import io
import json
import math
import pathlib
import random
import subprocess
import sys

import pytest
import rich.console

pytest.importorskip("aiohttp")

import fault_server as faults  # noqa: E402
from fault_server import FaultServer, photo  # noqa: E402
from fetching import Clock  # noqa: E402

from photochat_jax.data import (  # noqa: E402
  fetch,
  fetch_dataset,
  fetch_report,
  photo_store,
  sources,
)
from photochat_jax.data.fetch_rules import Limits  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
LIMITS = Limits(allow_http=True, tries=2)
HTML = b"<html>Not found</html>"


@pytest.fixture
def server():
  with FaultServer() as server:
    yield server


def open_images_id(number):
  return f"train/{number:016x}"


def write_photochat(folder, **splits):
  """Writes a data set: split -> numbers of the photos of its dialogues."""
  for split, numbers in splits.items():
    (folder / split).mkdir(parents=True)
    records = [
      {
        "dialogue": [
          {"message": "look", "share_photo": False, "user_id": 0},
          {"message": "", "share_photo": True, "user_id": 0},
        ],
        "dialogue_id": place,
        "photo_id": open_images_id(number),
        "photo_description": "Objects in the photo: Cat",
        "photo_url": "https://flickr.example/dead.jpg",
      }
      for place, number in enumerate(numbers)
    ]
    (folder / split / f"{split}_00.json").write_text(json.dumps(records))


def write_dialogcc(folder, urls):
  record = {
    "dialogue_id": "bst:1",
    "split": "train",
    "dialogue": [
      {
        "utterance_idx": n,
        "utterance": "look",
        "speaker": "AB"[n % 2],
        "rationale": "",
        "shared_image": [{"image_url": url}],
        "description": "a cat",
      }
      for n, url in enumerate(urls)
    ],
  }
  folder.mkdir(exist_ok=True)
  (folder / "train.json").write_text(json.dumps([record]))


def fetch_here(source, folder, **options):
  """Runs the command's inside; returns the report and what was printed."""
  clock, out = Clock(), io.StringIO()
  given = {
    "limits": LIMITS,
    "console": rich.console.Console(file=out, width=100),
    "allowed": frozenset({"127.0.0.1"}),
    "clock": clock,
    "sleep": clock.sleep,
    "rng": random.Random(0),
  }
  report = fetch_dataset.fetch_dataset(source, folder, **given | options)
  written = json.loads((folder / "photos" / fetch_report.FILE).read_text())
  assert written == report
  return report, out.getvalue()


@pytest.fixture
def bucket(server, monkeypatch):
  """Open Images on the loopback server; answers by number of a photo."""
  monkeypatch.setattr(fetch, "_OPEN_IMAGES", server.url("/{}.jpg"))

  def answer(number, *answers):
    server.add(f"/{open_images_id(number)}.jpg", *answers)

  return answer


def test_photochat_by_id_with_a_report(tmp_path, server, bucket):
  # 1 is shared by two splits, 3 has the content of 2, 4 to 7 are missing,
  # 8 was there.
  write_photochat(tmp_path, train=[1, 2, 3, 4, 5, 8], dev=[1, 6, 6], test=[7])
  bucket(1, faults.ok(photo(seed=1)))
  bucket(2, faults.status(500), faults.ok(photo(seed=2)))
  bucket(3, faults.ok(photo(seed=2)))
  bucket(4, faults.status(404))
  bucket(5, faults.ok(HTML))
  bucket(6, faults.status(404))
  bucket(7, faults.status(503))
  mine = tmp_path / "photos" / f"{open_images_id(8)}.jpg"
  mine.parent.mkdir(parents=True)
  mine.write_bytes(photo(seed=8))
  report, said = fetch_here("photochat", tmp_path)
  assert report["photos"] == {
    "asked": 8,
    "had": 1,
    "fetched": 3,
    "missing": 4,
    "coverage": 0.5,
    "with_the_content_of_another": 1,
  }
  assert {k: v["photos"] for k, v in report["failures"].items()} == {
    "not_found": 2,
    "not_photo": 1,
    "server_error": 1,
  }
  assert report["failures"]["server_error"]["asked_again"]
  assert not report["failures"]["not_photo"]["asked_again"]
  splits = report["splits"]
  assert {
    name: (s["dialogues"], s["asked"], s["found"], s["coverage"])
    for name, s in splits.items()
  } == {
    "train": (6, 6, 4, 4 / 6),
    "dev": (3, 2, 1, 0.5),
    "test": (1, 1, 0, 0.0),
  }
  assert splits["dev"]["failures"] == {"not_found": 1}
  assert splits["train"]["shared_with_other_splits"] == 1
  assert report["shared"] == {
    "photos": 1,
    "by_splits": {"train+dev": 1},
    "ids": {open_images_id(1): ["train", "dev"]},
  }
  assert not report["stopped"]
  assert "4 of 8 photos are there (50.0 %): 1 were, 3 came now" in said
  assert "asks again for 1 of these" in said
  for word in ("not_found", "server_error", "with --retry", "66.6 %", "7/7"):
    assert word in said, said
  # The readers see the same, and the next run does nothing twice.
  for name, split in splits.items():
    _, found = sources.read_split("photochat", tmp_path, name)
    assert (found.photos_asked, found.photos_found) == (
      split["asked"],
      split["found"],
    )
  server.asked.clear()
  again, _ = fetch_here("photochat", tmp_path)
  assert again["photos"]["had"] == 4
  assert set(server.asked) == {f"/{open_images_id(7)}.jpg"}


def test_dialogcc_by_url(tmp_path, server):
  urls = [
    server.add("/a.jpg?size=1&b=%20", faults.ok(photo(seed=1))),
    server.add("/moved.jpg", faults.redirect("/a.jpg?size=1&b=%20")),
    server.add("/gone.jpg", faults.status(410)),
    "http://169.254.169.254/latest/meta-data/",
    "nonsense",
  ]
  write_dialogcc(tmp_path, [*urls, urls[0]])
  report, said = fetch_here("dialogcc", tmp_path)
  assert report["photos"]["asked"] == 5
  assert report["photos"]["fetched"] == 2
  assert report["photos"]["with_the_content_of_another"] == 1
  assert report["splits"]["train"]["failures"] == {
    "gone": 1,
    "private": 1,
    "bad_url": 1,
  }
  found = photo_store.find(tmp_path, map(photo_store.url_id, urls))
  assert list(found) == [photo_store.url_id(url) for url in urls[:2]]
  assert "2 of 5 photos are there" in said


def test_splits_can_be_chosen(tmp_path, server, bucket):
  write_photochat(tmp_path, train=[1], dev=[2])
  bucket(2, faults.ok(photo()))
  report, _ = fetch_here("photochat", tmp_path, splits=["dev"])
  assert list(report["splits"]) == ["dev"]
  assert len(server.asked) == 1


def test_broken_records_are_counted_and_cost_nothing_else(tmp_path, bucket):
  write_photochat(tmp_path, train=[1])
  file = tmp_path / "train" / "train_00.json"
  file.write_text(json.dumps([*json.loads(file.read_text()), 7, {}, []]))
  bucket(1, faults.ok(photo()))
  report, _ = fetch_here("photochat", tmp_path)
  assert report["splits"]["train"]["records_left_out"] == 3
  assert report["photos"]["coverage"] == 1.0


def test_nothing_at_all_suggests_the_network(tmp_path, monkeypatch):
  with FaultServer() as gone:
    monkeypatch.setattr(fetch, "_OPEN_IMAGES", gone.url("/{}.jpg"))
  write_photochat(tmp_path, train=[1, 2])
  _, said = fetch_here("photochat", tmp_path)
  assert "is there a network?" in said


def test_stopped_early_it_reports_and_goes_on(tmp_path, bucket):
  write_photochat(tmp_path, train=[1, 2, 3])
  bucket(1, faults.ok(photo(seed=1)))
  for number in (2, 3):
    bucket(number, faults.status(500), faults.ok(photo(seed=number)))

  async def stop(seconds):
    if seconds > 0.1:  # The pause before a second try.
      raise KeyboardInterrupt  # As Ctrl-C does.
    await asyncio.sleep(0)

  limits = dataclasses.replace(
    LIMITS, concurrency=1, rate=math.inf, host_rate=math.inf
  )
  report, said = fetch_here("photochat", tmp_path, sleep=stop, limits=limits)
  assert report["stopped"]
  assert report["failures"]["not_asked"]["photos"] == 2
  assert "1 of 3 photos are there" in said
  report, _ = fetch_here("photochat", tmp_path)
  assert not report["stopped"]
  assert (report["photos"]["had"], report["photos"]["fetched"]) == (1, 2)


def test_dialogues_without_photos(tmp_path):
  write_dialogcc(tmp_path, [])
  record = json.loads((tmp_path / "train.json").read_text())
  turn = {"utterance": "hi", "speaker": "A", "shared_image": []}
  record[0]["dialogue"] = [turn]
  (tmp_path / "train.json").write_text(json.dumps(record))
  report, said = fetch_here("dialogcc", tmp_path)
  assert report["photos"]["coverage"] is None
  assert "0 of 0 photos are there (-)" in said


def command(*arguments):
  return subprocess.run(
    [sys.executable, "tools/fetch_photos.py", *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
    env={"PYTHONPATH": str(ROOT), "COLUMNS": "100", "PATH": ""},
  )


@pytest.mark.parametrize(
  "arguments, sentence",
  [
    ([], "Give --dataset=NAME"),
    (["--dataset=mmdialog", "--path=x"], "Give --dataset=NAME"),
    (["--dataset=photochat"], "Give --path=DIR"),
    (["--dataset=photochat", "--path=/no/where"], "There is no train split"),
    (["--dataset=photochat", "--path=gs://a/b"], "no local folder"),
    (["--dataset=photochat", "--path=x", "--splits=val"], "no split 'val'"),
    (["--dataset=photochat", "--path=x", "y"], "'y' is not a flag"),
    (["--rate=fast"], "--rate=fast"),
    (["--rate=0"], "--rate=0"),
    (["--concurency=3"], "concurency"),
  ],
)
def test_a_bad_command_line_is_one_sentence(arguments, sentence):
  done = command(*arguments)
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr.startswith("fetch_photos: ")
  assert sentence in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1


def test_the_command_never_asks_its_own_machine(tmp_path, server):
  # And missing photos are no error of the command.
  write_dialogcc(tmp_path, [server.add("/a.jpg", faults.ok(photo()))])
  arguments = ["--dataset=dialogcc", f"--path={tmp_path}"]
  done = command(*arguments)
  assert done.returncode == 0, done.stderr
  assert "0 of 1 photos are there (0.0 %)" in done.stdout
  assert "http" in photo_store.read_manifest(tmp_path).rows.popitem()[1].status
  done = command(*arguments, "--allow_http", "--max_megabytes=1")
  assert done.returncode == 0, done.stderr
  assert photo_store.read_manifest(tmp_path).rows.popitem()[1].status == (
    "private"
  )
  assert not server.asked
  report = json.loads((tmp_path / "photos" / "coverage.json").read_text())
  assert report["failures"]["private"]["photos"] == 1
