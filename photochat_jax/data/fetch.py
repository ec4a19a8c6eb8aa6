"""Fetches photos: many at once, politely, and going on where it stopped.

Each photo ends in one row of the manifest (`photo_store`), a file or a reason
of `fetch_rules.KINDS`. The next run asks for what is missing and not missing
for good. Killed at any moment, it goes on from there. `fetch_run` is the loop,
`download` one request, `fetch_schedule` whose turn it is, `fetch_rules` what is
allowed.
"""

import asyncio
import contextlib
import hashlib
import os
import pathlib
import random
import re
import time
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from photochat_jax.data import fetch_rules, fetch_run, photo_store, schema
from photochat_jax.data.fetch_rules import KINDS, Failure, Limits
from photochat_jax.data.photo_store import OK, Row

# The public copy that Open Images' own download script reads, without a key:
# photos of at most 1024 pixels a side.
_OPEN_IMAGES = "https://open-images-dataset.s3.amazonaws.com/{}.jpg"
_OPEN_IMAGES_ID = re.compile(
  "(train|validation|test|challenge2018)/[0-9a-fA-F]{16}"
)


class FetchError(ValueError):
  """Nothing can be fetched; the sentence says what to do."""


class Result(NamedTuple):
  """What a run found and did.

  Attributes:
    rows: the last row of each id that was asked for and has one.
    had: ids whose files were there before, and sound.
    fetched: ids whose files came now.
    damaged_lines: of the manifest, left out.
    stopped: whether the run was interrupted.
  """

  rows: dict[str, Row]
  had: set[str]
  fetched: set[str]
  damaged_lines: int
  stopped: bool


def open_images_url(photo_id: str) -> str:
  """Where Open Images keeps a photo; '' for an id of another form."""
  if not _OPEN_IMAGES_ID.fullmatch(photo_id):
    return ""
  return _OPEN_IMAGES.format(photo_id)


def addresses(
  splits: Mapping[str, Sequence[schema.Dialogue]], by_id: bool
) -> dict[str, str]:
  """Where the photos of dialogues can be had.

  Args:
    splits: name of a split -> its dialogues.
    by_id: ask Open Images for the id; `Photo.url` is taken otherwise.

  Returns:
    photo id -> address, '' where there is none.
  """
  return {
    turn.photo.id: open_images_url(turn.photo.id) if by_id else turn.photo.url
    for dialogues in splits.values()
    for dialogue in dialogues
    for turn in dialogue.turns
    if turn.photo
  }


def fetch(
  folder: str | os.PathLike,
  wanted: Mapping[str, str],
  limits: Limits,
  retry: bool = False,
  check: bool = False,
  on_start: Callable[[int], None] = lambda count: None,
  on_row: Callable[[Row], None] = lambda row: None,
  clock: Callable[[], float] = time.monotonic,
  sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
  rng: random.Random | None = None,
  wall_clock: Callable[[], float] = time.time,
  names: Any = None,
  allowed: frozenset[str] = frozenset(),
) -> Result:
  """Fetches the photos that a folder lacks.

  Ctrl-C ends it early: what came until then stays, and is returned.

  Args:
    folder: the data set's, on this machine.
    wanted: photo id -> address.
    limits: what to use of the network and of a server's patience.
    retry: ask again for photos that failed for good, too.
    check: decode the photos that are there, and fetch damaged ones again.
    on_start: told how many photos will be asked for.
    on_row: told of each photo that came or failed.
    clock: seconds that pass evenly.
    sleep: waits for some seconds.
    rng: decides how long to wait within bounds.
    wall_clock: seconds since 1970, for dates in servers' answers.
    names: an `aiohttp.abc.AbstractResolver`; the system's where None.
    allowed: IP addresses to be asked though they are not public. For tests.

  Returns:
    What there is, what came, and why the rest did not.

  Raises:
    FetchError: aiohttp is not installed, the folder is not local or cannot be
      written.
    photo_store.StoreError: another process fetches into the folder.
  """
  try:
    from photochat_jax.data import download
  except ImportError as e:
    raise FetchError(
      f"Fetching needs aiohttp ({e}): pip install -e '.[data]'"
    ) from e
  downloader = download.Downloader(limits, names, allowed, wall_clock)
  with contextlib.ExitStack() as stack:
    # Pillow remarks on odd files; what cannot be used is told as a failure.
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", module="PIL")
    try:
      writer = stack.enter_context(photo_store.Writer(folder))
      manifest = photo_store.read_manifest(folder, wanted)
      had = _sound(folder, wanted, manifest.rows, check)
      todo = {
        photo_id: url
        for photo_id, url in wanted.items()
        if photo_id not in had
        and (retry or _ask_again(manifest.rows.get(photo_id), url))
      }
      on_start(len(todo))
      fetcher = fetch_run.Fetcher(
        limits=limits,
        downloader=downloader,
        writer=writer,
        rows=manifest.rows,
        on_row=on_row,
        clock=clock,
        sleep=sleep,
        rng=rng or random.Random(),
        allowed=allowed,
      )
      try:
        asyncio.run(fetcher.run(todo))
        stopped = False
      except KeyboardInterrupt:
        stopped = True
    except OSError as e:
      raise FetchError(
        f"{os.fspath(folder)}/photos cannot be used ({e}): see to it, then "
        "run the same command again."
      ) from e
  return Result(manifest.rows, had, fetcher.fetched, manifest.damaged, stopped)


def _ask_again(row: Row | None, url: str) -> bool:
  """Whether a photo that is not there is asked for without `retry`."""
  if row is None or row.status == OK or row.url != url:
    return True
  return row.status not in KINDS or KINDS[row.status].again


def _sound(
  folder: str | os.PathLike,
  wanted: Mapping[str, str],
  rows: Mapping[str, Row],
  check: bool,
) -> set[str]:
  """The ids of the photos that are there and, as far as looked, sound."""
  photos = pathlib.Path(folder) / "photos"

  def is_sound(item):
    photo_id, path = item
    row = rows.get(photo_id)
    stored = (
      row is not None
      and row.status == OK
      and photos / row.file == pathlib.Path(path)
    )
    size = os.path.getsize(path)
    if size != row.bytes if stored else not size:
      return False
    if not check:
      return True
    data = pathlib.Path(path).read_bytes()
    if stored and hashlib.sha256(data).hexdigest() != row.sha256:
      return False
    try:
      fetch_rules.examine(data)
    except Failure:
      return False
    return True

  found = photo_store.find(folder, wanted)
  with futures.ThreadPoolExecutor(fetch_run.DECODERS) as pool:
    sound = list(pool.map(is_sound, found.items()))
  return {photo_id for photo_id, good in zip(found, sound, strict=True) if good}
