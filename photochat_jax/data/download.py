"""One request to a stranger's server, on a short leash.

Nothing is followed, unpacked or connected to by itself: a redirect is handed
back, a packed body is unpacked up to the limit, and a connection is made only
to an address that `fetch_rules.is_public`, looked at where the socket is made,
so that no name, number or second answer of a name server gets around it.
Proxies of the environment are not used: they would resolve names unseen.

Imports aiohttp, of the extra `data`.
"""

import asyncio
import re
import socket
import time
import zlib
from collections.abc import Callable
from typing import NamedTuple

import aiohttp
import yarl
from aiohttp import abc, resolver

from photochat_jax.data import fetch_rules
from photochat_jax.data.fetch_rules import Failure, Limits

if [*map(int, re.findall(r"\d+", aiohttp.__version__)[:3])] < [3, 13, 4]:
  # They read as many headers and trailers as a server sends (CVE-2026-22815).
  raise ImportError(f"3.13.4 or later, not {aiohttp.__version__}")

_HEADERS = {
  "User-Agent": "photochat_jax (research; fetches a data set's photos once)",
  "Accept": "image/*,*/*;q=0.1",
  "Accept-Encoding": "identity",
}
_REDIRECTS = (301, 302, 303, 307, 308)
_STATUSES = {404: "not_found", 410: "gone"} | dict.fromkeys(
  (401, 403, 451), "forbidden"
)
_NO_SUCH_NAME = {
  getattr(socket, name)
  for name in ("EAI_NONAME", "EAI_NODATA")
  if hasattr(socket, name)
}
# Connections stay open so long for the next photo, in seconds.
_KEEP_ALIVE = 2.0


class _PrivateAddress(OSError):
  """A connection would have left the open internet."""


class Answer(NamedTuple):
  """What a server said.

  Attributes:
    data: the file.
    location: where to ask instead; '' for none.
  """

  data: bytes
  location: str = ""


class _PublicResolver(abc.AbstractResolver):
  """Resolves names to public addresses alone."""

  def __init__(self, inner: abc.AbstractResolver, allowed: frozenset[str]):
    self._inner, self._allowed = inner, allowed

  async def resolve(
    self, host: str, port: int = 0, family: int = socket.AF_UNSPEC
  ) -> list[abc.ResolveResult]:
    """Resolves a name; what is not public is left out."""
    try:
      found = await self._inner.resolve(host, port, family)
    except UnicodeError as e:  # A label of more than 63 bytes, say.
      raise socket.gaierror(socket.EAI_NONAME, str(e)) from e
    public = [a for a in found if _is_open(a["host"], self._allowed)]
    if found and not public:
      raise _PrivateAddress(f"{host} is {found[0]['host']}")
    return public

  async def close(self) -> None:
    """Closes the resolver within."""
    await self._inner.close()


def _is_open(address: str, allowed: frozenset[str]) -> bool:
  return address in allowed or fetch_rules.is_public(address)


