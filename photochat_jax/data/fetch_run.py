"""The run of `fetch`: from addresses to files and rows of the manifest.

Job -> Schedule -> Downloader -> examine -> Writer
         ^             |
         '- redirects, tries again
"""

import asyncio
import dataclasses
import functools
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from concurrent import futures
from typing import Any

from photochat_jax.data import fetch_rules, fetch_schedule, photo_store
from photochat_jax.data.fetch_rules import KINDS, Failure, Limits
from photochat_jax.data.photo_store import OK, Row

# Photos decoded at once: their memory is bounded by these.
DECODERS = min(4, os.cpu_count() or 1)
# Names looked up at once: dead ones take long.
_LOOKUPS = 32
_DETAIL = 200  # Characters of a failure's detail that are kept.


@dataclasses.dataclass
class Job:
  """One photo under way: where to ask next, and what was done for it."""

  id: str
  url: str
  at: str
  tries: int = 0
  hops: int = 0


@dataclasses.dataclass
class Fetcher:
  """One run.

  Attributes:
    limits: what it may use.
    downloader: a `download.Downloader`, not entered yet.
    writer: the folder.
    rows: the last row of each id; kept up to date.
    on_row: told of each photo that came or failed.
    clock: seconds that pass evenly.
    sleep: waits for some seconds.
    rng: of the jitter.
    allowed: IP addresses to be asked though they are not public.
    fetched: the ids of the photos that came.
  """

  limits: Limits
  downloader: Any
  writer: photo_store.Writer
  rows: dict[str, Row]
  on_row: Callable[[Row], None]
  clock: Callable[[], float]
  sleep: Callable[[float], Awaitable[None]]
  rng: random.Random
  allowed: frozenset[str]
  fetched: set[str] = dataclasses.field(default_factory=set)

  def __post_init__(self):
    self._schedule: fetch_schedule.Schedule[Job] = fetch_schedule.Schedule(
      self.limits
    )

  async def run(self, todo: Mapping[str, str]) -> None:
    """Asks for photos until each has come or failed.

    Raises:
      OSError: a file or a row could not be written.
    """
    loop = asyncio.get_running_loop()
    loop.set_default_executor(futures.ThreadPoolExecutor(_LOOKUPS))
    running: set[asyncio.Task] = set()
    with futures.ThreadPoolExecutor(DECODERS) as self._decoders:
      async with self.downloader:
        try:
          for photo_id, url in todo.items():
            self._add(Job(photo_id, url, url))
          while running or self._schedule.waiting:
            while taken := self._schedule.take(self.clock()):
              running.add(asyncio.create_task(self._work(*taken)))
            running -= await self._wait(running)
        finally:
          for task in running:
            task.cancel()
          await asyncio.gather(*running, return_exceptions=True)

  async def _wait(self, running: set[asyncio.Task]) -> set[asyncio.Task]:
    """Waits until a job has ended, which it returns, or another may begin."""
    pause = self._schedule.next_time() - self.clock()
    timer = None
    if pause < float("inf"):
      timer = asyncio.ensure_future(self.sleep(max(0.0, pause)))
    waiting = running | ({timer} if timer else set())
    try:
      done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
      if timer:
        timer.cancel()
    done.discard(timer)
    for task in done:
      task.result()  # Raises what no server can cause: a full disk.
    return done

  def _add(self, job: Job, ready: float = -float("inf")) -> None:
    """Puts a job into the queue of the host it asks next."""
    try:
      host = fetch_rules.check_url(job.at, self.limits.allow_http, self.allowed)
    except Failure as failure:
      self._finish(job, failure)
      return
    self._schedule.add(host, job, ready)

  async def _work(self, host: str, job: Job) -> None:
    """Makes one request and decides what follows from it."""
    try:
      try:
        answer = await self.downloader.ask(job.at)
        self._schedule.answered(host)
        if answer.location:
          self._redirect(job, answer.location)
          return
        row = await asyncio.get_running_loop().run_in_executor(
          self._decoders, functools.partial(self._keep, job, answer.data)
        )
      except Failure as failure:
        self._failed(host, job, failure)
        return
      self._write(row)
      self.fetched.add(job.id)
    finally:
      self._schedule.done(host)

  def _redirect(self, job: Job, location: str) -> None:
    job.hops += 1
    if job.hops > self.limits.redirects:
      raise Failure("redirects", f"the next would be {location:.100}")
    job.at = location
    self._add(job)

  def _keep(self, job: Job, data: bytes) -> Row:
    """Looks at a file and stores it; in a thread."""
    photo = fetch_rules.examine(data, self.limits.max_pixels)
    extension = fetch_rules.EXTENSIONS[photo.format]
    digest, name = self.writer.keep(data, extension)
    return Row(
      id=job.id,
      url=job.url,
      status=OK,
      sha256=digest,
      file=name,
      bytes=len(data),
      width=photo.width,
      height=photo.height,
      format=photo.format,
    )

  def _failed(self, host: str, job: Job, failure: Failure) -> None:
    """Tries again later, gives the photo up, or its whole host."""
    now, limits = self.clock(), self.limits
    job.tries += 1
    wait = failure.wait or 0.0
    if failure.kind not in fetch_rules.SILENT:
      self._schedule.answered(host)
    elif self._schedule.was_silent(host, now):
      self._finish(job, failure)
      self._give_up(host, Failure("given_up", f"{host}: {failure.detail}"))
      return
    if wait > limits.longest_wait:
      self._finish(job, failure)
      self._give_up(host, failure)
    elif KINDS[failure.kind].tried and job.tries < limits.tries:
      self._schedule.hold(host, now + wait)
      later = now + wait + fetch_rules.pause(job.tries, limits, self.rng)
      self._add(dataclasses.replace(job, at=job.url, hops=0), later)
    else:
      self._finish(job, failure)

  def _give_up(self, host: str, failure: Failure) -> None:
    for job in self._schedule.drop(host):
      self._finish(job, failure)

  def _finish(self, job: Job, failure: Failure) -> None:
    detail = failure.detail[:_DETAIL]
    self._write(Row(job.id, job.url, failure.kind, detail=detail))

  def _write(self, row: Row) -> None:
    if self.rows.get(row.id) != row:  # It may fail just as it did before.
      self.writer.append(row)
      self.rows[row.id] = row
    self.on_row(row)
