"""Synthetic photo dialogues, in PhotoChat's own layout.

Small enough to be learnt on a laptop's CPU, and built so that every part of the
model has something of its own to learn. Each photo shows a scene
(`synthetic_scenes`). The talk before the sharer's photo names everything but
the wall; the caption on the photo's turn says the object's colour only with
probability `told_share` and the empty word 'nice' otherwise; the wall is known
from pixels alone, and someone asks for it. Whether a turn holds a photo is
decided by the talk: a photo comes after a request or an accepted offer, and
never from someone who has said that there is no camera.

Some combinations of (shape, colour, ground) are kept for dev and others for
test: their scenes are new, the pairs of values in them are not.

The extra facts stand under a dialogue's key `synthetic`:

  photos     photo_id -> {attributes, full_caption, told_in_caption,
             told_in_talk}; the last is false for a partner's photo, of which
             nothing is said before it is seen
  questions  [{turn, photo_id, attribute, answer, kind}]; `turn` is the index of
             the answering message
  sharer     0, or None in a dialogue without photos
"""

import hashlib
import io
import itertools
import json
import os

import numpy as np
from etils import epath
from PIL import Image

from photochat_jax.data.synthetic_scenes import ATTRIBUTES, KIND, draw, measure
from photochat_jax.data.synthetic_talk import write_dialogue

__all__ = [
  "ATTRIBUTES",
  "KIND",
  "SCENES",
  "SPLITS",
  "draw",
  "generate",
  "held_out",
  "make_records",
  "measure",
]

VERSION = 1
MARKER = "synthetic_set.json"
SPLITS = ("train", "dev", "test")


def held_out(scene: dict[str, str]) -> str:
  """The split, of `SPLITS`, that owns a scene: 1/6 test, 1/12 dev.

  Of the six colours of each (shape, ground) one is kept for test, and for half
  of them another one for dev; the choice moves along so that each pair of
  values stays in train.
  """
  shape = ATTRIBUTES["shape"].index(scene["shape"])
  ground = ATTRIBUTES["ground"].index(scene["ground"])
  colour = ATTRIBUTES["colour"].index(scene["colour"])
  number = len(ATTRIBUTES["ground"]) * shape + ground
  if colour == number % 6:
    return "test"
  if (shape + ground) % 2 == 0 and colour == (number + 3) % 6:
    return "dev"
  return "train"


def _all_scenes() -> dict[str, list[dict[str, str]]]:
  scenes = {split: [] for split in SPLITS}
  for values in itertools.product(*ATTRIBUTES.values()):
    scene = dict(zip(ATTRIBUTES, values, strict=True))
    scenes[held_out(scene)].append(scene)
  return scenes


SCENES = _all_scenes()
"""The scenes that the photos of each split may show."""


def _encode_jpeg(photo: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(photo).save(buffer, "JPEG", quality=95, subsampling=0)
  return buffer.getvalue()


def make_records(
  seed: int, split: str, count: int, told_share: float = 0.25
) -> list[dict]:
  """Makes up the dialogues of a split, without their photos."""
  rng = np.random.default_rng((seed, SPLITS.index(split)))
  photo_ids = (f"synthetic/{split}_{i:05d}" for i in itertools.count())
  return [
    write_dialogue(rng, number, SCENES[split], photo_ids, told_share)
    for number in range(count)
  ]


def _write(folder, seed, sizes, image_size, told_share):
  photos = folder / "photos"
  (photos / "synthetic").mkdir(parents=True)
  for split, count in zip(SPLITS, sizes, strict=True):
    rng = np.random.default_rng((seed, SPLITS.index(split), 1))
    records = make_records(seed, split, count, told_share)
    for record in records:
      for photo_id, facts in record["synthetic"]["photos"].items():
        photo = _encode_jpeg(draw(facts["attributes"], image_size, rng))
        (photos / f"{photo_id}.jpg").write_bytes(photo)
    (folder / split).mkdir()
    (folder / split / f"{split}_00.json").write_text(json.dumps(records))


def _digest(path) -> str | None:
  """The digest in a set's marker file; None where there is no marker."""
  marker = path / MARKER
  if not marker.exists():
    return None
  return json.loads(marker.read_text()).get("digest")


def generate(
  seed: int,
  num_train: int,
  num_dev: int,
  num_test: int,
  path: epath.PathLike,
  image_size: int = 32,
  told_share: float = 0.25,
) -> epath.Path:
  """Writes the synthetic set, unless the folder holds just this one already.

  Args:
    seed: decides everything; the same arguments give the same files.
    num_train: dialogues in train; likewise `num_dev` and `num_test`.
    num_dev: dialogues in dev.
    num_test: dialogues in test.
    path: the folder, made here. A synthetic set made with other arguments is
      replaced.
    image_size: side of the square photos, in pixels.
    told_share: share of captions that say the object's colour.

  Returns:
    `path`, as an `epath.Path`.

  Raises:
    ValueError: the folder exists and holds something else.
  """
  path = epath.Path(path)
  recipe = {
    "version": VERSION,
    "seed": seed,
    "sizes": [num_train, num_dev, num_test],
    "image_size": image_size,
    "told_share": told_share,
  }
  text = json.dumps(recipe, sort_keys=True)
  recipe["digest"] = hashlib.sha256(text.encode()).hexdigest()
  found = _digest(path)
  if found == recipe["digest"]:
    return path
  if found is None and path.exists() and any(path.iterdir()):
    raise ValueError(
      f"{path} holds files that are not a synthetic set: give an empty or new "
      "folder."
    )
  # Made beside its place and moved there whole: a run that is cut short leaves
  # no half set, and a second process that was faster is not disturbed.
  draft = path.parent / f"{path.name}.draft-{os.getpid()}"
  if draft.exists():
    draft.rmtree()
  draft.mkdir(parents=True)
  _write(draft, seed, recipe["sizes"], image_size, told_share)
  (draft / MARKER).write_text(json.dumps(recipe))
  if _digest(path) == recipe["digest"]:
    draft.rmtree()
    return path
  try:
    if path.exists():
      path.rmtree()
    draft.rename(path)
  except OSError:  # Another process was faster by a moment.
    if _digest(path) != recipe["digest"]:
      raise
    draft.rmtree()
  return path
