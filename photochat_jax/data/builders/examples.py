"""A dialogue as an example of a prepared data set, and back.

An example is what TFDS writes and reads, nested dicts and lists:

  position     place in the split as it was read, from 0; TFDS shuffles
  dialogue_id  `Dialogue.id`
  facts        `Dialogue.facts` as JSON; '' where there are none
  turns        one of these for each `Turn`; a photo's fields are '' or False
               where the turn shares none
    speaker, text
    share_photo        whether the turn shares a photo
    photo_id, photo_description, photo_url
    photo_caption      the one that is given; '' where there is none
    has_photo          whether its file was found, and where photos are packed
                       whether it is one
    photo              its file; only where photos are packed, '' without one

Nothing here needs TensorFlow or TFDS.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from photochat_jax.data.records import Captions
from photochat_jax.data.schema import Dialogue, Photo, Turn

Pack = Callable[[Photo], bytes]
"""Gives the file of a photo; b'' where it cannot be used."""


def _encode_turn(turn: Turn, pack: Pack | None) -> dict[str, Any]:
  photo = turn.photo or Photo("", "", None)
  example = {
    "speaker": turn.speaker,
    "text": turn.text,
    "share_photo": np.bool_(turn.photo is not None),
    "photo_id": photo.id,
    "photo_description": photo.description,
    "photo_caption": photo.caption or "",
    "photo_url": photo.url,
    "has_photo": np.bool_(photo.path is not None),
  }
  if pack is not None:
    data = pack(photo) if photo.path is not None else b""
    example |= {"photo": data, "has_photo": np.bool_(data != b"")}
  return example


def encode(
  dialogue: Dialogue, position: int, pack: Pack | None = None
) -> dict[str, Any]:
  """Makes an example.

  Args:
    dialogue: as it was read with the captions that are given.
    position: its place in its split.
    pack: reads the photos that have a file; without, none is packed.

  Returns:
    The example, as the module says.
  """
  facts = "" if dialogue.facts is None else json.dumps(dialogue.facts)
  return {
    "position": position,
    "dialogue_id": dialogue.id,
    "facts": facts,
    "turns": [_encode_turn(turn, pack) for turn in dialogue.turns],
  }


def decode(
  example: Mapping[str, Any], split: str, captions: Captions
) -> Dialogue:
  """Makes a dialogue, its photos' files not looked for.

  Args:
    example: as TFDS gives it: texts are bytes, and turns a dict of lists.
    split: what it is an example of.
    captions: chooses the caption of a photo.

  Returns:
    What the data set's own reader gave.
  """
  turns = []
  for speaker, text, shares, photo_id, told, given, url in zip(
    *(
      example["turns"][name]
      for name in (
        "speaker",
        "text",
        "share_photo",
        "photo_id",
        "photo_description",
        "photo_caption",
        "photo_url",
      )
    ),
    strict=True,
  ):
    photo = None
    if shares:
      photo_id, told = photo_id.decode(), told.decode()
      caption = captions(photo_id, given.decode(), told)
      photo = Photo(photo_id, told, caption, url=url.decode())
    turns.append(Turn(int(speaker), text.decode(), photo))
  facts = example["facts"]
  return Dialogue(
    example["dialogue_id"].decode(),
    split,
    tuple(turns),
    json.loads(facts) if facts else None,
  )
