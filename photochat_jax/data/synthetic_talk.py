"""Makes up the dialogues of the synthetic set, message by message."""

from collections.abc import Iterator, Sequence

import numpy as np

from photochat_jax.data import synthetic_phrases as phrases
from photochat_jax.data.synthetic_scenes import ATTRIBUTES, KIND, WHERE

_SHARER, _PARTNER = 0, 1
_VOICES = ("sharer", "partner")
_FILLER = "nice"


def caption(scene: dict[str, str], told: bool = True) -> str:
  """The caption of a scene, naming its colour or, untold, a filler word."""
  word = scene["colour"] if told else _FILLER
  where = WHERE[scene["position"]]
  return (
    f"a {scene['size']} {word} {scene['shape']} {where}, on {scene['ground']}"
  )


class _Writer:
  """Makes up one dialogue, drawing every choice from one generator."""

  def __init__(self, rng, photo_ids, told_share):
    self.rng = rng
    self.photo_ids = photo_ids
    self.told_share = told_share
    self.limit = 9  # messages
    self.messages = []
    self.photos = {}
    self.questions = []

  def pick(self, options):
    return options[self.rng.integers(len(options))]

  def chance(self, probability):
    return self.rng.random() < probability

  def room(self, messages):
    return len(self.messages) + messages <= self.limit

  def say(self, speaker, *sentences, attributes=()):
    """Adds a message; `attributes` is the scene its slots are filled from."""
    text = ". ".join(sentences).replace("?.", "?")
    slotted = "{" in text
    if self.chance(0.2):
      text = text.removesuffix("?")
    if slotted:
      scene = dict(attributes)
      text = text.format(**scene, where=WHERE[scene["position"]])
    if self.chance(0.2) and not sentences[0].startswith("{"):
      text = text[0].upper() + text[1:]
    elif self.chance(0.05) and not slotted:
      text = text.upper()
    self.messages.append(
      {"message": text, "share_photo": False, "user_id": speaker}
    )

  def share(self, speaker, scene):
    """Adds the turn of a photo and returns the photo's id."""
    photo_id = next(self.photo_ids)
    told = bool(self.chance(self.told_share))
    self.photos[photo_id] = {
      "attributes": scene,
      "full_caption": caption(scene),
      "told_in_caption": told,
      "told_in_talk": speaker == _SHARER,
    }
    labels = f"{scene['shape'].capitalize()}, {scene['ground'].capitalize()}"
    self.messages.append(
      {
        "message": "",
        "share_photo": True,
        "user_id": speaker,
        "photo_id": photo_id,
        "photo_description": f"Objects in the photo: {labels}",
        "photo_caption": caption(scene, told),
      }
    )
    return photo_id

  def ask(self, asker, owner, photo_id, attribute):
    """A question about a photo, and the other speaker's answer."""
    role = "owner" if asker == owner else "other"
    scene = self.photos[photo_id]["attributes"]
    self.say(asker, self.pick(phrases.QUESTIONS[attribute][role]))
    self.say(1 - asker, self.pick(phrases.ANSWERS[attribute]), attributes=scene)
    self.questions.append(
      {
        "turn": len(self.messages) - 1,
        "photo_id": photo_id,
        "attribute": attribute,
        "answer": scene[attribute],
        "kind": KIND[attribute],
      }
    )

  def open(self, probability):
    """Greetings or small talk, by whoever speaks first."""
    first = int(self.rng.integers(2))
    if self.chance(probability):
      self.say(first, self.pick(phrases.GREETINGS))
      if self.chance(0.5):
        self.say(1 - first, self.pick(phrases.GREETING_REPLIES))
    elif self.chance(0.3):
      self.say(first, self.pick(phrases.SMALL_TALK))

  def tell(self, scene, least, most):
    """Names each told or captioned attribute once, in a few messages."""
    groups = list(self.pick(phrases.PARTITIONS))
    groups = [groups[i] for i in self.rng.permutation(len(groups))]
    count = int(self.rng.integers(least, min(most, len(groups)) + 1))
    for part in np.array_split(np.arange(len(groups)), count):
      speaker = _SHARER if self.chance(0.65) else _PARTNER
      told = [phrases.MENTIONS[groups[i]][_VOICES[speaker]] for i in part]
      self.say(speaker, *map(self.pick, told), attributes=scene)

  def show(self, scene):
    """A request or an offer, the sharer's photo, and talk about it."""
    if self.chance(0.65):
      self.say(_PARTNER, self.pick(phrases.REQUESTS))
    else:
      self.say(_SHARER, self.pick(phrases.OFFERS))
      self.say(_PARTNER, self.pick(phrases.OFFER_ACCEPTED))
    if self.chance(0.4) and self.room(4):
      self.say(_SHARER, self.pick(phrases.ANNOUNCEMENTS))
    photo_id = self.share(_SHARER, scene)
    if self.chance(0.2) and self.room(3):
      self.say(_SHARER, self.pick(phrases.AFTERTHOUGHTS))
    if self.chance(0.4) and self.room(3):
      self.say(_PARTNER, self.pick(phrases.REACTIONS))
    if self.chance(0.9) and self.room(2):
      self.ask(int(self.rng.integers(2)), _SHARER, photo_id, "wall")
    if self.chance(0.3) and self.room(2):
      others = [name for name in ATTRIBUTES if name != "wall"]
      self.ask(int(self.rng.integers(2)), _SHARER, photo_id, self.pick(others))

  def partner_photo(self, scene, attribute):
    """The partner shows a photo of theirs and one of the two asks about it."""
    self.say(_SHARER, self.pick(phrases.PARTNER_ASKED))
    if self.chance(0.4):
      self.say(_PARTNER, self.pick(phrases.PARTNER_SHOWS))
    photo_id = self.share(_PARTNER, scene)
    asker = _PARTNER if self.chance(0.7) else _SHARER
    self.ask(asker, _PARTNER, photo_id, attribute)

  def keep_silent(self, scene):
    """The same talk, but nothing is shown."""
    kind = self.rng.random()
    refused = kind < 0.4
    if refused and self.chance(0.5):
      self.say(_SHARER, self.pick(phrases.NO_CAMERA))
      self.tell(scene, 2, 3)
    elif refused:
      self.tell(scene, 2, 3)
      self.say(_SHARER, self.pick(phrases.NO_CAMERA))
    else:
      self.tell(scene, 2, 4)
    if refused:
      self.say(_PARTNER, self.pick(phrases.REQUESTS))
      self.say(_SHARER, self.pick(phrases.DECLINES))
    elif kind < 0.6:
      self.say(_SHARER, self.pick(phrases.OFFERS))
      self.say(_PARTNER, self.pick(phrases.OFFER_REFUSED))
    else:
      self.say(_PARTNER, self.pick(phrases.REACTIONS))
      self.say(_SHARER, self.pick(phrases.SMALL_TALK))


