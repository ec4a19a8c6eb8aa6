"""Servers that do all that servers do wrong: each survived, and named."""

import dataclasses
import gzip

import pytest

pytest.importorskip("aiohttp")

import fault_server as faults  # noqa: E402
from fault_server import FaultServer, photo  # noqa: E402
from fetching import GOOD, LIMITS, fetch_one, run  # noqa: E402

from photochat_jax.data import fetch_rules  # noqa: E402


@pytest.fixture
def server():
  with FaultServer() as server:
    yield server


HTML = b"<!DOCTYPE html><html><body>Not found</body></html>"
ANNOUNCED = {"content_length": "99999999999"}
NO_LENGTH = {"content_length": None}
WHOLE_HEAD = b"HTTP/1.1 200 OK\r\n"

# name -> (answer, kind, requests made for it). Where a connection ends without
# an answer, aiohttp asks once more by itself: it may have been an old one.
LASTING = {
  "404": (faults.status(404, HTML), "not_found", 1),
  "410": (faults.status(410), "gone", 1),
  "401": (faults.status(401), "forbidden", 1),
  "403": (faults.status(403), "forbidden", 1),
  "451": (faults.status(451), "forbidden", 1),
  "418": (faults.status(418), "refused", 1),
  "204": (faults.status(204, content_length=None), "bad_answer", 1),
  "304": (faults.status(304, content_length=None), "bad_answer", 1),
  "206": (faults.status(206, GOOD), "bad_answer", 1),
  "429": (faults.status(429), "busy", 3),
  "429 for an hour": (faults.status(429, retry_after="3600"), "busy", 1),
  "503 for an hour": (faults.status(503, retry_after="3600"), "busy", 1),
  "500": (faults.status(500), "server_error", 3),
  "503": (faults.status(503), "server_error", 3),
  "599": (faults.status(599), "server_error", 3),
  "HTML as .jpg": (
    faults.ok(HTML, content_type="image/jpeg"),
    "not_photo",
    1,
  ),
  "SVG": (
    faults.ok(b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    "not_photo",
    1,
  ),
  "EPS": (faults.ok(b"%!PS-Adobe-3.0 EPSF-3.0\n" * 9), "not_photo", 1),
  "zero bytes": (faults.ok(b""), "empty", 1),
  "zero bytes, chunked": (
    faults.ok(b"0\r\n\r\n", **NO_LENGTH, transfer_encoding="chunked"),
    "empty",
    1,
  ),
  "truncated JPEG": (faults.ok(GOOD[:-200]), "damaged", 1),
  "truncated PNG": (faults.ok(photo("PNG")[:-200]), "damaged", 1),
  "JPEG's first bytes": (faults.ok(GOOD[:20]), "not_photo", 1),
  "too much announced": (faults.ok(GOOD, **ANNOUNCED), "too_large", 1),
  "too much, not announced": (
    faults.until_closed(GOOD + bytes(100_000)),
    "too_large",
    1,
  ),
  "too much, chunked": (
    faults.chunked(GOOD + bytes(100_000)),
    "too_large",
    1,
  ),
  "never-ending": (
    faults.endless(faults.ok(GOOD, **NO_LENGTH), bytes(65536)),
    "too_large",
    1,
  ),
  "never-ending chunks": (
    faults.endless(
      faults.ok(b"", **NO_LENGTH, transfer_encoding="chunked"),
      b"%x\r\n%b\r\n" % (4096, bytes(4096)),
    ),
    "too_large",
    1,
  ),
  "gzip bomb": (faults.gzip_bomb(50_000_000), "too_large", 1),
  "broken gzip": (
    faults.ok(b"\x1f\x8b" + bytes(30), content_encoding="gzip"),
    "damaged",
    1,
  ),
  "half a gzip": (
    faults.ok(gzip.compress(GOOD)[:-100], content_encoding="gzip"),
    "damaged",
    1,
  ),
  "Brotli": (faults.ok(GOOD, content_encoding="br"), "bad_answer", 1),
  "gzip twice": (
    faults.ok(GOOD, content_encoding="gzip, gzip"),
    "bad_answer",
    1,
  ),
  "length too long": (
    faults.cut(faults.ok(GOOD, content_length=str(len(GOOD) + 1))),
    "cut_short",
    3,
  ),
  "length too short": (
    faults.cut(faults.ok(GOOD, content_length=str(len(GOOD) - 300))),
    ("damaged", "bad_answer"),  # As the packets fall.
    None,
  ),
  "length no number": (
    faults.cut(faults.ok(GOOD, content_length="many")),
    "bad_answer",
    1,
  ),
  "reset at once": (faults.reset(), "cut_short", 6),
  "reset in the body": (
    faults.reset(faults.ok(GOOD, **ANNOUNCED)[:300]),
    ("cut_short", "too_large"),
    None,
  ),
  "closed at once": (faults.cut(b""), "cut_short", 6),
  "closed in the head": (faults.cut(WHOLE_HEAD), "cut_short", 6),
  "closed in a chunk": (
    faults.cut(faults.chunked(GOOD)[:-50]),
    "cut_short",
    3,
  ),
  "no HTTP": (faults.cut(b"220 mail.org ESMTP\r\n\r\n"), "bad_answer", 1),
  "a status of words": (
    faults.cut(b"HTTP/1.1 good OK\r\n\r\n"),
    "bad_answer",
    1,
  ),
  "an enormous header": (
    faults.cut(WHOLE_HEAD + b"a: " + b"a" * 100_000 + b"\r\n\r\n"),
    "bad_answer",
    1,
  ),
  "never-ending head": (
    faults.endless(WHOLE_HEAD, b"a: b\r\n" * 999),
    "bad_answer",
    1,
  ),
  "never-ending trailers": (
    faults.endless(faults.chunked(GOOD)[:-2], b"a: b\r\n" * 999),
    ("bad_answer", "cut_short"),
    None,
  ),
  "a broken chunk": (
    faults.cut(
      faults.ok(b"zz\r\nzz", **NO_LENGTH, transfer_encoding="chunked")
    ),
    ("bad_answer", "cut_short"),
    None,
  ),
  "redirect to nowhere": (faults.status(302), "bad_answer", 1),
  "redirect in a circle": (faults.redirect("/odd.jpg"), "redirects", 6),
  "redirect to a file": (
    faults.redirect("file:///etc/passwd"),
    "bad_url",
    1,
  ),
  "redirect to FTP": (faults.redirect("ftp://a.org/a.jpg"), "bad_url", 1),
  "redirect to data": (faults.redirect("data:image/png,a"), "bad_url", 1),
  "redirect to a password": (
    faults.redirect("https://me:secret@example.org/"),
    "bad_url",
    1,
  ),
  "redirect to a bad port": (
    faults.redirect("https://example.org:99999/"),
    "bad_url",
    1,
  ),
  "redirect to nonsense": (faults.redirect("https://["), "bad_url", 1),
  "redirect to another loopback address": (
    faults.redirect("http://127.0.0.2/"),
    "private",
    1,
  ),
  "redirect to loopback of IPv6": (
    faults.redirect("http://[::1]/"),
    "private",
    1,
  ),
  "redirect to mapped loopback": (
    faults.redirect("http://[::ffff:127.0.0.2]/"),
    "private",
    1,
  ),
  "redirect to a private network": (
    faults.redirect("https://10.0.0.1/", 308),
    "private",
    1,
  ),
  "redirect to a cloud's credentials": (
    faults.redirect("http://169.254.169.254/latest/meta-data/"),
    "private",
    1,
  ),
  "redirect to a number": (
    faults.redirect("http://2130706434/"),
    "bad_url",
    1,
  ),
  "redirect to half an address": (
    faults.redirect("http://127.2/"),
    "bad_url",
    1,
  ),
  "redirect, protocol-relative": (
    faults.redirect("//192.168.0.1/a.jpg"),
    "private",
    1,
  ),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_fault_is_survived_and_named(tmp_path, server, name):
  answer, kind, requests = LASTING[name]
  row = fetch_one(tmp_path, server, answer)
  assert row.status in ((kind,) if isinstance(kind, str) else kind), row
  assert row.status in fetch_rules.KINDS
  assert row.detail
  assert not row.file
  if requests:
    assert server.asked["/odd.jpg"] == requests


# Only time ends these: each ends so, however slow the machine is.
HASTY = dataclasses.replace(LIMITS, tries=1, stall=0.3, total=30.0)
HASTY_FAULTS = {
  "no answer": (faults.stall(), "stalled"),
  "half a head": (faults.stall(WHOLE_HEAD + b"a: b"), "stalled"),
  "half a body": (faults.stall(faults.ok(GOOD)[:-100]), "stalled"),
}


@pytest.mark.parametrize("name", HASTY_FAULTS)
def test_a_stall_is_left(tmp_path, server, name):
  answer, kind = HASTY_FAULTS[name]
  url = server.add("/a.jpg", answer)
  result = run(tmp_path, {"a": url}, HASTY)
  assert result.rows["a"].status == kind


@pytest.mark.parametrize(
  "head", [WHOLE_HEAD + b"a: ", faults.ok(b"", **NO_LENGTH)]
)
def test_a_slow_loris_is_left(tmp_path, server, head):
  url = server.add("/a.jpg", faults.drip(head))
  limits = dataclasses.replace(LIMITS, tries=1, total=0.3)
  result = run(tmp_path, {"a": url}, limits)
  assert result.rows["a"].status == "timed_out"


def test_a_port_that_nobody_listens_on(tmp_path):
  with FaultServer() as gone:
    url = gone.url("/a.jpg")
  result = run(tmp_path, {"a": url})
  assert result.rows["a"].status == "no_connection"


def test_a_server_without_a_certificate(tmp_path, server):
  url = server.add("/a.jpg", faults.ok(GOOD)).replace("http:", "https:")
  result = run(tmp_path, {"a": url}, dataclasses.replace(LIMITS, total=10.0))
  assert result.rows["a"].status == "insecure"
