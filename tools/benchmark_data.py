r"""How fast dialogues become batches, and in how much memory.

  python tools/benchmark_data.py --json=FILE

Measures, on as many dialogues as PhotoChat has, resampled from the 72 real
ones that the package's tests hold: reading, tokenising and indexing; rows a
second from photos' precomputed moments and from JPEG files, in turns; the
memory of the process after each of several epochs. Every dialogue gets an id,
and labels for its photo, of its own. Photos are made up, as large on the disk
as natural ones. The vocabularies are the small ones shipped with the package,
whose sequences are a quarter longer than Llama 2's.

What an H200 eats is arithmetic: 45.5 TFLOP to train in full on a row of 1,024
tokens with one photo seen and one drawn, of which 41.4 are Llama 2 7B's.
"""

import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from PIL import Image

from photochat_jax import record
from photochat_jax.data import (
  index,
  loading,
  moments,
  moments_files,
  photochat,
  pipeline,
  schema,
  tokenizers,
)
from photochat_jax.data.spec import DataSpec

_SAMPLE = flags.DEFINE_string(
  "sample", "tests/data/photochat_sample", "Folder of real dialogues."
)
_JSON = flags.DEFINE_string("json", "", "Where the figures go, too.")
_DIALOGUES = flags.DEFINE_integer("dialogues", 12_286, "Dialogues.")
_PHOTOS = flags.DEFINE_integer("photos", 2_000, "Different photos.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Times each rate is measured.")
_BATCHES = flags.DEFINE_integer("batches", 12, "Batches of a round.")
_EPOCHS = flags.DEFINE_integer("epochs", 3, "Epochs to watch the memory in.")

_LABELS = "Objects in the photo:"
_PER_FILE = 500  # Dialogues of a file, as PhotoChat has it.
# TFLOP of a row trained in full; TFLOP/s of an H200.
_ROW = 45.5
_H200 = {"its sheet": 989, "measured on random data": 790, "half": 494}

_SPEC = DataSpec(
  batch_size=16,
  length=1024,
  photos_in=5,
  photos_out=3,
  num_visual_tokens=32,
  vision_size=224,
  photo_size=512,
  system_prompt="You chat and share photos.",
  augment=True,
)
_CACHED = dataclasses.replace(_SPEC, moments=(64, 64, 8))


def main(argv: list[str]) -> None:
  """Measures, prints, and writes."""
  if len(argv) > 1:
    sys.exit(f"{argv[1]!r} is not a flag; flags are written --name=value.")
  with tempfile.TemporaryDirectory(prefix="benchmark_data") as folder:
    figures = measure(pathlib.Path(folder))
  text = json.dumps(figures, indent=2)
  print(text)
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(text + "\n")


def measure(folder: pathlib.Path) -> dict[str, Any]:
  """All figures, with what they were measured on."""
  load = os.getloadavg()[0]
  write_dialogues(folder)
  write_photos(folder)
  tokens = tokenizers.load_llm_tokenizer(), tokenizers.load_clip_tokenizer()
  dialogues, reading = measure_index(folder, tokens)
  photos = {
    turn.photo.id: turn.photo.path
    for dialogue in dialogues
    for turn in dialogue.turns
    if turn.photo
  }
  store = write_moments(folder / "store", photos)

  def make(spec: DataSpec, room: int):
    return pipeline.Pipeline(
      dialogues,
      "dialogues",
      spec,
      *tokens,
      photo_cache=loading.PhotoCache(room),
      moments=loading.Moments(store, photos),
    )

  warm = make(_CACHED, loading.PHOTO_CACHE_BYTES)
  memory = measure_memory(warm)
  # The room for photos makes the difference between the first epoch, in which
  # they are decoded for the eyes, and later ones.
  rows, examples = measure_rates(
    {
      "moments": warm,
      "moments, eyes decoded": make(_CACHED, 0),
      "jpeg": make(_SPEC, 0),
    }
  )
  return {
    "cores": os.cpu_count(),
    "load_before": round(load, 2),
    "versions": record.versions(),
    "dialogues": len(dialogues),
    "photos": len(photos),
    "describe": warm.describe(),
    "reading": reading,
    "rows_per_second": rows,
    "examples_per_second": examples,
    "memory_MiB": memory,
    "plan_seconds_per_epoch": spread(
      timed(lambda e=e: warm.plan.rows_of_epoch(e)) for e in range(1, 6)
    ),
    "h200": {
      name: {
        "rows_per_second": round(peak / _ROW, 1),
        "supplied": round(rows["moments"]["median"] / (peak / _ROW), 1),
      }
      for name, peak in _H200.items()
    },
  }


def timed(function: Callable[[], Any]) -> float:
  """Seconds that a call takes."""
  started = time.perf_counter()
  function()
  return time.perf_counter() - started


