"""What a model writes and draws in an evaluation, kept as it comes.

  FOLDER/turns.jsonl           first what it belongs to, then a reply or a photo
                               on each line
  FOLDER/photos/D-T.png        the photo drawn at turn T of dialogue D

Until all is there the file is called `turns.jsonl.part`. An evaluation of the
same model, data and settings that finds one goes on after it. Where there are
several processes all read it and the first one writes.
"""

import io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from PIL import Image

from photochat_jax import generate
from photochat_jax.runtime import cluster

FILE = "turns.jsonl"


class Prompt(NamedTuple):
  """Dialogue `number` up to turn `upto`, the model playing `side`."""

  number: int
  side: int
  upto: int


class Transcript:
  """Replies and photos by the prompts that they answer.

  Attributes:
    replies: prompt -> what was written.
    photos: prompt -> uint8[H, W, 3], what was drawn.
  """

  def __init__(
    self,
    folder: epath.PathLike | None = None,
    belongs: Mapping[str, Any] | None = None,
  ):
    """Goes on after what is in the folder.

    Args:
      folder: where it is kept; None keeps it in memory alone.
      belongs: what it depends on, as JSON; what was made with something else
        is not gone on with.
    """
    self.replies: dict[Prompt, generate.Reply] = {}
    self.photos: dict[Prompt, np.ndarray] = {}
    self._folder = None if folder is None else epath.Path(folder)
    self._writes = self._folder is not None and cluster.is_first()
    self._head = json.dumps(belongs, sort_keys=True)
    if self._folder is None:
      return
    lines = self._read()
    _wait_for_all()  # Before the first writes over what the others read.
    if self._writes:
      if not self.replies:
        self._forget()
      self._folder.mkdir(parents=True, exist_ok=True)
      self._part.write_text("".join(f"{line}\n" for line in lines))

  @property
  def _part(self) -> epath.Path:
    return self._folder / f"{FILE}.part"

  def add_replies(self, replies: Mapping[Prompt, generate.Reply]) -> None:
    """Keeps what was written."""
    self.replies |= replies
    self._append(
      {**prompt._asdict(), **reply._asdict()}
      for prompt, reply in replies.items()
    )

  def add_photos(self, photos: Mapping[Prompt, np.ndarray]) -> None:
    """Keeps what was drawn."""
    self.photos |= photos
    if self._writes:
      (self._folder / "photos").mkdir(exist_ok=True)
      for prompt, pixels in photos.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (self._folder / photo_name(prompt)).write_bytes(buffer.getvalue())
    self._append(
      {**prompt._asdict(), "photo": photo_name(prompt)} for prompt in photos
    )

  def finish(self) -> None:
    """All is there."""
    if self._writes:
      self._part.replace(self._folder / FILE)
    if self._folder is not None:
      _wait_for_all()

  def _append(self, rows) -> None:
    if not self._writes:
      return
    with self._part.open("a") as file:
      for row in rows:
        file.write(json.dumps(row) + "\n")

  def _forget(self) -> None:
    """Takes away what an evaluation before has left."""
    (self._folder / FILE).unlink(missing_ok=True)
    if (self._folder / "photos").exists():
      (self._folder / "photos").rmtree()

  def _read(self) -> list[str]:
    """Takes what an interrupted evaluation has left; its lines."""
    lines = self._part.read_text().split("\n") if self._part.exists() else []
    if not lines or lines[0] != self._head:
      return [self._head]
    lines.pop()  # What follows the last newline was cut off.
    self.replies, self.photos = _parse(lines[1:], self._folder)
    return lines


def read(folder: epath.PathLike) -> Transcript:
  """The transcript of an evaluation that is done.

  Raises:
    ValueError: there is none.
  """
  path, found = epath.Path(folder) / FILE, Transcript()
  if not path.exists():
    raise ValueError(f"{path} is not there; evaluate the run first.")
  lines = path.read_text().splitlines()
  found.replies, found.photos = _parse(lines[1:], path.parent)
  return found


def _parse(lines, folder):
  """Lines -> replies and photos by their prompts."""
  replies, photos = {}, {}
  for line in lines:
    row = json.loads(line)
    prompt = Prompt(*(row.pop(name) for name in Prompt._fields))
    if "photo" in row:
      data = (folder / row["photo"]).read_bytes()
      photos[prompt] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    else:
      replies[prompt] = generate.Reply(
        **row | {"tokens": tuple(row["tokens"])}
      )
  return replies, photos


def _wait_for_all() -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(FILE)


def photo_name(prompt: Prompt) -> str:
  """The file of the photo drawn at a prompt, within the folder."""
  return f"photos/{prompt.number:05d}-{prompt.upto:03d}.png"