class Downloader:
  """Asks for files; an asynchronous context manager."""

  def __init__(
    self,
    limits: Limits,
    names: abc.AbstractResolver | None = None,
    allowed: frozenset[str] = frozenset(),
    wall_clock: Callable[[], float] = time.time,
  ):
    """Prepares; connections are made in the context.

    Args:
      limits: what one request may use.
      names: resolves names; the system does without.
      allowed: IP addresses to be asked though they are not public. For tests.
      wall_clock: seconds since 1970, for dates in answers.
    """
    self._limits, self._names, self._allowed = limits, names, allowed
    self._wall_clock = wall_clock

  async def __aenter__(self) -> "Downloader":
    names = self._names or resolver.ThreadedResolver()
    limits = self._limits
    self._session = aiohttp.ClientSession(
      connector=aiohttp.TCPConnector(
        resolver=_PublicResolver(names, self._allowed),
        socket_factory=self._socket,
        keepalive_timeout=_KEEP_ALIVE,
        ttl_dns_cache=300,
        limit=0,  # `fetch_schedule` counts.
      ),
      timeout=aiohttp.ClientTimeout(
        total=None, sock_connect=limits.connect, sock_read=limits.stall
      ),
      headers=_HEADERS,
      cookie_jar=aiohttp.DummyCookieJar(),
      auto_decompress=False,
      trust_env=False,
    )
    return self

  async def __aexit__(self, *_) -> None:
    await self._session.close()

  def _socket(self, info: tuple) -> socket.socket:
    """Makes the socket of a connection, if it may be."""
    family, kind, protocol, _, address = info
    if not _is_open(address[0], self._allowed):
      raise _PrivateAddress("not on the open internet")
    return socket.socket(family, kind, protocol)

  async def ask(self, url: str) -> Answer:
    """Asks for a file.

    Args:
      url: its address; checked here.

    Returns:
      The file, unpacked, or where to ask instead. It may be anything yet.

    Raises:
      Failure: none of both.
    """
    try:
      async with asyncio.timeout(self._limits.total):
        return await self._ask(url)
    except aiohttp.ConnectionTimeoutError as e:
      raise Failure("no_connection", f"{e}") from e
    except aiohttp.ServerTimeoutError as e:
      raise Failure("stalled", f"{e}") from e
    except TimeoutError as e:
      raise Failure("timed_out", f"more than {self._limits.total:g} s") from e
    except aiohttp.ClientSSLError as e:
      raise Failure("insecure", f"{e}") from e
    except aiohttp.ClientConnectorError as e:
      raise _no_connection(e.os_error) from e
    except aiohttp.InvalidURL as e:
      raise Failure("bad_url", f"{e}") from e
    except (
      aiohttp.ClientPayloadError,
      aiohttp.ServerDisconnectedError,
      aiohttp.ClientOSError,
    ) as e:
      raise Failure("cut_short", f"{e}") from e
    except aiohttp.ClientError as e:
      raise Failure("bad_answer", f"{e}") from e

  async def _ask(self, url: str) -> Answer:
    parsed = _parse(url)
    fetch_rules.check_url(str(parsed), self._limits.allow_http, self._allowed)
    async with self._session.get(parsed, allow_redirects=False) as response:
      status = response.status
      if status in _REDIRECTS and "Location" in response.headers:
        target = _parse(response.headers["Location"])
        return Answer(b"", str(_join(parsed, target)))
      if status != 200:
        raise self._refusal(status, response.headers.get("Retry-After"))
      return Answer(await self._body(response))

  def _refusal(self, status: int, after: str | None) -> Failure:
    """What a status other than 200 means."""
    said = f"status {status}"
    wait = fetch_rules.retry_after(after, self._wall_clock())
    if kind := _STATUSES.get(status):
      return Failure(kind, said)
    if status == 429 or (status == 503 and wait is not None):
      return Failure("busy", said, wait)
    if status in (408, 425) or 500 <= status < 600:
      return Failure("server_error", said, wait)
    return Failure("refused" if 400 <= status < 500 else "bad_answer", said)

  async def _body(self, response: aiohttp.ClientResponse) -> bytes:
    """Reads a body up to the limit, as sent and as unpacked."""
    limit = self._limits.max_bytes
    if (response.content_length or 0) > limit:
      raise Failure("too_large", f"{response.content_length} bytes announced")
    unpack = _unpacker(response.headers.get("Content-Encoding", ""))
    body, sent = bytearray(), 0
    async for chunk in response.content.iter_any():
      sent += len(chunk)
      body += unpack(chunk, limit + 1 - len(body))
      if max(sent, len(body)) > limit:
        raise Failure("too_large", f"more than {limit} bytes")
    return bytes(body)


def _parse(url: str) -> yarl.URL:
  try:
    return yarl.URL(url)
  except (ValueError, TypeError) as e:
    raise Failure("bad_url", f"{url!r:.200}: {e}") from e


def _join(base: yarl.URL, target: yarl.URL) -> yarl.URL:
  try:
    return base.join(target)
  except (ValueError, TypeError) as e:
    raise Failure("bad_url", f"{str(target)!r:.200}: {e}") from e


def _no_connection(error: OSError) -> Failure:
  if isinstance(error, _PrivateAddress):
    return Failure("private", f"{error}")
  if isinstance(error, socket.gaierror) and error.errno in _NO_SUCH_NAME:
    return Failure("no_host", f"{error}")
  return Failure("no_connection", f"{error}")


def _unpacker(encoding: str) -> Callable[[bytes, int], bytes]:
  """A function of (chunk, most bytes to give) for a Content-Encoding."""
  encoding = encoding.strip().lower()
  if encoding in ("", "identity"):
    return lambda chunk, most: chunk[:most]
  if encoding not in ("gzip", "x-gzip", "deflate"):
    raise Failure("bad_answer", f"packed as {encoding!r:.40}")
  packed = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib.

  def unpack(chunk, most):
    try:
      return packed.decompress(chunk, most)
    except zlib.error as e:
      raise Failure("damaged", f"{e}") from e

  return unpack