def spread(values: Any) -> dict[str, float]:
  """Median, smallest and largest."""
  values = [round(float(value), 4) for value in values]
  return {
    "median": statistics.median(values),
    "min": min(values),
    "max": max(values),
  }


def write_dialogues(folder: pathlib.Path) -> None:
  """Real dialogues under other ids, each with labels drawn anew."""
  draw = random.Random(0)
  files = sorted(pathlib.Path(_SAMPLE.value).glob("*/*.json"))
  real = [record for file in files for record in json.loads(file.read_text())]
  lists = [
    record["photo_description"].rpartition(_LABELS)[2].split(",")
    for record in real
  ]
  labels = sorted({label.strip() for part in lists for label in part} - {""})
  records = []
  for number in range(_DIALOGUES.value):
    which = draw.randrange(len(real))
    chosen = draw.sample(labels, min(len(lists[which]), len(labels)))
    records.append(
      real[which]
      | {
        "dialogue_id": number,
        "photo_id": f"train/{number % _PHOTOS.value:016x}",
        "photo_description": f"{_LABELS} {', '.join(chosen)}",
      }
    )
  (folder / "train").mkdir()
  for start in range(0, len(records), _PER_FILE):
    file = folder / "train" / f"train_{start // _PER_FILE:02d}.json"
    file.write_text(json.dumps(records[start : start + _PER_FILE]))


def write_photos(folder: pathlib.Path) -> None:
  """JPEGs of 512 pixels: clouds with some noise, about 70 kB each."""
  rng = np.random.default_rng(0)
  place = folder / "photos" / "train"
  place.mkdir(parents=True)
  for number in range(_PHOTOS.value):
    small = rng.integers(0, 256, (24, 24, 3), np.uint8)
    clouds = Image.fromarray(small).resize((512, 512), Image.BICUBIC)
    noise = rng.integers(-12, 13, (512, 512, 1))
    pixels = np.clip(np.asarray(clouds) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(place / f"{number:016x}.jpg", quality=85)


def write_moments(
  folder: pathlib.Path, photos: dict[str, Any]
) -> moments.Store:
  """Random moments for every photo, in the form of tools/precompute.py."""
  about = moments_files.About("moments", "0" * 64, "benchmark", (64, 64, 8))
  rng = np.random.default_rng(0)
  with moments_files.Writer(folder, about) as writer:
    for name, path in photos.items():
      both = rng.standard_normal((2, 64, 64, 8), np.float32)
      facts = moments_files.FileFacts(os.path.getsize(path), "")
      writer.add(name, facts, *both.astype(np.float16))
  return moments.open_store(folder)


def measure_index(
  folder: pathlib.Path, tokens: Sequence[Any]
) -> tuple[list[schema.Dialogue], dict[str, Any]]:
  """Files to token arrays, a few times."""
  read, made = [], []
  for _ in range(min(_ROUNDS.value, 3)):
    index.forget()
    started = time.perf_counter()
    dialogues, _ = photochat.read_split(folder, "train", "labels")
    read.append(time.perf_counter() - started)
    made.append(timed(lambda d=dialogues: index.build_index(d, _SPEC, *tokens)))
  both = [a + b for a, b in zip(read, made, strict=True)]
  return dialogues, {
    "read_seconds": spread(read),
    "index_seconds": spread(made),
    "seconds": spread(both),
    "wanted_seconds": 20.0,
  }


def measure_rates(sources: dict[str, pipeline.Pipeline]):
  """Rows, and examples in them, a second; of each source in turns."""
  rows = {name: [] for name in sources}
  examples = {name: [] for name in sources}
  for number in range(1 + _ROUNDS.value):
    start = number * _BATCHES.value
    for name, source in sources.items():
      started, found = time.perf_counter(), 0
      for batch in source.batches(start, _BATCHES.value):
        found += int(batch["segments"].max(axis=1).sum())
      seconds = time.perf_counter() - started
      if number:  # The first round warms up.
        rows[name].append(_SPEC.batch_size * _BATCHES.value / seconds)
        examples[name].append(found / seconds)
  return tuple(
    {name: spread(values) for name, values in kind.items()}
    for kind in (rows, examples)
  )


def measure_memory(source: pipeline.Pipeline) -> dict[str, Any]:
  """What the process holds after the first batch and after each epoch."""
  found, batches = [], source.describe()["batches_per_epoch"]
  with contextlib.closing(source.batches()) as stream:
    next(stream)
    found.append(_resident())
    for _ in range(_EPOCHS.value):
      for _ in range(batches):
        next(stream)
      found.append(_resident())
  return {"after_first_batch": found[0], "after_each_epoch": found[1:]}


def _resident() -> float:
  """Memory of this process, MiB."""
  gc.collect()
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


if __name__ == "__main__":
  app.run(main)
