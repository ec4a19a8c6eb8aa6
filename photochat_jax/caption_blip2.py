"""Captions by transformers' BLIP-2, where torch is installed.

torch and transformers are imported when a captioner is made and not before.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from photochat_jax.captioners import (
  CaptionError,
  Written,
  model_name,
)
from photochat_jax.checkpoints import files
from photochat_jax.data import schema
from photochat_jax.decoding_options import Options

LONGEST = 30
"""Tokens of a caption unless the options say otherwise, as in LAVIS."""

# Of a hub's folder; not its pickles, which would be as large again.
_NEEDED = ("*.json", "*.txt", "*.model", "*.safetensors")


class Blip2Captioner:
  """A `captioners.Captioner`: BLIP-2 without a prompt, as it was trained.

  Works on a GPU in bfloat16, without one in float32.
  """

  def __init__(self, name: str, options: Options, batch_size: int):
    """Opens a checkpoint.

    Args:
      name: a folder, or a hub id such as `Salesforce/blip2-opt-2.7b`.
      options: how to decode.
      batch_size: photos at a time.

    Raises:
      CaptionError: torch is not installed, or this is no BLIP-2 that captions.
      WeightsError: the folder or its weights cannot be used.
    """
    try:
      import torch
    except ImportError as error:
      raise CaptionError(
        "Captions by BLIP-2 need torch, which is not installed: run pip "
        "install 'photochat_jax[caption]', or take --backend=own."
      ) from error
    import transformers

    folder = files.find_folder(name, _NEEDED)
    weights = files.Tensors(folder)  # Whole, and no pickles.
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    try:
      self._processor = transformers.Blip2Processor.from_pretrained(folder)
      net = transformers.Blip2ForConditionalGeneration.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, dtype=dtype
      )
    # What transformers raises over files that are missing or of another model.
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise CaptionError(
        f"{folder} is no BLIP-2 that captions ({files.reason(error)}); give a "
        "whole checkpoint, such as Salesforce/blip2-opt-2.7b."
      ) from error
    if net.config.image_token_index is None:
      raise CaptionError(
        f"{folder}/config.json has no image_token_index; fetch the folder "
        "again, the published ones have it."
      )
    self._net = net.to("cuda" if on_gpu else "cpu").eval()
    self._torch, self._transformers = torch, transformers
    self._options = options
    self._longest = options.max_tokens or LONGEST
    # `generate` repeats the queries and `<s>`, or opens with the decoder's own
    # first token.
    is_t5 = net.language_model.config.is_encoder_decoder
    self._before = 1 if is_t5 else net.config.num_query_tokens + 1
    self.batch_size = batch_size
    whole = hashlib.sha256()
    for file in sorted(weights.files):
      whole.update(files.sha256(folder / file).encode())
    self.model = model_name(
      epath.Path(name).name, whole.hexdigest(), options, self._longest
    )

  def prepare(self, image: Image.Image) -> Any:
    """A float tensor [3, H, W], by the checkpoint's own image processor."""
    found = self._processor(images=image, return_tensors="pt")
    return found["pixel_values"][0]

  def write(self, ids: Sequence[str], photos: Sequence[Any]) -> list[Written]:
    """The captions of prepared photos with these ids."""
    options, net = self._options, self._net
    more = {}
    if options.beams > 1:
      more["length_penalty"] = options.length_penalty
    if options.method == "nucleus":
      more["logits_processor"] = self._transformers.LogitsProcessorList(
        [self._sampling(ids)]
      )
    pixels = self._torch.stack(list(photos)).to(net.device, net.dtype)
    with self._torch.inference_mode():
      out = net.generate(
        pixel_values=pixels,
        max_new_tokens=self._longest,
        do_sample=False,
        num_beams=options.beams,
        **more,
      )
    out = out[:, self._before :].cpu()
    texts = self._processor.batch_decode(out, skip_special_tokens=True)
    ends = net.language_model.generation_config.eos_token_id
    cut = ~np.isin(out.numpy(), ends).any(axis=1)
    return [Written(*row) for row in zip(texts, cut.tolist(), strict=True)]

  def _sampling(self, ids: Sequence[str]) -> Any:
    """Turns the likeliest token into a sample, by noise keyed by the photo.

    transformers samples a batch from one stream: a caption would depend on
    the photos before it.
    """
    options = self._options
    nucleus = self._transformers.TopPLogitsWarper(options.top_p)
    streams = [
      np.random.default_rng([options.seed, schema.number(i)]) for i in ids
    ]

    def change(input_ids, scores):
      noise = np.stack([s.gumbel(size=scores.shape[1]) for s in streams])
      kept = nucleus(input_ids, scores / options.temperature)
      return kept + self._torch.from_numpy(noise).to(kept)

    return change
