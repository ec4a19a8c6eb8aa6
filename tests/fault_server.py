"""A loopback web server that does all that servers on the web do wrong.

It speaks HTTP byte by byte, so that no library puts its faults right.
"""

import asyncio
import collections
import contextlib
import gzip
import io
import socket
import struct
import threading
from collections.abc import Awaitable, Callable

import numpy as np
from PIL import Image

Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


class FaultServer:
  """Serves answers by path, each request of a path the next; the last stays.

  Attributes:
    asked: path -> requests that came.
    held: set when a request came to a path that answers `hold`.
  """

  def __init__(self):
    self.asked: collections.Counter = collections.Counter()
    self.held = threading.Event()
    self._answers: dict[str, list[Answer]] = {}
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever)
    self._tasks: set[asyncio.Task] = set()

  def __enter__(self) -> "FaultServer":
    self._thread.start()
    start = asyncio.start_server(self._serve, "127.0.0.1", 0)
    self._server = self._call(start)
    self.port = self._server.sockets[0].getsockname()[1]
    return self

  def __exit__(self, *_) -> None:
    self._call(self._stop())
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  def add(self, path: str, *answers: Answer) -> str:
    """Gives a path its answers; returns its address."""
    self._answers[path] = list(answers)
    return self.url(path)

  def url(self, path: str, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{self.port}{path}"

  async def hold(self, writer: asyncio.StreamWriter) -> None:
    """Answers nothing until the server ends."""
    del writer
    self.held.set()
    await asyncio.Event().wait()

  def _call(self, work):
    return asyncio.run_coroutine_threadsafe(work, self._loop).result()

  async def _stop(self) -> None:
    self._server.close()
    for task in self._tasks:
      task.cancel()
    await asyncio.gather(*self._tasks, return_exceptions=True)

  async def _serve(self, reader, writer) -> None:
    task = asyncio.current_task()
    self._tasks.add(task)
    try:
      while line := await reader.read(1):
        if line == b"\x16":  # TLS, which this server does not speak.
          writer.write(status(400))
          break
        line += await reader.readline()
        path = line.split()[1].decode()
        while (await reader.readline()).strip():
          pass
        self.asked[path] += 1
        answers = self._answers.get(path, [status(404)])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, bytes):
          writer.write(answer)
          await writer.drain()
          if b"connection: close" in answer.lower():
            break
        else:
          await answer(writer)
          break
    except (OSError, asyncio.CancelledError, IndexError):
      pass  # Who asked is gone, or the server ends.
    finally:
      self._tasks.discard(task)
      writer.close()
      with contextlib.suppress(OSError, asyncio.CancelledError):
        await writer.wait_closed()


def status(code: int, body: bytes = b"", **headers: str) -> bytes:
  """An answer; a header named `content_length` replaces the true one."""
  fields = {"content_length": str(len(body))} | headers
  lines = [f"HTTP/1.1 {code} Said"]
  lines += [
    f"{name.replace('_', '-')}: {value}"
    for name, value in fields.items()
    if value is not None
  ]
  return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def ok(body: bytes, **headers: str) -> bytes:
  return status(200, body, **headers)


def redirect(location: str, code: int = 302) -> bytes:
  return status(code, location=location)


def until_closed(body: bytes) -> bytes:
  """A body without a length, which ends with the connection."""
  return ok(body, content_length=None, connection="close")


def chunked(body: bytes) -> bytes:
  head = ok(b"", content_length=None, transfer_encoding="chunked")
  return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def cut(answer: bytes) -> Answer:
  """Sends something and ends the connection."""

  async def send(writer):
    writer.write(answer)
    await writer.drain()

  return send


def reset(answer: bytes = b"") -> Answer:
  """Sends something and resets the connection."""

  async def send(writer):
    writer.write(answer)
    await writer.drain()
    linger = struct.pack("ii", 1, 0)
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()

  return send


def stall(answer: bytes = b"") -> Answer:
  """Sends something and then nothing more, with the connection open."""

  async def send(writer):
    writer.write(answer)
    await writer.drain()
    await asyncio.Event().wait()

  return send


def endless(answer: bytes, again: bytes) -> Answer:
  """Sends something, then the same for ever, as fast as it is taken."""

  async def send(writer):
    writer.write(answer)
    while True:
      writer.write(again)
      await writer.drain()

  return send


def drip(answer: bytes, again: bytes = b"a") -> Answer:
  """Sends something, then a little for ever: a slow loris."""

  async def send(writer):
    writer.write(answer)
    while True:
      writer.write(again)
      await writer.drain()
      await asyncio.sleep(0.01)

  return send


def gzip_bomb(size: int) -> bytes:
  """A body of so many zeros, packed a thousand to one."""
  return ok(gzip.compress(bytes(size)), content_encoding="gzip")


def photo(
  form: str = "JPEG",
  width: int = 40,
  height: int = 30,
  mode: str = "RGB",
  seed: int = 0,
  **options,
) -> bytes:
  """The file of a photo; another seed, another content."""
  noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
  image = Image.fromarray(noise.astype(np.uint8)).convert(mode)
  buffer = io.BytesIO()
  image.save(buffer, form, **options)
  return buffer.getvalue()
