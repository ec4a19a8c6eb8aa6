"""What came: odd photos are kept, hostile ones are not decoded."""

import gzip
import io
import zlib

import numpy as np
import pytest

pytest.importorskip("aiohttp")

import fault_server as faults  # noqa: E402
from fault_server import FaultServer, photo  # noqa: E402
from fetching import GOOD, fetch_one, run  # noqa: E402
from PIL import Image

from photochat_jax.data import download, images, photo_store  # noqa: E402
from photochat_jax.data.fetch_rules import Failure  # noqa: E402


@pytest.fixture
def server():
  with FaultServer() as server:
    yield server


def png_16_bit():
  grey = (np.arange(1200).reshape(30, 40) * 54).astype(np.uint16)
  buffer = io.BytesIO()
  Image.fromarray(grey).save(buffer, "PNG")
  return buffer.getvalue()


def turned():
  exif = Image.Exif()
  exif[0x0112] = 6  # A quarter turn.
  return photo("JPEG", exif=exif)


def frames(form):
  return photo(
    form,
    save_all=True,
    append_images=[Image.new("RGB", (40, 30), c) for c in ("red", "blue")],
  )


# name -> (file, format, width, height)
ODD_PHOTOS = {
  "CMYK": (lambda: photo("JPEG", mode="CMYK"), "JPEG", 40, 30, "jpg"),
  "grey": (lambda: photo("JPEG", mode="L"), "JPEG", 40, 30, "jpg"),
  "palette": (lambda: photo("PNG", mode="P"), "PNG", 40, 30, "png"),
  "16-bit": (png_16_bit, "PNG", 40, 30, "png"),
  "EXIF": (turned, "JPEG", 30, 40, "jpg"),
  "GIF frames": (lambda: frames("GIF"), "GIF", 40, 30, "gif"),
  "WebP frames": (lambda: frames("WEBP"), "WEBP", 40, 30, "webp"),
  "JPEG with more": (lambda: frames("MPO"), "MPO", 40, 30, "jpg"),
  "BMP": (lambda: photo("BMP"), "BMP", 40, 30, "bmp"),
  "TIFF": (lambda: photo("TIFF"), "TIFF", 40, 30, "tif"),
}


@pytest.mark.parametrize("name", ODD_PHOTOS)
def test_an_odd_photo_is_kept_as_it_came(tmp_path, server, name):
  make, form, width, height, extension = ODD_PHOTOS[name]
  data = make()
  row = fetch_one(tmp_path, server, faults.ok(data, content_type="text/html"))
  assert row.status == "ok", row
  assert (row.format, row.width, row.height) == (form, width, height)
  assert row.bytes == len(data)
  (file,) = photo_store.find(tmp_path, ["odd"]).values()
  assert file.suffix == f".{extension}"
  assert file.read_bytes() == data
  assert images.decode(data).size == (width, height)


def png_header(width, height):
  def chunk(name, data):
    check = zlib.crc32(name + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + name + data + check

  size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", size + b"\x08\x02\0\0\0")
    + chunk(b"IDAT", zlib.compress(b""))
    + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize("side", [50_000, 9_000, 11_000])
def test_too_many_pixels_are_not_decoded(tmp_path, server, side):
  row = fetch_one(tmp_path, server, faults.ok(png_header(side, side)))
  assert row.status == "too_many_pixels"


WAYS = {
  "chunked": faults.chunked(GOOD),
  "no length": faults.until_closed(GOOD),
  "gzip": faults.ok(gzip.compress(GOOD), content_encoding="gzip"),
  "deflate": faults.ok(zlib.compress(GOOD), content_encoding="deflate"),
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_send_a_photo(tmp_path, server, name):
  row = fetch_one(tmp_path, server, WAYS[name])
  assert row.status == "ok", row
  (file,) = photo_store.find(tmp_path, ["odd"]).values()
  assert file.read_bytes() == GOOD


def test_a_packed_body_is_unpacked_up_to_the_limit():
  unpack = download._unpacker("gzip")
  assert len(unpack(gzip.compress(bytes(10_000_000)), 1000)) == 1000
  with pytest.raises(Failure, match="bad_answer"):
    download._unpacker("zstd")


def test_the_same_content_is_stored_once(tmp_path, server):
  wanted = {
    name: server.add(f"/{name}.jpg", faults.ok(GOOD)) for name in "abcd"
  }
  result = run(tmp_path, wanted)
  assert result.fetched == set("abcd")
  assert len({row.file for row in result.rows.values()}) == 1
  assert len(list((tmp_path / "photos" / "blobs").rglob("*.jpg"))) == 1
  assert len(photo_store.find(tmp_path, "abcd")) == 4
