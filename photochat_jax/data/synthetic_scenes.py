"""The little world of the synthetic set: draw a scene, read one back.

A scene is a room with one object standing where the wall meets the ground. Each
attribute belongs to a kind of detail:

  captioned  every caption names it (shape, ground, position, size)
  told       the talk names it, captions only now and then (colour)
  unsaid     only the photo shows it (wall)
"""

import functools
import itertools

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

ATTRIBUTES: dict[str, tuple[str, ...]] = {
  "shape": ("ball", "box", "cone", "star"),
  "ground": ("grass", "sand", "snow", "water"),
  "position": ("left", "middle", "right"),
  "size": ("big", "small"),
  "colour": ("red", "blue", "green", "yellow", "purple", "black"),
  "wall": ("cream", "pink", "mint", "grey", "lilac"),
}
KIND: dict[str, str] = {
  "shape": "captioned",
  "ground": "captioned",
  "position": "captioned",
  "size": "captioned",
  "colour": "told",
  "wall": "unsaid",
}
WHERE = {
  "left": "on the left",
  "middle": "in the middle",
  "right": "on the right",
}

# RGB, 0..255. Values of one attribute are at least 70 apart.
_RGB = {
  "cream": (255, 240, 195), "pink": (255, 165, 180), "mint": (165, 235, 175),
  "grey": (150, 150, 150), "lilac": (190, 160, 250),
  "grass": (125, 190, 70), "sand": (225, 185, 115), "snow": (248, 250, 255),
  "water": (60, 150, 215),
  "red": (220, 30, 35), "blue": (25, 45, 200), "green": (15, 140, 50),
  "yellow": (250, 220, 20), "purple": (145, 35, 170), "black": (25, 25, 25),
}  # fmt: skip
_OUTLINE = (35, 35, 40)
# Lengths are shares of the side: on 32 pixels a radius is 8 or 6.
_HORIZON = 0.62
_CENTRE = {"left": 0.25, "middle": 0.5, "right": 0.75}
_RADIUS = {"big": 0.25, "small": 0.1875}
_FOOT = {"big": 0.76, "small": 0.72}
_OVERSAMPLE = 4
_JITTER = 1 / 32  # of the object's place, in each direction
_BRIGHTNESS = 0.04  # gain of the whole photo, each way
# What `measure` compares with: drawings of this side, sharp and blurred, as
# photos drawn by a model are often soft.
_MEASURED_SIDE = 32
_BLURS = (0.0, 1.2)


def _outline(shape: str, x: float, y: float, radius: float) -> list:
  """Corners of a shape around (x, y); a ball is a polygon of 40 corners."""
  if shape == "ball":
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    reach = np.full_like(turn, radius)
  elif shape == "star":
    turn = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2 == 0, 1.25, 0.55) * radius
  elif shape == "box":
    turn = np.pi / 4 + np.arange(4) * np.pi / 2
    reach = np.full_like(turn, 0.95 * np.sqrt(2) * radius)
  else:  # A cone: as wide as it is high.
    return [(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)]
  return list(
    zip(x + reach * np.sin(turn), y - reach * np.cos(turn), strict=True)
  )


def _paint(scene, size, offset, palette, mode):
  """Draws at `_OVERSAMPLE` times the size and averages down."""
  side = size * _OVERSAMPLE
  image = Image.new(mode, (side, side), palette["wall"])
  pen = ImageDraw.Draw(image)
  pen.rectangle((0, round(_HORIZON * side), side, side), palette["ground"])
  radius = _RADIUS[scene["size"]]
  x = _CENTRE[scene["position"]] + offset[0]
  y = _FOOT[scene["size"]] - radius + offset[1]
  pen.polygon(
    [(u * side, v * side) for u, v in _outline(scene["shape"], x, y, radius)],
    palette["object"],
    palette["outline"],
    width=max(1, side // 32),
  )
  return image.reduce(_OVERSAMPLE)


def draw(
  scene: dict[str, str], size: int = 32, rng: np.random.Generator | None = None
) -> np.ndarray:
  """Draws a scene.

  Args:
    scene: one value for each of `ATTRIBUTES`.
    size: side of the photo in pixels.
    rng: source of the small jitter of place and brightness; none without it.

  Returns:
    uint8 [size, size, 3].
  """
  offset, gain = (0.0, 0.0), 1.0
  if rng is not None:
    offset = rng.uniform(-_JITTER, _JITTER, 2)
    gain = 1 + rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)
  palette = {
    "wall": _RGB[scene["wall"]],
    "ground": _RGB[scene["ground"]],
    "object": _RGB[scene["colour"]],
    "outline": _OUTLINE,
  }
  photo = np.asarray(_paint(scene, size, offset, palette, "RGB"), np.float32)
  return np.clip(np.rint(photo * gain), 0, 255).astype(np.uint8)