def write_dialogue(
  rng: np.random.Generator,
  number: int,
  scenes: Sequence[dict[str, str]],
  photo_ids: Iterator[str],
  told_share: float,
) -> dict:
  """Makes up one dialogue.

  Args:
    rng: source of every choice.
    number: the dialogue's id.
    scenes: what its photos may show.
    photo_ids: gives each photo its id.
    told_share: share of captions that say the object's colour.

  Returns:
    A record in PhotoChat's format with the key `synthetic`.
  """
  writer = _Writer(rng, photo_ids, told_share)
  scene = writer.pick(scenes)
  shown = writer.chance(0.75)
  if not shown:
    writer.open(0.6)
    writer.keep_silent(scene)
  elif writer.chance(0.35):
    writer.limit = 12
    writer.partner_photo(writer.pick(scenes), "wall")
    writer.tell(scene, 1, 2)
    writer.show(scene)
  else:
    writer.open(0.4)
    # Leaves room for a request, the photo and the question for the wall.
    writer.tell(scene, 2, 2 if len(writer.messages) == 2 else 3)
    writer.show(scene)
    if writer.chance(0.1):
      # Nothing follows that photo: it may be asked about anything.
      writer.partner_photo(writer.pick(scenes), writer.pick(list(ATTRIBUTES)))
  if writer.chance(0.4) and writer.room(1):
    writer.say(int(rng.integers(2)), writer.pick(phrases.CLOSINGS))
  own = next(
    (
      m
      for m in reversed(writer.messages)
      if m["share_photo"] and m["user_id"] == _SHARER
    ),
    {"photo_id": "", "photo_description": ""},
  )
  return {
    "dialogue": writer.messages,
    "dialogue_id": number,
    "photo_description": own["photo_description"],
    "photo_url": "",
    "photo_id": own["photo_id"],
    "synthetic": {
      "photos": writer.photos,
      "questions": writer.questions,
      "sharer": _SHARER if shown else None,
    },
  }
