"""Where it goes: redirects, names, and never inside a network."""

import dataclasses
import socket

import pytest

aiohttp = pytest.importorskip("aiohttp")

import fault_server as faults  # noqa: E402
from fault_server import FaultServer, photo  # noqa: E402
from fetching import GOOD, LIMITS, Names, fetch_one, run  # noqa: E402

from photochat_jax.data import download  # noqa: E402


@pytest.fixture
def server():
  with FaultServer() as server:
    yield server


def test_redirects_are_followed_within_bounds(tmp_path, server):
  server.add("/end.jpg", faults.ok(photo(seed=3)))
  for n in range(5):
    target = server.url("/end.jpg") if n == 4 else f"{n + 1}.jpg?a=1#part"
    server.add(
      f"/{n}.jpg" + ("?a=1" if n else ""), faults.redirect(target, 307)
    )
  row = fetch_one(tmp_path, server, faults.redirect("/1.jpg?a=1", 301))
  assert row.status == "ok"
  assert row.url == server.url("/odd.jpg")
  # One more is too many.
  row = run(tmp_path, {"far": server.add("/far", faults.redirect("/0.jpg"))})
  assert row.rows["far"].status == "redirects"


def test_after_a_failure_behind_a_redirect_it_begins_anew(tmp_path, server):
  # The address behind it may have been for once only.
  server.add("/old.jpg", faults.status(500))
  server.add("/new.jpg", faults.ok(photo(seed=3)))
  ways = map(faults.redirect, ("/old.jpg", "/new.jpg"))
  assert fetch_one(tmp_path, server, *ways).status == "ok"
  assert server.asked["/odd.jpg"] == 2


def test_http_is_a_choice(tmp_path, server):
  wanted = {"a": server.add("/a.jpg", faults.ok(GOOD))}
  closed = dataclasses.replace(LIMITS, allow_http=False)
  result = run(tmp_path, wanted, closed)
  assert result.rows["a"].status == "http"
  assert not server.asked
  # Once allowed, it is asked for without more ado.
  assert run(tmp_path, wanted).fetched == {"a"}


@pytest.mark.parametrize(
  "url, kind",
  [
    ("", "bad_url"),
    ("https://", "bad_url"),
    ("file:///etc/passwd", "bad_url"),
    ("javascript:alert(1)", "bad_url"),
    ("https://" + "a" * 5000 + ".org/", "bad_url"),
    ("https://127.0.0.2/", "private"),
    ("https://10.1.2.3/a.jpg", "private"),
    ("https://[fe80::1%25eth0]/", "private"),
  ],
)
def test_an_address_that_is_not_asked(tmp_path, url, kind):
  assert run(tmp_path, {"a": url}).rows["a"].status == kind


def fetch_by_name(folder, server, *answers, limits=LIMITS):
  names = Names(photos_test=answers)
  server.add("/a.jpg", faults.ok(GOOD))
  url = server.url("/a.jpg", "photos.test")
  result = run(folder, {"a": url}, limits, names=names)
  return result.rows["a"].status, names


@pytest.mark.parametrize(
  "address",
  ["127.0.0.2", "10.0.0.1", "169.254.169.254", "::1", "fd00::1", "0.0.0.0"],
)
def test_a_name_of_a_private_address_is_refused(tmp_path, server, address):
  status, names = fetch_by_name(tmp_path, server, [address])
  assert status == "private"
  assert names.asked == ["photos.test"]
  assert not server.asked


def test_of_a_name_only_public_addresses_are_connected_to(tmp_path, server):
  # 127.0.0.1 stands for one that may be asked.
  status, _ = fetch_by_name(tmp_path, server, ["10.0.0.1", "127.0.0.1", "::1"])
  assert status == "ok"


def test_a_name_that_changes_its_mind(tmp_path, server):
  # The answer that was checked is the one connected to: no second question.
  status, names = fetch_by_name(
    tmp_path, server, ["127.0.0.1"], ["169.254.169.254"]
  )
  assert status == "ok"
  assert names.asked == ["photos.test"]
  status, _ = fetch_by_name(tmp_path / "b", server, ["169.254.169.254"])
  assert status == "private"


@pytest.mark.parametrize("address", ["127.0.0.2", "::1"])
def test_no_socket_is_made_to_a_private_address(
  tmp_path, server, monkeypatch, address
):
  # Even if an address came by another way than the resolver.
  async def resolve(self, host, port=0, family=0):
    return await self._inner.resolve(host, port, family)

  monkeypatch.setattr(download._PublicResolver, "resolve", resolve)
  status, _ = fetch_by_name(tmp_path, server, [address])
  assert status == "private"
  assert not server.asked


@pytest.mark.parametrize(
  "error, kind, tries",
  [
    (socket.gaierror(socket.EAI_NONAME, "not known"), "no_host", 1),
    (socket.gaierror(socket.EAI_AGAIN, "try again"), "no_connection", 3),
    (UnicodeError("label too long"), "no_host", 1),
  ],
)
def test_a_name_that_is_not_there(tmp_path, server, error, kind, tries):
  status, names = fetch_by_name(tmp_path, server, error)
  assert status == kind
  assert len(names.asked) == tries
