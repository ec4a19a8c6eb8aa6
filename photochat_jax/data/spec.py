"""Shapes of a batch, and the templates that turns are written in."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

# Llama 2's marks are plain text, so a turn that holds one could end itself.
_LLAMA2_MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """Shapes and choices of a batch.

  Attributes:
    batch_size: rows of the global batch, B.
    length: tokens of a row, L.
    photos_in: photos a row may show the model, P.
    photos_out: photos a row may have the model share, Q.
    num_visual_tokens: visual slots of a photo, K.
    vision_size: side in pixels of a photo the model sees.
    photo_size: side in pixels of a photo the generator learns to draw.
    caption_tokens: longest caption in language-model tokens, n.
    template: 'llama2' or 'bare' (drawn in `data/dialogue.py`).
    system_prompt: what the model is told first; '' omits the block.
    text_on: whose text bears a loss: 'model' (its own turns) or 'all'.
    augment: flip a photo left to right with probability 0.5.
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
  drop_remainder: bool = True

  def __post_init__(self):
    if self.template not in ("llama2", "bare"):
      raise ValueError(
        f"template is {self.template!r}; it must be 'llama2' or 'bare'."
      )
    if self.text_on not in ("model", "all"):
      raise ValueError(
        f"text_on is {self.text_on!r}; it must be 'model' or 'all'."
      )


class LeftOut(ValueError):
  """A side of a dialogue cannot be laid out; `reason` is for counting."""

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason


class Template(NamedTuple):
  """What stands around turns, as ids, but for the preamble.

  Attributes:
    start: before what the other side says.
    middle: before what the model says.
    end: after what the model says.
    preamble: opens the first turn of the other side, in one string with it.
    marks: strings of the template that no turn may hold.
  """

  start: Sequence[int]
  middle: Sequence[int]
  end: Sequence[int]
  preamble: str
  marks: Sequence[str]

  def disarm(self, text: str) -> str:
    """Breaks every mark in a text with a space."""
    for mark in self.marks:
      text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def make_template(spec: DataSpec, tokenizer: Any) -> Template:
  """The template of a spec in the language model's ids."""
  bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
  system = spec.system_prompt.strip()
  if spec.template == "bare":
    return Template(bos, eos, eos, f"{system}\n" if system else "", ())
  return Template(
    start=[*bos, *tokenizer.encode("[INST]")],
    middle=tokenizer.encode("[/INST]"),
    end=eos,
    preamble=f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else "",
    marks=_LLAMA2_MARKS,
  )
