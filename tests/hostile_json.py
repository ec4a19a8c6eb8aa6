"""What a file of JSON may hold instead of a data set, and how readers fare."""

import copy
import json

from hypothesis import strategies as st

from photochat_jax.data import dialogue as dialogue_lib
from photochat_jax.data import photo_store, schema
from photochat_jax.data.records import Quarantine

# Characters that mean something in paths, in JSON or to an encoder.
ODD_TEXT = st.text(st.sampled_from('ab ./\\"\0\n\ud83d\ude00é'), max_size=6)
ODD_VALUES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-2, 3),
  st.sampled_from([10**30, -(10**400), 1e308, 0.0, 1.0]),
  st.sampled_from([float("nan"), float("inf"), -float("inf")]),
  ODD_TEXT,
  st.sampled_from(["", "..", "/etc/passwd", "a" * 5000, "x/" * 3000 + "y"]),
)


def odd_json(keys):
  """JSON of any shape, its keys those that readers look for."""
  return st.recursive(
    ODD_VALUES,
    lambda inner: st.one_of(
      st.lists(inner, max_size=3),
      st.dictionaries(st.sampled_from(keys), inner, max_size=4),
    ),
    max_leaves=8,
  )


def keys_of(record):
  """All keys in a record."""
  if isinstance(record, dict):
    inner = (keys_of(value) for value in record.values())
    return sorted({*record, *(key for keys in inner for key in keys)})
  if isinstance(record, list):
    return sorted({key for item in record for key in keys_of(item)})
  return []


def _places(value):
  """Every (container, key) in a value."""
  items = []
  if isinstance(value, dict):
    items = list(value.items())
  elif isinstance(value, list):
    items = list(enumerate(value))
  for key, inner in items:
    yield value, key
    yield from _places(inner)


@st.composite
def damaged(draw, good):
  """A record with one to three places changed or gone."""
  record = copy.deepcopy(good)
  for _ in range(draw(st.integers(1, 3))):
    places = list(_places(record))
    if not places:
      break
    container, key = draw(st.sampled_from(places))
    if draw(st.booleans()):
      container[key] = draw(odd_json(keys_of(good)))
    else:
      del container[key]
  return record


def records(good):
  """Records whole, damaged, and none."""
  return st.one_of(
    st.just(good), damaged(good), damaged(good), odd_json(keys_of(good))
  )


def _dump(values, lines):
  parts = [json.dumps(value) for value in values]
  return "\n".join(parts) if lines else f"[{', '.join(parts)}]"


@st.composite
def files(draw, good):
  """Content of a file, as bytes: nearly right, or nothing of the kind."""
  kind = draw(st.sampled_from(["cut", "flipped", "wrapped", "deep", "noise"]))
  items = draw(st.lists(records(good), max_size=3))
  content = _dump([good, *items], draw(st.booleans())).encode()
  if kind == "cut":
    return content[: draw(st.integers(0, len(content)))]
  if kind == "flipped":
    place = draw(st.integers(0, len(content) - 1))
    byte = draw(st.binary(min_size=1, max_size=2))
    return content[:place] + byte + content[place + 1 :]
  if kind == "wrapped":
    key = draw(st.sampled_from(["data", "records", ""]))
    indent = draw(st.sampled_from([None, 1]))
    value = draw(st.one_of(st.just([good, *items]), ODD_VALUES))
    return json.dumps({key: value}, indent=indent).encode()
  if kind == "deep":
    depth = draw(st.sampled_from([50, 990, 5000, 200_000]))
    middle = draw(st.sampled_from([b"", b"1", b"9" * 5000, b"NaN"]))
    nest = b"[" * depth + middle + b"]" * depth
    return b"[" + content.strip(b"[]") + b", " * bool(items) + nest + b"]"
  return draw(st.one_of(st.binary(max_size=40), st.text().map(str.encode)))


def read(read_split, folder, split, **options):
  """What a reader makes of a folder: its answer, or None for its one sentence.

  Whatever it gives must be what `schema` promises, and usable from there on.
  """
  quarantine = Quarantine(folder / "quarantine.jsonl")
  options = {"max_broken": 1.0, "quarantine": quarantine} | options
  try:
    dialogues, coverage = read_split(folder, split, **options)
  except ValueError as e:
    assert type(e) is ValueError
    sentence = str(e)
    assert sentence.endswith(".") and "\n" not in sentence
    sentence.encode()
    assert len(sentence) < 1000
    return None
  assert len({d.id for d in dialogues}) == len(dialogues) == coverage.dialogues
  assert len(coverage.broken) == sum(n for _, n in coverage.reasons)
  str(coverage).encode()
  if coverage.broken:
    rows = quarantine.path.read_text().splitlines()
    assert len(rows) == len(quarantine.rows) >= len(set(coverage.broken))
    assert all(len(json.loads(row)["excerpt"]) <= 200 for row in rows)
  for dialogue in dialogues:
    check_dialogue(dialogue, split)
  return dialogues, coverage


def check_dialogue(dialogue, split):
  """A dialogue is as `schema` says, and can be worked with."""
  assert isinstance(dialogue, schema.Dialogue)
  assert dialogue.split == split and dialogue.id
  dialogue.id.encode()
  assert isinstance(dialogue.turns, tuple) and dialogue.turns
  for turn in dialogue.turns:
    assert turn.speaker in (0, 1) and type(turn.speaker) is int
    turn.text.encode()
    if turn.photo:
      assert photo_store.is_inside(turn.photo.id)
      assert turn.photo.caption is None or turn.photo.caption.strip()
      f"{turn.photo.description}{turn.photo.caption}{turn.photo.url}".encode()
  dialogue_lib.merge_turns(dialogue.turns)
  json.dumps(dialogue.facts)
