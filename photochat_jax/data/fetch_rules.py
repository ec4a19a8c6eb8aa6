"""What the fetcher may do, what may go wrong, and what then: no network here.

Addresses, redirects and files come from strangers. `Limits` bounds what one of
them can cost, `check_url` and `is_public` say where a request may go,
`examine` says whether an answer is a photo, `KINDS` what each failure means.
"""

import dataclasses
import email.utils
import io
import ipaddress
import random
import socket
from typing import NamedTuple
from urllib import parse

from PIL import Image

from photochat_jax.data import images

_URL_CHARACTERS = 4096
# Where an IPv6 address holds an IPv4 one (RFC 6052).
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# IANA's special addresses which not every Python knows as such.
_SPECIAL = (
  ipaddress.ip_network("192.0.0.0/24"),
  ipaddress.ip_network("64:ff9b:1::/48"),
)
# Pillow's name of a format -> suffix. MPO is JPEG with more photos behind it.
EXTENSIONS = {
  "JPEG": "jpg",
  "MPO": "jpg",
  "PNG": "png",
  "GIF": "gif",
  "WEBP": "webp",
  "BMP": "bmp",
  "TIFF": "tif",
}
_FORMATS = tuple(kind for kind in EXTENSIONS if kind != "MPO")


class Kind(NamedTuple):
  """A way to fail.

  Attributes:
    tried: whether the same run tries again, with growing pauses.
    again: whether the next run asks again; those that it does not ask for are
      asked for with `--retry`.
    meaning: for the report.
  """

  tried: bool
  again: bool
  meaning: str


KINDS = {
  # For good.
  "not_found": Kind(False, False, "the server has no such file (404)"),
  "gone": Kind(False, False, "the server has it no longer (410)"),
  "forbidden": Kind(False, False, "the server gives it to no one (401, 403)"),
  "refused": Kind(False, False, "the server refuses to answer (other 4xx)"),
  "bad_url": Kind(False, False, "it, or its redirect, is no usable address"),
  "redirects": Kind(False, False, "it is redirected too often, or in a circle"),
  "too_large": Kind(False, False, "more bytes than --max_megabytes"),
  "too_many_pixels": Kind(False, False, "more pixels than are ever decoded"),
  "empty": Kind(False, False, "the file has no bytes"),
  "not_photo": Kind(False, False, "it is no photo: a web page, say"),
  "damaged": Kind(False, False, "a photo cut short or broken at its source"),
  # For now.
  "http": Kind(False, True, "an http:// address: add --allow_http"),
  "private": Kind(False, True, "its host is inside a private network"),
  "no_host": Kind(False, True, "its host's name is not known"),
  "insecure": Kind(False, True, "its host has no valid certificate"),
  "no_connection": Kind(True, True, "its host cannot be reached"),
  "busy": Kind(True, True, "its host asks to come back later (429, 503)"),
  "server_error": Kind(True, True, "its host has a fault (5xx, 408)"),
  "stalled": Kind(True, True, "nothing came for too long"),
  "timed_out": Kind(True, True, "it took too long in all"),
  "cut_short": Kind(True, True, "the connection ended before the file did"),
  "bad_answer": Kind(False, True, "what came is not proper HTTP"),
  "given_up": Kind(False, True, "its host answered nothing for long"),
  "not_asked": Kind(False, True, "the run ended first"),
}

# Those in which a host said nothing, so that there may be none, or no network.
SILENT = {
  "no_host",
  "no_connection",
  "insecure",
  "stalled",
  "timed_out",
  "cut_short",
}


