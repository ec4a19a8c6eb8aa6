"""A store of a few arrays that follow from their photos' ids."""

import hashlib

import numpy as np

from photochat_jax.data.moments_files import About, FileFacts, Writer

ABOUT = About(
  "moments", "ab" * 32, "of 8 px", (4, 4, 8), source="photochat", path="/photos"
)
IDS = [f"train/{i:016x}" for i in range(10)]


def arrays(photo_id, shape=ABOUT.shape):
  """What belongs to a photo: float16[2, ...], a function of its id."""
  seed = int.from_bytes(hashlib.sha256(photo_id.encode()).digest()[:8])
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, *shape)).astype(np.float16)


def facts(photo_id):
  """Of a file that holds the id."""
  return FileFacts(
    len(photo_id), hashlib.sha256(photo_id.encode()).hexdigest()
  )


def fill(folder, ids=IDS, about=ABOUT, **arguments):
  """Writes the arrays of some photos; `arguments` are the writer's."""
  with Writer(folder, about, **arguments) as writer:
    for photo_id in ids:
      writer.add(photo_id, facts(photo_id), *arrays(photo_id, about.shape))
  return folder


def check_whole(store, ids=IDS):
  """The store holds what `fill` wrote of these photos, and nothing else."""
  assert sorted(store) == sorted(ids) and len(store) == len(ids)
  for photo_id in ids:
    for flipped in (False, True):
      got = store.get(photo_id, flipped)
      assert got.dtype == np.float32
      np.testing.assert_array_equal(
        got, arrays(photo_id, store.about.shape)[int(flipped)]
      )


def is_sentence(error):
  """Whether an error is what a user can be told."""
  text = str(error)
  return "\n" not in text and text.endswith(".") and len(text) < 700
