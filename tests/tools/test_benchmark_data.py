"""The benchmark of the input, on little."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_it_measures_what_it_says_and_memory_stays_flat(tmp_path):
  out = tmp_path / "figures.json"
  told = subprocess.run(
    [
      sys.executable, "tools/benchmark_data.py", f"--json={out}",
      "--dialogues=200", "--photos=30", "--rounds=1", "--batches=1",
    ],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )  # fmt: skip
  assert told.returncode == 0, told.stderr
  figures = json.loads(out.read_text())
  assert json.loads(told.stdout) == figures
  assert figures["dialogues"] == 200 and figures["photos"] == 30
  assert figures["describe"]["moments_missing"] == 0
  assert figures["describe"]["photos_broken"] == 0
  for rates in (figures["rows_per_second"], figures["examples_per_second"]):
    assert set(rates) == {"moments", "moments, eyes decoded", "jpeg"}
    assert all(0 < r["min"] <= r["median"] <= r["max"] for r in rates.values())
  first, *_, last = figures["memory_MiB"]["after_each_epoch"]
  # A single batch is 25 MiB, an epoch several of them.
  assert figures["describe"]["batches_per_epoch"] >= 4
  assert last - first < 60
