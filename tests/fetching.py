"""Fetching in tests: from loopback, without a clock, with a known jitter."""

import asyncio
import random
import socket

import fault_server as faults
from aiohttp import abc
from fault_server import photo

from photochat_jax.data import fetch, photo_store
from photochat_jax.data.fetch_rules import Limits

LOOPBACK = frozenset({"127.0.0.1"})
LIMITS = Limits(
  tries=3,
  backoff=1.0,
  max_bytes=100_000,
  connect=60.0,
  stall=60.0,
  total=60.0,
  allow_http=True,
)
GOOD = photo(seed=1)


class Clock:
  """Time that passes when somebody sleeps, and then at once.

  Attributes:
    now: seconds.
    slept: what was asked for, in order.
  """

  def __init__(self):
    self.now = 0.0
    self.slept: list[float] = []

  def __call__(self) -> float:
    return self.now

  async def sleep(self, seconds: float) -> None:
    self.slept.append(seconds)
    self.now += seconds
    await asyncio.sleep(0)


def run(folder, wanted, limits=LIMITS, clock=None, **options):
  clock = clock or Clock()
  given = {"allowed": LOOPBACK, "clock": clock, "sleep": clock.sleep}
  given |= {"rng": random.Random(0)} | options
  return fetch.fetch(folder, wanted, limits, **given)


class Half(random.Random):
  """Jitter of one half."""

  def uniform(self, a, b):
    return a + (b - a) / 2


class Names(abc.AbstractResolver):
  """Answers for each name in turn; the last stays."""

  def __init__(self, **names):
    self.names = {k.replace("_", "."): list(v) for k, v in names.items()}
    self.asked = []

  async def resolve(self, host, port=0, family=0):
    self.asked.append(host)
    answers = self.names[host]
    addresses = answers.pop(0) if len(answers) > 1 else answers[0]
    if isinstance(addresses, Exception):
      raise addresses
    return [
      {
        "hostname": host,
        "host": address,
        "port": port,
        "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
        "proto": socket.IPPROTO_TCP,
        "flags": 0,
      }
      for address in addresses
    ]

  async def close(self):
    pass


def fetch_one(folder, server, *answers, **options):
  """Fetches a photo with these answers, and a good one beside it."""
  wanted = {
    "odd": server.add("/odd.jpg", *answers),
    "good": server.add("/good.jpg", faults.ok(GOOD)),
  }
  result = run(folder, wanted, **options)
  assert result.rows["good"].status == "ok"
  assert {"odd", "good"} == result.rows.keys()
  assert ("odd" in result.fetched) == (result.rows["odd"].status == "ok")
  # What is written is what was said, and nothing is left half done.
  assert photo_store.read_manifest(folder).rows == result.rows
  assert list((folder / "photos" / "incoming").iterdir()) == []
  return result.rows["odd"]
