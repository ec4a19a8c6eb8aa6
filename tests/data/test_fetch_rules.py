"""What may be asked, how long to wait, whose turn it is: on numbers."""

import email.utils
import ipaddress
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photochat_jax.data import fetch_rules
from photochat_jax.data.fetch_rules import Failure, Limits
from photochat_jax.data.fetch_schedule import Schedule


class Extreme(random.Random):
  """Always the lowest or always the highest."""

  def __init__(self, highest):
    super().__init__()
    self.highest = highest

  def uniform(self, a, b):
    return b if self.highest else a


def test_pauses_double_up_to_a_cap_and_jitter_is_full():
  limits = Limits(backoff=1.5, longest_wait=20.0)
  longest = [fetch_rules.pause(n, limits, Extreme(True)) for n in range(1, 8)]
  assert longest == [1.5, 3.0, 6.0, 12.0, 20.0, 20.0, 20.0]
  assert fetch_rules.pause(5, limits, Extreme(False)) == 0.0
  assert fetch_rules.pause(10**9, limits, Extreme(True)) == 20.0
  rng = random.Random(0)
  some = [fetch_rules.pause(2, limits, rng) for _ in range(4000)]
  assert 0 <= min(some) and max(some) <= 3
  # Uniform: mean 1.5, whose error is 3 / sqrt(12 * 4000).
  assert sum(some) / 4000 == pytest.approx(1.5, abs=5 * 0.0137)


@pytest.mark.parametrize(
  "value, seconds",
  [
    ("120", 120.0),
    (" 0 ", 0.0),
    # RFC 9110's example, ten seconds after `now`.
    ("Fri, 31 Dec 1999 23:59:59 GMT", 10.0),
    ("Fri, 31 Dec 1999 23:59:00 GMT", 0.0),
    (None, None),
    ("", None),
    ("-1", None),
    ("soon", None),
    ("1.5", None),
    ("9" * 5000, None),
    ("Fri, 99 Dec 1999 23:59:59 GMT", None),
  ],
)
def test_retry_after(value, seconds):
  now = 946684799.0 - 10
  assert fetch_rules.retry_after(value, now) == seconds


@given(st.integers(0, 2**33))
def test_retry_after_any_date(then):
  value = email.utils.formatdate(then, usegmt=True)
  assert fetch_rules.retry_after(value, 0.0) == then


# From IANA's registries of special addresses.
PRIVATE = """
0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 127.0.0.1 127.255.255.254 169.254.169.254
172.16.0.1 172.31.255.255 192.0.0.8 192.0.2.1 192.168.1.1 198.18.0.1
198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
:: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254
64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 100::1 2001:db8::1 2001::1
2002:7f00:1:: 2002:c0a8:101:: fc00::1 fd12::1 fe80::1 fe80::1%eth0 fec0::1
ff02::1 ff0e::1
""".split()
PUBLIC = """
1.1.1.1 8.8.8.8 52.216.0.1 100.63.255.255 172.15.255.255 172.32.0.1 192.167.1.1
2606:4700:4700::1111 2a00:1450::1 ::ffff:8.8.8.8 64:ff9b::808:808
2002:808:808::1
""".split()


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address):
  assert not fetch_rules.is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address):
  assert fetch_rules.is_public(address)


@given(st.ip_addresses(v=4))
def test_an_address_inside_another_is_judged_alike(address):
  expected = fetch_rules.is_public(str(address))
  for prefix in ("::ffff:0:0", "64:ff9b::"):
    inside = ipaddress.IPv6Address(
      int(ipaddress.ip_address(prefix)) + int(address)
    )
    assert fetch_rules.is_public(str(inside)) == expected


@pytest.mark.parametrize(
  "url, host",
  [
    ("https://Example.ORG/a.jpg?b#c", "example.org"),
    ("https://example.org:8443/", "example.org"),
    ("https://8.8.8.8/", "8.8.8.8"),
    ("https://[2606:4700::1]:443/", "2606:4700::1"),
    ("https://1.2.3.4.example.org/", "1.2.3.4.example.org"),
    ("HTTPS://example.org", "example.org"),
  ],
)
def test_addresses_that_may_be_asked(url, host):
  assert fetch_rules.check_url(url, allow_http=False) == host


@pytest.mark.parametrize(
  "url, kind",
  [
    ("http://example.org/", "http"),
    ("ftp://example.org/", "bad_url"),
    ("//example.org/a", "bad_url"),
    ("example.org/a.jpg", "bad_url"),
    ("https:///a.jpg", "bad_url"),
    ("https://:443/", "bad_url"),
    ("https://example.org:0/", "bad_url"),
    ("https://example.org:70000/", "bad_url"),
    ("https://example.org:a/", "bad_url"),
    ("https://a@example.org/", "bad_url"),
    ("https://:b@example.org/", "bad_url"),
    ("https://[::1/", "bad_url"),
    ("https://127.1/", "bad_url"),
    ("https://0x7f000001/", "bad_url"),
    ("https://0177.0.0.1/", "bad_url"),
    ("https://2130706433/", "bad_url"),
    ("https://127.0.0.1:8080/", "private"),
    ("https://[::1]/", "private"),
    ("https://[::ffff:10.0.0.1]/", "private"),
    ("https://169.254.169.254/", "private"),
  ],
)
def test_addresses_that_may_not(url, kind):
  with pytest.raises(Failure) as caught:
    fetch_rules.check_url(url, allow_http=False)
  assert caught.value.kind == kind


