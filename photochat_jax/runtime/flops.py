"""The FLOPs of a step, and the utilisation that follows from them (MFU).

MFU = model FLOPs of a step / (seconds of a step x chips x peak of a chip).

*Which FLOPs.* Those that the gradient of the stage's loss needs, however it is
computed: matrix products and convolutions, 1 multiply-add as 2 FLOP, the
language model's attention halved for causality. A kernel counts its forward
pass, once more where the gradient crosses it to something trained before it,
and once more where it is trained itself:

| a part is                              | times its forward pass |
|----------------------------------------|------------------------|
| trained                                | 3                      |
| frozen, but the gradient crosses it    | 2, its attention 3     |
| frozen, with nothing trained before it | 1                      |

LoRA's kernels are of the second kind and its adapters of the first. Attention
crossed by a gradient has two factors to differentiate and no parameters. What
is computed twice counts once: recomputation (`remat`, the chunks of the
cross-entropy), captions drawn in a pass of their own, logits read a second
time by the bridge. So it is MFU and not hardware utilisation. All positions of
a batch count, as in MaxText: padding tokens and places for photos that a row
does not fill are computed like the rest.

*Which peak.* Dense bfloat16, `PEAKS`, whatever the run's own dtype.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from photochat_jax.config import RunConfig, StageConfig
from photochat_jax.models.photochat import PhotoChatConfig
from photochat_jax.runtime import forward
from photochat_jax.runtime.forward import Forward


class Chip(NamedTuple):
  """An accelerator.

  Attributes:
    name: as people say it.
    tflops: peak of dense bfloat16 products, 1e12 FLOP a second.
    hbm_gb: memory, in GB as makers count it (2**30 bytes).
  """

  name: str
  tflops: float
  hbm_gb: float


_V5E, _V5P = Chip("v5e", 197, 16), Chip("v5p", 459, 95)
_V6E = Chip("v6e", 918, 32)

# JAX's `device_kind` -> its chip. The names are whole on purpose: an H100 for
# PCIe has another peak than the one with HBM3. Sources: Google's pages of each
# TPU; NVIDIA's data sheets of H100 SXM and H200 SXM, without sparsity.
PEAKS: Mapping[str, Chip] = {
  "TPU v4": Chip("v4", 275, 32),
  "TPU v5 lite": _V5E,
  "TPU v5e": _V5E,
  "TPU v5": _V5P,
  "TPU v5p": _V5P,
  "TPU v6 lite": _V6E,
  "TPU v6e": _V6E,
  "NVIDIA H100 80GB HBM3": Chip("H100", 989, 80),
  "NVIDIA H200": Chip("H200", 989, 141),
}


def count_chips(devices: Sequence[Any]) -> int:
  """Chips of some devices; a TPU v4 may show its two cores as devices."""
  return len(
    {
      (getattr(device, "slice_index", 0), *coords)
      if (coords := getattr(device, "coords", None)) is not None
      else device.id
      for device in devices
    }
  )


def mfu(
  flops: float, seconds: float, devices: Sequence[Any]
) -> float | None:
  """Model FLOPs utilisation, from 0 to 1.

  Args:
    flops: of a step, all parts of `train_flops` together.
    seconds: of a step.
    devices: all that the step runs on, of one kind.

  Returns:
    None where the peak is not in `PEAKS`, as on a CPU.
  """
  chip = PEAKS.get(devices[0].device_kind)
  if chip is None:
    return None
  return flops / seconds / (count_chips(devices) * chip.tflops * 1e12)


def forward_costs(
  config: PhotoChatConfig, length: int, scored: int | None = None
) -> dict[str, Forward]:
  """What each part costs once: a photo, a row of tokens, a caption.

  Args:
    config: the model.
    length: L, tokens of a row.
    scored: positions of a row whose logits are computed; all without.

  Returns:
    By part, with LoRA where the config has it. `vision_model`, `qformer`
    (where there is one) and `language_projection`: a photo that is seen;
    `language_model`: a row; `text_model`: a caption; `unet`, `vae_encoder`,
    `vae_decoder`: a photo that is drawn.
  """
  c, seen = config, config.vision.num_tokens
  side = c.unet.sample_size * c.vae.factor
  eyes = c.vision if c.perceiver == "linear" else c.qformer
  costs = {
    "vision_model": forward.vision(c.vision),
    "qformer": forward.qformer(c.qformer, seen),
    "language_projection": forward.projection(
      eyes.hidden_size, c.language.hidden_size, c.num_visual_tokens
    ),
    "language_model": forward.language(
      c.language, length, length if scored is None else scored
    ),
    "text_model": forward.text(c.text),
    "unet": forward.unet(c.unet, c.text.max_position_embeddings),
    "vae_encoder": forward.vae_encoder(c.vae, side),
    "vae_decoder": forward.vae_decoder(c.vae, side),
  }
  for part in c.absent:
    del costs[part]
  return {part: cost.adapt(c.lora) for part, cost in costs.items()}


def forward_flops(config: PhotoChatConfig, length: int) -> dict[str, float]:
  """`forward_costs` as one number for each part."""
  return {k: cost.total for k, cost in forward_costs(config, length).items()}


def train_flops(run: RunConfig, stage: StageConfig) -> dict[str, float]:
  """Model FLOPs of one update of a stage, over the whole batch.

  What is trained is told by kernels and tables: norms and biases alone would
  make no part count as trained.

  Args:
    run: the run.
    stage: of its stages.

  Returns:
    `{part: FLOPs}` of the parts that run, those of `forward_costs` and
    `bridge`, whose way back is a product with the vocabulary.
  """
  model, data, bridge = run.model, run.data, run.model.bridge
  terms = {term for term, weight in vars(stage.losses).items() if weight}
  speaks, draws = bool(terms & {"text", "caption"}), "photo" in terms
  talks = stage.data in ("dialogues", "descriptions")
  drawn = stage.batch_size * (data.photos_out if talks else 1)
  # Where only captions bear a loss, through the photo, only they are scored.
  positions = None if speaks else data.photos_out * bridge.max_tokens
  costs = forward_costs(model, data.length, positions)
  trains = {part: _trains(cost, stage) for part, cost in costs.items()}
  found: dict[str, float] = {}

  def add(part: str, times: int, crossed: bool) -> None:
    found[part] = times * _step(costs[part], stage, crossed)

  # From the photos that are seen through the language model.
  own = draws and talks and bridge.draw != "gold"
  scored = own and bridge.estimator == "rloo"
  crosses = draws and talks and not scored and bridge.matrix != "none"
  reached = speaks or crosses or scored
  moving = False
  if reached or own:
    seen = stage.batch_size * data.photos_in
    for part in ("vision_model", "qformer", "language_projection"):
      if part in costs:
        moving |= trains[part]
        add(part, seen, moving and reached)
    moving |= trains["language_model"]
    add("language_model", stage.batch_size, moving and reached)
  # Through the bridge, the text encoder and the UNet.
  encoder = trains["vae_encoder"]
  if draws:
    moving &= crosses
    if moving:
      tables = {"aligned": 2, "static": 1}.get(bridge.matrix, 0)
      found["bridge"] = drawn * 2.0 * bridge.max_tokens * (
        model.language.padded_vocab_size * tables * model.text.hidden_size
      )
    moving |= trains["text_model"]
    captions = drawn * (bridge.num_samples if own else 1)
    add("text_model", captions, moving)
    add("unet", captions, moving or trains["unet"] or encoder)
  # The autoencoder.
  if "autoencoder" in terms or (draws and not data.moments):
    add("vae_encoder", drawn, encoder)
  if "autoencoder" in terms:
    add("vae_decoder", drawn, encoder or trains["vae_decoder"])
  return found


def _is_trained(path: str, stage: StageConfig) -> bool:
  return any(re.fullmatch(regex, path) for regex in stage.trainable)


def _trains(cost: Forward, stage: StageConfig) -> bool:
  return any(_is_trained(path, stage) for path in cost.kernels)


def _step(cost: Forward, stage: StageConfig, crossed: bool) -> float:
  """FLOPs of a part's forward and backward pass."""
  if not crossed:
    return cost.total
  kernels = sum(
    flops * (3 if _is_trained(path, stage) else 2)
    for path, flops in cost.kernels.items()
  )
  return kernels + 3 * cost.products
