"""A model's LoRA adapters as files, both ways.

* Of the language model: peft's folder, see `lora_peft`.
* Of the UNet: diffusers' file, or kohya's, see `lora_diffusers`.

Which module is which parameter of ours is read off the tables of
`checkpoints.llama` and `checkpoints.unet`. An adapter that was read can be
trained on, with `models.lora.config_of(params)` for `model.lora`, or be merged
into the kernels for good, by `models.lora.merge(params)`. A merged model is
exported as any other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from photochat_jax.checkpoints import lora_diffusers, lora_peft
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.models.photochat import PhotoChatConfig
from photochat_jax.ops import partition


def read(
  config: PhotoChatConfig,
  params: Mapping[str, Any],
  llm: epath.PathLike = "",
  diffusion: epath.PathLike = "",
  fresh: Sequence[int] = (),
  skip_text: bool = False,
  dtype: Any = None,
) -> dict[str, Any]:
  """Puts adapters into a model's parameters.

  Args:
    config: of the model.
    params: of the model; LoRA that a part already has gives way to the
      adapter read for it.
    llm: peft's folder of the language model's adapter; "" for none.
    diffusion: diffusers' or kohya's file of the UNet's; "" for none.
    fresh: ids of `[img]` and `[/img]`, if the language model's adapter was
      trained without them.
    skip_text: leave out what `diffusion` has for a text encoder, which is an
      error otherwise.
    dtype: of A and B; None keeps the files'.

  Returns:
    The parameters and the adapters', which are numpy arrays.

  Raises:
    WeightsError: an adapter cannot be used.
  """
  params = dict(params)
  if llm:
    params["language_model"] = lora_peft.read(
      config.language, params["language_model"], llm, fresh, dtype
    )
  if diffusion:
    params["unet"] = lora_diffusers.read(
      config.unet, params["unet"], diffusion, skip_text, dtype
    )
  return params


def write(
  config: PhotoChatConfig,
  params: Mapping[str, Any],
  folder: epath.PathLike,
  modules_to_save: Sequence[str] = (),
  vocab_size: int | None = None,
) -> None:
  """Writes all LoRA of a model: `llm` for peft, `diffusion` for diffusers.

  Args:
    config: of the model.
    params: of the model.
    folder: gets a folder for each part with LoRA.
    modules_to_save: tables of the language model, see `lora_peft.write`.
    vocab_size: rows of these tables, see there.

  Raises:
    WeightsError: there is no LoRA, or the folder already holds weights.
  """
  folder = epath.Path(folder)
  paths = [p for p in partition.flatten(params) if p.endswith("/lora_a")]
  parts = {path.split("/")[0] for path in paths}
  if not parts:
    raise WeightsError(
      "The model has no LoRA to write; it comes with model.lora.rank."
    )
  if "language_model" in parts:
    lora_peft.write(
      config.language,
      params["language_model"],
      folder / "llm",
      modules_to_save,
      vocab_size,
    )
  if "unet" in parts:
    lora_diffusers.write(config.unet, params["unet"], folder / "diffusion")