@given(st.text() | st.text().map("https://".__add__))
def test_any_text_is_a_host_or_a_failure(url):
  try:
    assert fetch_rules.check_url(url, allow_http=True)
  except Failure as failure:
    assert failure.kind in fetch_rules.KINDS


@given(st.binary(max_size=64) | st.binary().map(b"\xff\xd8\xff".__add__))
def test_any_bytes_are_a_photo_or_a_failure(data):
  with pytest.raises(Failure) as caught:
    fetch_rules.examine(data)
  assert caught.value.kind in ("empty", "not_photo", "damaged")


def test_every_kind_says_what_it_means():
  for name, kind in fetch_rules.KINDS.items():
    assert kind.meaning, name
    assert kind.again or not kind.tried, name  # Tried now, given up for ever?
  assert fetch_rules.SILENT <= fetch_rules.KINDS.keys()


# Whose turn it is.


def drain(schedule, until, step=0.125, hold=0.0):
  """Takes jobs as time passes; each takes `hold` seconds."""
  begun, running, now = [], [], 0.0
  while now <= until:
    for end in [end for end in running if end[0] <= now]:
      running.remove(end)
      schedule.done(end[1])
    while taken := schedule.take(now):
      begun.append((now, *taken))
      running.append((now + hold, taken[0]))
    now += step
  return begun


def test_a_host_is_asked_at_its_rate():
  schedule = Schedule(Limits(rate=1000.0, host_rate=2.0, host_concurrency=9))
  for n in range(5):
    schedule.add("a", n)
  begun = drain(schedule, 10)
  assert begun == [(0.5 * n, "a", n) for n in range(5)]
  assert schedule.next_time() == math.inf
  assert schedule.waiting == 0


def test_all_hosts_together_at_theirs():
  schedule = Schedule(Limits(rate=4.0, host_rate=1000.0))
  for n in range(6):
    schedule.add(f"host{n}", n)
  assert [time for time, _, _ in drain(schedule, 10)] == [
    0.25 * n for n in range(6)
  ]


def test_requests_at_once_are_bounded():
  limits = Limits(
    rate=math.inf, host_rate=math.inf, concurrency=3, host_concurrency=2
  )
  schedule = Schedule(limits)
  for host in "ab":
    for n in range(4):
      schedule.add(host, n)
  begun = drain(schedule, 10, hold=1.0)
  times = [time for time, _, _ in begun]
  assert times == [0, 0, 0, 1, 1, 1, 2, 2]
  for now in (0, 1, 2):
    hosts = [host for time, host, _ in begun if time == now]
    assert max(map(hosts.count, "ab")) <= 2


def test_what_is_to_wait_waits_and_keeps_nobody_waiting():
  schedule = Schedule(Limits(rate=math.inf, host_rate=math.inf))
  schedule.add("a", "late", ready=5.0)
  schedule.add("a", "soon")
  schedule.add("b", "other", ready=1.0)
  schedule.add("c", "held")
  schedule.hold("c", 3.0)
  assert schedule.next_time() <= 0
  assert [(t, job) for t, _, job in drain(schedule, 10, step=1.0)] == [
    (0.0, "soon"),
    (1.0, "other"),
    (3.0, "held"),
    (5.0, "late"),
  ]


def test_a_silent_host_is_noticed_after_both_time_and_tries():
  schedule = Schedule(Limits(patience=10.0, patience_tries=3))
  schedule.add("a", 1)
  assert not schedule.was_silent("a", 0.0)
  assert not schedule.was_silent("a", 20.0)  # Long, but only twice.
  assert schedule.was_silent("a", 20.0)
  schedule.answered("a")
  assert not any(schedule.was_silent("a", 30.0 + n) for n in range(10))
  assert schedule.was_silent("a", 40.0)
  assert schedule.drop("a") == [1]
  assert schedule.take(100.0) is None


@given(
  st.lists(
    st.tuples(st.sampled_from("abc"), st.floats(0, 5)), min_size=1, max_size=40
  ),
  st.integers(1, 4),
  st.integers(1, 3),
)
def test_every_job_is_taken_once_and_none_too_early(jobs, all_at_once, of_host):
  limits = Limits(
    rate=20.0,
    host_rate=8.0,
    concurrency=all_at_once,
    host_concurrency=of_host,
  )
  schedule = Schedule(limits)
  for number, (host, ready) in enumerate(jobs):
    schedule.add(host, number, ready)
  begun = drain(schedule, 60.0, hold=0.25)
  assert sorted(number for _, _, number in begun) == list(range(len(jobs)))
  for host in "abc":
    times = [time for time, other, _ in begun if other == host]
    assert all(b - a >= 1 / 8 for a, b in zip(times, times[1:], strict=False))
  for time, host, number in begun:
    assert jobs[number][0] == host
    assert time >= jobs[number][1]
  # In any second no more than the rate allows.
  for time, _, _ in begun:
    within = [t for t, _, _ in begun if time <= t < time + 1]
    assert len(within) <= 20 + 1


def test_many_jobs_of_one_host_are_quick_to_plan():
  schedule = Schedule(Limits(rate=math.inf, host_rate=math.inf))
  for n in range(20_000):
    schedule.add("a", n)
  # One entry per host, not one per job: taking stays cheap.
  assert len(schedule._due) == 1
  for n in range(20_000):
    assert schedule.take(1e9) == ("a", n)
    schedule.done("a")
  assert len(schedule._due) <= 1