@functools.cache
def _layouts():
  """Where wall, ground, object and outline lie in every possible layout.

  A photo is linear in its four colours, so 432 layouts (shape, position, size,
  nine places around it, two blurs) times 120 colourings need 432 sets of masks.

  Returns:
    names: a list of (shape, position, size), one per layout.
    masks: float32 [layouts, 4, pixels], shares of each pixel.
    grams: float32 [layouts, 4, 4], inner products of the masks.
  """
  names, masks = [], []
  parts = ("wall", "ground", "object", "outline")
  steps = (-_JITTER, 0.0, _JITTER)
  for shape, position, size, dx, dy in itertools.product(
    ATTRIBUTES["shape"],
    ATTRIBUTES["position"],
    ATTRIBUTES["size"],
    steps,
    steps,
  ):
    scene = {"shape": shape, "position": position, "size": size}
    drawn = [
      _paint(
        scene,
        _MEASURED_SIDE,
        (dx, dy),
        {p: 255 * (p == part) for p in parts},
        "L",
      )
      for part in parts
    ]
    for blur in _BLURS:
      names.append((shape, position, size))
      masks.append(
        [
          np.asarray(mask.filter(ImageFilter.GaussianBlur(blur)), np.float32)
          for mask in drawn
        ]
      )
  masks = np.asarray(masks).reshape(len(names), len(parts), -1) / 255
  return names, masks, np.einsum("lap,lbp->lab", masks, masks)


@functools.cache
def _colourings():
  """All (wall, ground, colour) and their RGB, float32 [120, 4, 3] in 0..1."""
  names = list(
    itertools.product(
      ATTRIBUTES["wall"], ATTRIBUTES["ground"], ATTRIBUTES["colour"]
    )
  )
  rgb = [[*(_RGB[value] for value in name), _OUTLINE] for name in names]
  return names, np.asarray(rgb, np.float32) / 255


def measure(image: np.ndarray) -> dict[str, str]:
  """Reads a scene's attributes from its photo.

  The answer is the scene whose drawing is nearest in squared error, among all
  scenes, nine places of the object and two blurs.

  Args:
    image: uint8 [H, W, 3], of any size.

  Returns:
    attribute -> value, for each of `ATTRIBUTES`.
  """
  side = _MEASURED_SIDE
  if image.shape[:2] != (side, side):
    image = np.asarray(
      Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
    )
  layouts, masks, grams = _layouts()
  colourings, rgb = _colourings()
  pixels = np.ascontiguousarray(image.reshape(-1, 3).T, np.float32) / 255
  # Sums over the last axis by einsum: as fast as BLAS at this size, and without
  # its threads, which a busy machine makes wait for one another.
  inner = np.einsum("lp,cp->lc", masks.reshape(-1, side * side), pixels)
  # |photo - drawing|^2 less |photo|^2, for [layouts, colourings].
  linear = np.einsum("la,ca->lc", inner.reshape(-1, 12), rgb.reshape(-1, 12))
  products = np.einsum("cai,cbi->cab", rgb, rgb).reshape(-1, 16)
  square = np.einsum("la,ca->lc", grams.reshape(-1, 16), products)
  error = square - 2 * linear
  layout, colouring = np.unravel_index(np.argmin(error), error.shape)
  found = dict(zip(("shape", "position", "size"), layouts[layout], strict=True))
  found.update(
    zip(("wall", "ground", "colour"), colourings[colouring], strict=True)
  )
  return {name: found[name] for name in ATTRIBUTES}
