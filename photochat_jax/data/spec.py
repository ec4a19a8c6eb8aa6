r"""Shapes of a batch, and the templates that turns are written in.

| template | a sequence; `...` is what was said, by the user first             |
|----------|-------------------------------------------------------------------|
| llama2   | `<s> [INST] ... [/INST] ... </s>`, and again; the marks are plain |
|          | text; the first `...` opens with                                  |
|          | `<<SYS>>\n system \n<</SYS>>\n\n`                                 |
| llama3   | `<|begin_of_text|>` once, then `HEAD user TAIL ... <|eot_id|>`,   |
|          | `HEAD assistant TAIL ... <|eot_id|>`, and again; HEAD is          |
|          | `<|start_header_id|>`, TAIL `<|end_header_id|>\n\n`               |
| chatml   | `<|im_start|>user\n ... <|im_end|> \n<|im_start|>assistant\n ...` |
|          | `<|im_end|> \n`, and again                                        |
| zephyr   | `<|user|>\n ... </s> \n<|assistant|>\n ... </s> \n`, and again;   |
|          | the marks are plain text                                          |
| bare     | `<s> ... </s> ... </s>`, and again: control ids only; the first   |
|          | `...` opens with `system \n`                                      |

In llama3, chatml and zephyr the system prompt is a first turn, of `system`.
Without one there is no system block; Llama 3.1's dates and SmolLM2's own
prompt are left out. A newline after the model's turn is the next one's start.

Only what the model says and the token right after it bear loss. The control
tokens are ids; the rest is encoded as text, so that what a user types can
give neither a control id nor, its marks broken, a mark.

Sources: the `chat_template` in the `tokenizer_config.json` of Llama-2-7b-chat,
Meta-Llama-3-8B-Instruct, SmolLM2-1.7B-Instruct and TinyLlama-1.1B-Chat.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

KINDS = ("dialogues", "descriptions", "captions", "photos")
PACKED = ("dialogues", "descriptions")  # Kinds whose rows hold dialogues.

# Name -> shape and dtype.
Shapes = dict[str, tuple[tuple[int, ...], Any]]

TEMPLATES = ("llama2", "llama3", "chatml", "zephyr", "bare")
# These marks are plain text, so a turn that holds one could end itself.
_LLAMA2_MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
_ZEPHYR_MARKS = ("<|user|>", "<|assistant|>", "<|system|>")


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """Shapes and choices of a batch.

  Attributes:
    batch_size: rows of the global batch, B.
    length: tokens of a row, L.
    photos_in: photos a row may show the model, P.
    photos_out: photos a row may have the model share, Q.
    num_visual_tokens: visual slots of a photo, K; with 0 photos are read as
      captions.
    vision_size: side in pixels of a photo the model sees.
    photo_size: side in pixels of a photo the generator learns to draw.
    caption_tokens: longest caption in language-model tokens, n.
    template: one of `TEMPLATES`, see above.
    system_prompt: what the model is told first; '' omits the block.
    text_on: whose text bears a loss: 'model' (its own turns) or 'all'.
    augment: flip a photo left to right with probability 0.5.
    crop: draw a random square of a photo to draw, see `images.load_roomy`.
    moments: [h, w, 2 C] of a photo to draw, where the autoencoder's moments
      take the place of its pixels; () for pixels.
    drop_remainder: leave an epoch's last rows out where they fill no batch;
      otherwise padding rows fill it.
  """

  batch_size: int
  length: int
  photos_in: int
  photos_out: int
  num_visual_tokens: int
  vision_size: int
  photo_size: int
  caption_tokens: int = 96
  template: str = "llama2"
  system_prompt: str = ""
  text_on: str = "model"
  augment: bool = False
  crop: bool = False
  moments: tuple[int, ...] = ()
  drop_remainder: bool = True

  def __post_init__(self):
    if self.template not in TEMPLATES:
      raise ValueError(
        f"template is {self.template!r}; it must be one of "
        f"{', '.join(TEMPLATES)}."
      )
    if self.text_on not in ("model", "all"):
      raise ValueError(
        f"text_on is {self.text_on!r}; it must be 'model' or 'all'."
      )


def element_spec(spec: DataSpec, kind: str, slots: int) -> Shapes:
  """Shape without B, and dtype, of every array of a batch.

  Args:
    spec: shapes.
    kind: 'photos', 'captions', 'descriptions' or 'dialogues'.
    slots: of the text encoder, m.
  """
  length, n = spec.length, spec.caption_tokens
  packed = kind in PACKED
  q = spec.photos_out if packed else 1
  drawn = ((q, spec.photo_size, spec.photo_size, 3), np.uint8)
  if spec.moments:
    drawn = ((q, *spec.moments), np.float32)
  shapes = {
    "moments" if spec.moments else "photos_out": drawn,
    "photos_out_mask": ((q,), np.bool_),
    "example_id": ((q,), np.uint32),
  }
  if kind != "photos":
    shapes["clip_tokens"] = ((q, slots), np.int32)
  if packed:
    seen = (spec.photos_in, spec.vision_size, spec.vision_size, 3)
    shapes |= {
      "tokens": ((length,), np.int32),
      "segments": ((length,), np.int32),
      "positions": ((length,), np.int32),
      "loss_kind": ((length,), np.int8),
      "visual_index": ((length,), np.int32),
      "photos_in": (seen, np.uint8),
      "photos_in_mask": ((spec.photos_in,), np.bool_),
      "caption_index": ((q, n), np.int32),
      "caption_mask": ((q, n), np.bool_),
      "caption_tokens": ((q, n), np.int32),
      "caption_final": ((q, n), np.bool_),
      "alignment": ((q, slots, n), np.float32),
    }
  return shapes


class LeftOut(ValueError):
  """A side of a dialogue cannot be laid out; `reason` is for counting."""

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason


class Template(NamedTuple):
  """What stands around turns, as ids, but for the preamble.

  Attributes:
    opening: opens a sequence, before the first turn of the other side.
    start: before the later turns of the other side.
    middle: before what the model says.
    end: after what the model says.
    encode: the ids of a text with which a turn begins, after one of the above.
    preamble: opens the first turn of the other side, in one string with it.
    marks: strings of the template that no turn may hold.
  """

  opening: Sequence[int]
  start: Sequence[int]
  middle: Sequence[int]
  end: Sequence[int]
  encode: Callable[[str], Sequence[int]]
  preamble: str = ""
  marks: Sequence[str] = ()

  def disarm(self, text: str) -> str:
    """Breaks every mark in a text with a space."""
    for mark in self.marks:
      text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def encode_after(before: str, text: str, tokenizer: Any) -> Sequence[int]:
  """The ids of a text which is joined to another one with a space.

  The space is among them, where it is not in a word's own mark. After no
  text, '', it is a text of its own.
  """
  if before:
    first, both = map(tokenizer.encode, (before, f"{before} {text}"))
    if both[: len(first)] == first:  # Else the edges melt, as two spaces may.
      return both[len(first) :]
  return tokenizer.encode(text)


def make_template(spec: DataSpec, tokenizer: Any) -> Template:
  """The template of a spec in the language model's ids.

  Raises:
    ValueError: the tokenizer lacks one of its control tokens, or ends a turn
      with another one.
  """
  return _MAKERS[spec.template](spec.system_prompt.strip(), tokenizer)


def template_of(tokenizer: Any) -> str:
  """The name of the template that a tokenizer's control tokens are made for.

  Zephyr's marks are plain text, so it is never found out.
  """
  for name in ("llama3", "chatml"):
    try:
      _MAKERS[name]("", tokenizer)
    except ValueError:
      continue
    return name
  return "bare" if tokenizer.control_id("<s>") is None else "llama2"


def _bare(system, tokenizer):
  bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
  preamble = f"{system}\n" if system else ""
  return Template(bos, bos, eos, eos, tokenizer.encode, preamble)


def _llama2(system, tokenizer):
  start = [tokenizer.bos_id, *tokenizer.encode("[INST]", "control")]
  return Template(
    opening=start,
    start=start,
    middle=tokenizer.encode(" [/INST]", "text"),
    end=[tokenizer.eos_id],
    encode=lambda text: tokenizer.encode(f" {text}", "text"),
    preamble=f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else "",
    marks=_LLAMA2_MARKS,
  )


def _llama3(system, tokenizer):
  names = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
  opens, closes, ends = _control(tokenizer, "llama3", *names)

  def header(role):
    role = tokenizer.encode(role, "control")
    return [opens, *role, closes, *tokenizer.encode("\n\n", "control")]

  opening = [tokenizer.bos_id]
  if system:
    opening += [*header("system"), *tokenizer.encode(system, "text"), ends]
  return Template(
    opening=[*opening, *header("user")],
    start=header("user"),
    middle=[ends, *header("assistant")],
    end=[ends],
    encode=lambda text: tokenizer.encode(text, "text"),
  )


def _chatml(system, tokenizer):
  opens, ends = _control(tokenizer, "chatml", "<|im_start|>", "<|im_end|>")
  line = tokenizer.encode("\n", "control")

  def block(text):
    return [opens, *tokenizer.encode(text, "control")]

  opening = [*block(f"system\n{system}"), ends, *line] if system else []
  return Template(
    opening=[*opening, *block("user\n")],
    start=[*line, *block("user\n")],
    middle=[ends, *line, *block("assistant\n")],
    end=[ends],
    encode=lambda text: tokenizer.encode(text, "text"),
  )


def _zephyr(system, tokenizer):
  end = [tokenizer.eos_id]
  start = tokenizer.encode("\n<|user|>\n", "control")
  opening = tokenizer.encode("<|user|>\n")
  if system:
    opening = [*tokenizer.encode(f"<|system|>\n{system}"), *end, *start]
  return Template(
    opening=opening,
    start=start,
    middle=[*end, *tokenizer.encode("\n<|assistant|>\n", "control")],
    end=end,
    encode=lambda text: tokenizer.encode(text, "text"),
    marks=_ZEPHYR_MARKS,
  )


_MAKERS = {
  "llama2": _llama2,
  "llama3": _llama3,
  "chatml": _chatml,
  "zephyr": _zephyr,
  "bare": _bare,
}


def _control(tokenizer, template: str, *names: str) -> list[int]:
  """The ids of a template's control tokens, the last of which ends a turn."""
  ids = [tokenizer.control_id(name) for name in names]
  if None in ids:
    raise ValueError(
      f"The template {template!r} needs {names[ids.index(None)]!r}, which the "
      "tokenizer lacks: choose another data.template, or the tokenizer of a "
      "model that speaks it."
    )
  if ids[-1] != tokenizer.eos_id:
    raise ValueError(
      f"The template {template!r} ends a turn with {names[-1]!r} and the "
      "tokenizer with another token: give the folder of the chat model, or set "
      f"eos_token to {names[-1]!r} in its tokenizer_config.json."
    )
  return ids
