"""Reads files of JSON records, whatever is in them, one record at a time.

Three shapes are published, and told apart by what a file holds:

    [{...}, {...}]                a list: PhotoChat, DialogCC, PhotoChat++
    {"data": [{...}, {...}]}      a list under a key
    {...}                         JSON lines: MMDialog, whose files have
    {...}                         a million of them and are never read whole

A list is decoded item by item, so that only its text and one record are in
memory. A line that is no JSON is a broken record; a list that is none is an
error of its file, for what follows the damage cannot be told from it.
"""

import json
import re
import reprlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

# What files call our splits, what is published first.
NAMES = {
  "train": ("train",),
  "dev": ("valid", "dev", "validation", "val"),
  "test": ("test",),
}
_SUFFIXES = (".json", ".jsonl")
EXCERPT = 200  # characters of a record that are kept of it
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder()
# Python refuses integers of more than 4,300 digits; as floats they are read,
# and a field that asks for an integer then names them.
_HUGE = json.JSONDecoder(parse_int=float)
_ENCODER = json.JSONEncoder()
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60
_SHORT.maxlevel = 2


class Broken(ValueError):
  """One record cannot be used.

  Attributes:
    reason: what is wrong, the same words for all records it is wrong with.
    value: the start of what was there instead; '' where it tells nothing.
  """

  def __init__(self, reason: str, *value: Any):
    self.reason = reason
    self.value = short(value[0]) if value else ""
    super().__init__(f"{reason}: {self.value}" if value else reason)


class _NoList(Exception):
  """A file of JSON that holds no records."""


class Item(NamedTuple):
  """What stands at one place of a file: a record, or why there is none."""

  position: str  # 'record 0', 'line 1'
  record: Any
  error: Broken | None = None


def short(value: Any) -> str:
  """The start of a value, safe to print, however deep or long it is."""
  return _SHORT.repr(value)


def excerpt(record: Any) -> str:
  """The first characters of a record's JSON, or of a line that is none."""
  if isinstance(record, bytes):
    return record[: 4 * EXCERPT].decode("utf-8", "replace")[:EXCERPT]
  text = ""
  for part in _ENCODER.iterencode(record):  # So deep a record is no matter.
    text += part[:EXCERPT]
    if len(text) >= EXCERPT:
      break
  return text[:EXCERPT]


def _decode(text: str, start: int) -> tuple[Any, int]:
  """One value, and where it ends."""
  try:
    return _DECODER.raw_decode(text, start)
  except json.JSONDecodeError:
    raise
  except ValueError:
    return _HUGE.raw_decode(text, start)


def _skip(text: str, start: int) -> int:
  return _SPACE.match(text, start).end()


def _list_items(text: str, start: int) -> Iterator[Any]:
  """The items of the list whose bracket stands before `start`."""
  start = _skip(text, start)
  more = text[start : start + 1] != "]"
  while more:
    value, start = _decode(text, start)
    yield value
    start = _skip(text, start)
    mark = text[start : start + 1]
    if mark not in (",", "]"):
      raise json.JSONDecodeError("Expecting ',' or ']'", text, start)
    more = mark == ","
    start = _skip(text, start + 1) if more else start
  start = _skip(text, start + 1)
  if start != len(text):
    raise json.JSONDecodeError("Extra data", text, start)


def _records(content: bytes) -> Iterator[Any]:
  """The records of a file that is one value.

  Raises:
    ValueError: it is no JSON.
    _NoList: it is, and no list of records.
  """
  text = content.decode("utf-8-sig")
  start = _skip(text, 0)
  if text[start : start + 1] == "[":
    yield from _list_items(text, start + 1)
    return
  value, start = _decode(text, start)
  if _skip(text, start) != len(text):
    raise json.JSONDecodeError("Extra data", text, start)
  if not isinstance(value, dict) or not value:
    raise _NoList
  data = value.get("data", [value])  # One record alone is a line of JSON.
  if not isinstance(data, list):
    raise _NoList
  yield from data


def _line(number: int, line: bytes) -> Item:
  try:
    text = line.decode("utf-8-sig").strip()
    record, end = _decode(text, 0)
    if end != len(text):
      raise json.JSONDecodeError("Extra data", text, end)
  except (ValueError, RecursionError):
    return Item(f"line {number}", line, Broken("the line is no JSON"))
  return Item(f"line {number}", record)


def _are_lines(first: bytes, second: bytes, stream) -> bool:
  """Whether a file is JSON lines, by its first two lines.

  An object over several lines looks alike where its first line is damaged, or
  is all there is of its head: then the whole file has the word.
  """
  if first.removeprefix(_BOM).lstrip()[:1] == b"[" or not second:
    return False
  if _line(1, first).error is None:
    return True
  stream.seek(0)
  try:
    next(_records(stream.read()), None)
  except (ValueError, RecursionError, _NoList):
    return _line(2, second).error is None
  return False


def _items(file: epath.Path) -> Iterator[Item]:
  with file.open("rb") as stream:
    lines = (line for line in stream if line.strip() not in (b"", _BOM))
    are_lines = _are_lines(next(lines, b""), next(lines, b""), stream)
    stream.seek(0)
    if are_lines:
      for number, line in enumerate(stream, 1):
        if line.strip() not in (b"", _BOM):
          yield _line(number, line)
      return
    content = stream.read()
  for number, record in enumerate(_records(content)):
    yield Item(f"record {number}", record)


def read_items(file: epath.Path) -> Iterator[Item]:
  """Reads a file's records in order, none of them looked at yet.

  Args:
    file: a list of records, a list under the key `data`, or JSON lines.

  Yields:
    Each record with its position, counted from 0 in a list and from 1 in
    lines.

  Raises:
    ValueError: the file cannot be opened, or is of none of these shapes.
  """
  try:
    yield from _items(file)
  except _NoList:
    raise ValueError(f"{file} is not a list of dialogues.") from None
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{file} is not JSON ({e}): fetch it again.") from e
  except OSError as e:
    raise ValueError(f"{file} cannot be read ({e.strerror}).") from e


def find_files(folder: epath.Path, split: str) -> list[epath.Path]:
  """The files of a split: `{split}.json(l)` or all of `{split}/`.

  Args:
    folder: the data set's.
    split: 'train', 'dev' or 'test'; files may say it as in `NAMES`.

  Returns:
    The files of the first name that there are any of; none for another split.
  """
  for name in NAMES.get(split, ()):
    for suffix in _SUFFIXES:
      if (folder / (name + suffix)).exists():
        return [folder / (name + suffix)]
    if files := list_files(folder / name):
      return files
  return []


def list_files(folder: epath.Path) -> list[epath.Path]:
  """The files of JSON in a folder, by name; none if there is no folder."""
  if not folder.is_dir():
    return []
  return sorted(f for f in folder.iterdir() if f.suffix in _SUFFIXES)
