"""A real browser without a window, and no network."""

import json
import re
import shutil
import subprocess
import urllib.parse

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
  CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)"
)


def browse(file, folder, *flags):
  """Opens a file: its DOM, console, and the addresses that it asked for."""
  log = folder / "net.json"
  done = subprocess.run(
    [
      CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
      "--no-first-run", "--disable-background-networking", "--disable-sync",
      "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
      "--enable-logging=stderr", f"--log-net-log={log}",
      f"--user-data-dir={folder / 'profile'}", "--dump-dom", *flags,
      f"file://{file}",
    ],
    capture_output=True, text=True, check=True, timeout=120,
  )  # fmt: skip
  console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
  events = json.loads(log.read_text())["events"]
  urls = {
    event["params"]["url"]
    for event in events
    if isinstance(event.get("params"), dict) and "url" in event["params"]
  }
  # The browser asks its maker things, whatever the page.
  asked = {
    url
    for url in urls
    if not url.startswith(("data:", "file:"))
    and not (urllib.parse.urlsplit(url).hostname or "").endswith("google.com")
  }
  return done.stdout, console, asked


def screenshot(address, folder, width=1000, height=2600):
  """What a window of this size shows, uint8[height, width, 3]."""
  picture = folder / "shot.png"
  subprocess.run(
    [
      CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
      "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
      f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}",
      f"--window-size={width},{height}", address,
    ],
    capture_output=True, check=True, timeout=120,
  )  # fmt: skip
  return np.asarray(Image.open(picture).convert("RGB"))


def content_width(page, folder, width):
  """How wide a page's content is in a frame of this width."""
  measure = (
    "<script>onload = () => parent.postMessage("
    "document.documentElement.scrollWidth, '*')</script>"
  )
  open_page = re.sub('<meta http-equiv[^>]*>', measure, page)
  (folder / "page.html").write_text(open_page)
  (folder / "frame.html").write_text(
    "<script>onmessage = e => document.body.append(`width=${e.data};`)</script>"
    f'<body><iframe src="page.html" style="width:{width}px;height:800px;'
    'border:0"></iframe>'
  )
  dom, _, _ = browse(
    folder / "frame.html", folder, "--virtual-time-budget=4000"
  )
  (found,) = re.findall(r"width=(\d+);", dom)
  return int(found)