class Failure(Exception):
  """A photo did not come.

  Attributes:
    kind: a key of `KINDS`.
    detail: what happened.
    wait: seconds the server asks to wait, if it does.
  """

  def __init__(self, kind: str, detail: str, wait: float | None = None):
    super().__init__(f"{kind}: {detail}")
    self.kind, self.detail, self.wait = kind, detail, wait


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the fetcher may use. Times are in seconds, rates in 1/s.

  Attributes:
    concurrency: requests under way at once; memory is at most as many files of
      `max_bytes`.
    host_concurrency: of one host.
    rate: requests begun.
    host_rate: of one host.
    tries: requests for one photo, not counted redirects, and what aiohttp
      repeats at once, and once, when a connection ends without an answer.
    backoff: longest pause before the second try; it doubles with each.
    longest_wait: cap of the pauses. A host that asks for longer is given up.
    patience: a host that has answered nothing for as long, and
      `patience_tries` times, is given up.
    patience_tries: see there.
    redirects: followed for one photo.
    max_bytes: of one file, as sent and as unpacked.
    max_pixels: of one photo, by its header.
    connect: time for one connection to be made.
    stall: time with nothing read.
    total: time of one request.
    allow_http: follow http:// addresses too, which anyone on the way can read
      and change.
  """

  concurrency: int = 64
  host_concurrency: int = 4
  rate: float = 100.0
  host_rate: float = 10.0
  tries: int = 5
  backoff: float = 1.0
  longest_wait: float = 60.0
  patience: float = 120.0
  patience_tries: int = 10
  redirects: int = 5
  max_bytes: int = 20 * 2**20
  max_pixels: int = images.MAX_PIXELS
  connect: float = 10.0
  stall: float = 20.0
  total: float = 120.0
  allow_http: bool = False


def pause(tried: int, limits: Limits, rng: random.Random) -> float:
  """Seconds before the next try: exponential, with full jitter.

  Args:
    tried: tries so far, at least 1.
    limits: the first pause and the longest.
    rng: source of the jitter.
  """
  doubled = limits.backoff * 2.0 ** min(tried - 1, 64)
  return rng.uniform(0, min(doubled, limits.longest_wait))


def retry_after(value: str | None, now: float) -> float | None:
  """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3).

  Args:
    value: a number of seconds or a date; None where there is no header.
    now: seconds since 1970.

  Returns:
    At least 0; None where nothing sensible is asked for.
  """
  try:
    if value.strip().isdecimal():
      return float(int(value))
    date = email.utils.parsedate_to_datetime(value)
    return max(0.0, date.timestamp() - now)
  except (AttributeError, ValueError, OverflowError, TypeError):
    return None


def is_public(address: str) -> bool:
  """Whether an IP address is on the open internet.

  Loopback, private, link-local (clouds keep credentials there), shared,
  multicast and reserved ones are not, nor what embeds one of them.

  Raises:
    ValueError: it is no IP address.
  """
  ip = ipaddress.ip_address(address)
  if ip.version == 6:
    inner = ip.ipv4_mapped or ip.sixtofour
    if ip in _NAT64:
      inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if inner:
      return is_public(str(inner))
    if ip.teredo or ip.is_site_local:
      return False
  if any(ip in network for network in _SPECIAL):
    return False
  return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def check_url(
  url: str, allow_http: bool, allowed: frozenset[str] = frozenset()
) -> str:
  """Checks an address before anything is sent there.

  Names are checked when they are resolved, by `download`.

  Args:
    url: the address.
    allow_http: whether http:// will do.
    allowed: IP addresses which may be asked though they are not public.

  Returns:
    Its host, in small letters.

  Raises:
    Failure: it is not to be asked.
  """
  try:
    parts = parse.urlsplit(url)
    host, port = parts.hostname, parts.port
  except ValueError as e:
    raise Failure("bad_url", f"{url!r:.200}: {e}") from None
  if parts.scheme not in ("http", "https"):
    raise Failure("bad_url", f"{parts.scheme or url!r:.60} is not https")
  if not host or port == 0 or len(url) > _URL_CHARACTERS:
    raise Failure("bad_url", f"{url!r:.200} has no host, or is too long")
  if parts.username is not None or parts.password is not None:
    raise Failure("bad_url", "it holds a name or a password")
  if parts.scheme == "http" and not allow_http:
    raise Failure("http", f"{url:.200}")
  try:
    address = str(ipaddress.ip_address(host))
  except ValueError:
    if _is_disguised(host):
      raise Failure("bad_url", f"{host!r:.60} hides an IP address") from None
    return host
  if address not in allowed and not is_public(address):
    raise Failure("private", address)
  return host


def _is_disguised(host: str) -> bool:
  """Whether C libraries would read a name as a number: 127.1, 0x7f000001."""
  try:
    socket.inet_aton(host)
  except (OSError, ValueError):
    return False
  return True


class Photo(NamedTuple):
  """What a file is.

  Attributes:
    format: Pillow's name.
    width: pixels, upright.
    height: pixels, upright.
  """

  format: str
  width: int
  height: int


def examine(data: bytes, max_pixels: int = images.MAX_PIXELS) -> Photo:
  """Decodes a file, whatever its name says, after a look at its header.

  Raises:
    Failure: it is no photo, broken or too large.
  """
  if not data:
    raise Failure("empty", "it has no bytes")
  try:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
      kind, (width, height) = image.format, image.size
  except Image.UnidentifiedImageError:
    raise Failure("not_photo", f"it begins with {data[:16]!r}") from None
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
    raise Failure("too_many_pixels", f"{e}") from None
  except Exception as e:  # Broken headers raise all kinds of errors.
    raise Failure("damaged", f"a broken header: {e}") from e
  if width * height > min(max_pixels, images.MAX_PIXELS):
    raise Failure("too_many_pixels", f"{width} x {height}")
  try:
    image = images.decode(data, "It")
  except images.ImageError as e:
    raise Failure("damaged", str(e)) from e
  return Photo(kind, *image.size)
