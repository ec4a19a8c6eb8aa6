"""Which request may begin when: limits of rate and number, of all and per host.

Pure bookkeeping on the times it is given. A host that must wait, or that is
slow, keeps nobody else waiting.
"""

import dataclasses
import heapq
import itertools
import math
from typing import Generic, TypeVar

from photochat_jax.data.fetch_rules import Limits

Job = TypeVar("Job")


@dataclasses.dataclass
class _Host:
  """What is known of one host; times in seconds of the caller's clock."""

  # (ready, order, job): a heap.
  waiting: list = dataclasses.field(default_factory=list)
  running: int = 0
  free_at: float = -math.inf  # When the next request may begin.
  due: float = math.inf  # The time of its entry that counts in `_due`.
  silent: int = 0  # Failures since it last answered.
  silent_since: float = 0.0


class Schedule(Generic[Job]):
  """Jobs of many hosts, each to be begun when its turn has come."""

  def __init__(self, limits: Limits):
    self._limits = limits
    self._hosts: dict[str, _Host] = {}
    # (time, order, host): no host is ready before its entry; others are left
    # of earlier days.
    self._due: list = []
    self._order = itertools.count()
    self._free_at = -math.inf
    self.running = 0
    self.waiting = 0

  def add(self, host: str, job: Job, ready: float = -math.inf) -> None:
    """Adds a job that may begin from the time `ready` on."""
    state = self._hosts.setdefault(host, _Host())
    heapq.heappush(state.waiting, (ready, next(self._order), job))
    self.waiting += 1
    self._push(host)

  def take(self, now: float) -> tuple[str, Job] | None:
    """Takes a job that may begin now, which then counts as running."""
    if self.next_time() > now:
      return None
    host = heapq.heappop(self._due)[2]
    state = self._hosts[host]
    state.due = math.inf
    job = heapq.heappop(state.waiting)[2]
    state.running += 1
    self.running += 1
    self.waiting -= 1
    limits = self._limits
    state.free_at = max(state.free_at, now) + 1 / limits.host_rate
    self._free_at = max(self._free_at, now) + 1 / limits.rate
    self._push(host)
    return host, job

  def next_time(self) -> float:
    """When a job may begin; infinite where one must end first, or none is."""
    if self.running >= self._limits.concurrency:
      return math.inf
    while self._due:
      time, _, host = self._due[0]
      state = self._hosts[host]
      if time == state.due:
        if self._ready(state) <= time:
          return max(time, self._free_at)
        state.due = math.inf
      heapq.heappop(self._due)
      self._push(host)
    return math.inf

  def done(self, host: str) -> None:
    """A job of the host has ended."""
    self._hosts[host].running -= 1
    self.running -= 1
    self._push(host)

  def hold(self, host: str, until: float) -> None:
    """Begins nothing more of a host before a time."""
    state = self._hosts[host]
    state.free_at = max(state.free_at, until)

  def answered(self, host: str) -> None:
    """The host has answered, whatever it said."""
    self._hosts[host].silent = 0

  def was_silent(self, host: str, now: float) -> bool:
    """Counts a request without an answer.

    Returns:
      Whether the host's silence has lasted longer than `Limits.patience`.
    """
    state = self._hosts[host]
    if not state.silent:
      state.silent_since = now
    state.silent += 1
    return (
      state.silent >= self._limits.patience_tries
      and now - state.silent_since >= self._limits.patience
    )

  def drop(self, host: str) -> list[Job]:
    """Takes away all jobs of a host that have not begun."""
    state = self._hosts[host]
    jobs = [job for _, _, job in sorted(state.waiting)]
    self.waiting -= len(jobs)
    state.waiting.clear()
    return jobs

  def _ready(self, state: _Host) -> float:
    if not state.waiting or state.running >= self._limits.host_concurrency:
      return math.inf
    return max(state.free_at, state.waiting[0][0])

  def _push(self, host: str) -> None:
    state = self._hosts[host]
    ready = self._ready(state)
    if ready < state.due:
      state.due = ready
      heapq.heappush(self._due, (ready, next(self._order), host))
