"""When it asks again, how long it waits, whom it gives up."""

import asyncio
import collections
import dataclasses

import pytest

pytest.importorskip("aiohttp")

import fault_server as faults  # noqa: E402
from fault_server import FaultServer, photo  # noqa: E402
from fetching import GOOD, LIMITS, Clock, Half, Names, fetch_one, run  # noqa: E402

from photochat_jax.data import fetch_rules  # noqa: E402


@pytest.fixture
def server():
  with FaultServer() as server:
    yield server


FOR_NOW = {
  "500": faults.status(500),
  "503": faults.status(503),
  "429": faults.status(429, retry_after="7"),
  "reset": faults.reset(),
  "closed": faults.cut(b""),
  "cut short": faults.cut(faults.ok(GOOD, content_length="9999")),
}


@pytest.mark.parametrize("name", FOR_NOW)
def test_what_fails_for_now_is_tried_again(tmp_path, server, name):
  row = fetch_one(tmp_path, server, FOR_NOW[name], faults.ok(photo(seed=2)))
  assert row.status == "ok"
  assert server.asked["/odd.jpg"] == 2


def test_tries_wait_twice_as_long_each_time(tmp_path, server):
  clock = Clock()
  url = server.add("/a.jpg", faults.status(500))
  limits = dataclasses.replace(LIMITS, tries=7, backoff=4.0, longest_wait=60.0)
  run(tmp_path, {"a": url}, limits, clock, rng=Half())
  # Half of 4, 8, 16, 32, 60, 60.
  waits = [s for s in clock.slept if s > 0]
  assert waits == pytest.approx([2, 4, 8, 16, 30, 30])
  assert server.asked["/a.jpg"] == 7


@pytest.mark.parametrize(
  "value", ["40", "Thu, 01 Jan 1970 00:16:40 GMT"], ids=["seconds", "date"]
)
def test_retry_after_is_honoured_and_by_the_whole_host(tmp_path, server, value):
  clock = Clock()
  asked = []

  async def first(writer):
    asked.append(clock.now)
    writer.write(faults.status(429, retry_after=value, connection="close"))

  async def later(writer):
    asked.append(clock.now)
    writer.write(faults.ok(GOOD, connection="close"))

  wanted = {
    "a": server.add("/a.jpg", first, later),
    "b": server.add("/b.jpg", later),
  }
  limits = dataclasses.replace(LIMITS, host_concurrency=1)
  result = run(
    tmp_path, wanted, limits, clock, rng=Half(), wall_clock=lambda: 960.0
  )
  assert result.fetched == {"a", "b"}
  assert asked[0] == 0.0
  assert asked[1] == pytest.approx(40.0)  # b, which had not failed.
  assert asked[2] == pytest.approx(40.5)  # a, with its own pause.


def test_a_host_that_asks_for_an_hour_is_left_for_this_run(tmp_path, server):
  wanted = {
    name: server.add(f"/{name}", faults.status(429, retry_after="3600"))
    for name in "abcdef"
  }
  limits = dataclasses.replace(LIMITS, host_concurrency=1)
  result = run(tmp_path, wanted, limits)
  assert {row.status for row in result.rows.values()} == {"busy"}
  assert sum(server.asked.values()) == 1
  # The next run asks again.
  for name in "abcdef":
    server.add(f"/{name}", faults.ok(GOOD))
  assert run(tmp_path, wanted, limits).fetched == set("abcdef")


def test_a_dead_host_is_given_up(tmp_path):
  with FaultServer() as gone:
    wanted = {str(n): gone.url(f"/{n}") for n in range(200)}
  limits = dataclasses.replace(
    LIMITS, patience=5.0, patience_tries=3, host_rate=10.0, tries=2
  )
  result = run(tmp_path, wanted, limits)
  counts = collections.Counter(row.status for row in result.rows.values())
  assert sum(counts.values()) == 200
  assert counts.keys() == {"no_connection", "given_up"}
  # Ten a second for five seconds, and the few then under way.
  assert counts["given_up"] >= 140
  assert fetch_rules.KINDS["given_up"].again


def test_a_slow_host_keeps_nobody_waiting(tmp_path, server):
  names = Names(slow_test=[["127.0.0.1"]], quick_test=[["127.0.0.1"]])
  free = asyncio.Event()
  asked = []

  async def slow(writer):
    await free.wait()
    writer.write(faults.ok(GOOD, connection="close"))

  async def quick(writer):
    asked.append(writer)
    if len(asked) == 8:
      free.set()  # The slow ones answer when all quick ones have been asked.
    writer.write(faults.ok(GOOD, connection="close"))

  wanted = {}
  for name, answer in (("slow", slow), ("quick", quick)):
    for n in range(8):
      server.add(f"/{name}{n}", answer)
      wanted[f"{name}{n}"] = server.url(f"/{name}{n}", f"{name}.test")
  limits = dataclasses.replace(LIMITS, concurrency=3, host_concurrency=2)
  result = run(tmp_path, wanted, limits, names=names)
  assert result.fetched == wanted.keys()
