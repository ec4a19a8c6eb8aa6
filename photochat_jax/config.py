"""Every setting of a run, once, with one comment each.

The frozen dataclasses below are the whole list of settings and their defaults;
the sections of `model` and `bridge` are the models' own dataclasses, commented
where they are defined. A file of `configs/` changes the `ConfigDict` made by
`default()`, the command line may change it again
(`--config.optim.learning_rate=1e-4`, `--config.stages.joint.steps=300`), and
`build` checks the result and turns it into one `RunConfig`. Nothing but this
module and the files of `configs/` sees a ConfigDict.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import ml_collections

from photochat_jax import config_check
from photochat_jax.config_check import ConfigError
from photochat_jax.diffusion.schedule import ScheduleConfig
from photochat_jax.models.bridge import BridgeConfig
from photochat_jax.models.clip_text import CLIPTextConfig
from photochat_jax.models.llama import LlamaConfig
from photochat_jax.models.photochat import PhotoChatConfig
from photochat_jax.models.qformer import QFormerConfig
from photochat_jax.models.unet import UNetConfig
from photochat_jax.models.vae import VAEConfig
from photochat_jax.models.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is read and how a dialogue becomes a row of tokens."""

  source: str = "synthetic"  # Generated, or a name of data/sources.py.
  path: str = ""  # The data set's folder, with photos/; its reader says more.
  # More to train on: (source, path, weight), ...; the main source has weight 1.
  mix: tuple = ()
  caption_source: str = "given"  # Or "labels", "description", "written".
  train_share: float = 1.0  # Of the main set's dialogues, the first ones.
  max_broken: float = 0.05  # Largest share of records that may be unusable.
  num_train: int = 2000  # Synthetic dialogues to train on.
  num_dev: int = 100  # Synthetic dialogues of the dev split.
  num_test: int = 100  # Synthetic dialogues of the test split.
  told_share: float = 0.25  # Share of synthetic captions naming every detail.
  llm_tokenizer: str = ""  # A tokenizer.json of the language model; "" shipped.
  clip_tokenizer: str = ""  # A tokenizer.json of the text encoder; "" shipped.
  image_size: int = 32  # Side in pixels of a synthetic photo.
  length: int = 256  # Tokens of a packed row, L.
  photos_in: int = 2  # Photos a row can see at most, P.
  photos_out: int = 2  # Photos a row can draw at most, Q.
  flip: bool = True  # Mirror half of the photos which are learnt.
  crop: bool = False  # Cut random squares out of the photos to draw.
  moments: str = ""  # Folder of tools/precompute.py; "" encodes every photo.
  template: str = "llama2"  # Or llama3, chatml, zephyr, bare: data/spec.py.
  system_prompt: str = "You chat and share photos."  # "" leaves it out.


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
  """Where trained weights come from; a part without any starts at random."""

  run: str = ""  # A workdir, such as tools/convert_hf.py makes.
  llm: str = ""  # A Llama: a Hugging Face folder, or a hub id.
  blip2: str = ""  # A BLIP-2, for the eyes: likewise.
  diffusion: str = ""  # A Stable Diffusion 1.x or 2.x: likewise.
  captioner: str = ""  # A workdir, to caption what is shown in chat.


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """How the terms are weighed, in every stage that uses them."""

  text: float = 1.0  # Cross-entropy of a text token.
  caption: float = 1.0  # Cross-entropy of a token from [img] to [/img].
  photo: float = 1.0  # The generator's squared error.
  autoencoder: float = 1.0  # The autoencoder's squared error.
  kl: float = 1e-6  # KL of the autoencoder's latents to a unit Gaussian.
  text_on: str = "model"  # Train text of the "model"'s own turns or of "all".
  min_snr_gamma: float = 5.0  # Hang et al. 2023, eq. 3; 0 for uniform weights.
  chunk: int = 0  # Positions of a row whose logits exist at a time; 0 for all.
  caption_dropout: float = 0.1  # Share of photos drawn from an empty caption.


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW and its schedule."""

  learning_rate: float = 1e-3  # Peak, where a stage does not set its own.
  schedule: str = "cosine"  # "cosine", "linear" or "constant" after warm-up.
  warmup_steps: int = 50  # Updates of linear warm-up at a stage's start.
  final_scale: float = 0.1  # Learning rate at a stage's end, share of the peak.
  b1: float = 0.9  # Decay of the first moment.
  b2: float = 0.99  # Decay of the second moment.
  eps: float = 1e-8  # Added to the root of the second moment.
  grad_clip: float = 1.0  # Largest global norm of a gradient; 0 for no limit.
  weight_decay: float = 0.01  # Decoupled, times the learning rate.
  lr_multipliers: tuple = ((".*", 1.0),)  # (path regex, factor); first wins.
  # (path regex, is weight decay applied); first wins.
  decay: tuple = ((".*/(bias|scale|lora_scale)", False), (".*", True))


@dataclasses.dataclass(frozen=True)
class EmaConfig:
  """Moving averages of parameters, used wherever photos are drawn."""

  decay: float = 0.999  # Share of the old average kept at an update; 0 is off.
  parts: tuple[str, ...] = ("unet",)  # Parts of the model averaged.


@dataclasses.dataclass(frozen=True)
class StageLosses:
  """The terms of a stage, times their weights in `loss`; 0 leaves one out.

  Each may be a schedule over the stage's steps, `((0, 0.0), (100, 1.0))`:
  straight lines between the points.
  """

  text: float = 0.0  # Text tokens; needs dialogues or descriptions.
  caption: float = 0.0  # Caption tokens; needs data="dialogues".
  photo: float = 0.0  # The generator; needs captions or dialogues.
  autoencoder: float = 0.0  # The autoencoder, its kl term included.


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """One leg of training; parameters pass on, the optimiser starts anew."""

  name: str = ""  # Its key in `stages`; filled in by `build`.
  steps: int = 100  # Updates; 0 leaves the stage out.
  data: str = "dialogues"  # "photos", "captions", "descriptions", "dialogues".
  batch_size: int = 8  # Rows (or photos) of the global batch.
  accumulate: int = 1  # Parts a batch is cut into, one after the other.
  trainable: tuple[str, ...] = (".*",)  # Path regexes; the rest is frozen.
  learning_rate: float = 0.0  # Peak of this stage; 0 takes optim's.
  losses: StageLosses = StageLosses()  # Which terms count.


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How devices are laid out; one of the three may be -1 for the rest."""

  data: int = -1  # Ways the batch is divided, parameters repeated.
  fsdp: int = 1  # Ways the batch and the parameters are divided.
  tensor: int = 1  # Ways heads, hidden widths and vocabulary are divided.


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When state is written."""

  every_steps: int = 500  # Updates between two checkpoints.
  keep: int = 2  # Newest checkpoints kept.
  keep_best: int = 0  # Best ones of the last stage, kept beside them.
  best_metric: str = "dev/loss"  # Which are best: those where it is lowest.


@dataclasses.dataclass(frozen=True)
class HealthConfig:
  """What is done about bad updates and about processes that are stuck.

  An update whose loss or gradient is not finite is always skipped: the
  parameters stay as they are, and the next batch is taken.
  """

  spike_factor: float = 20.0  # Skip gradients so many times the usual; 0 off.
  spike_warmup: int = 50  # Updates of a stage before spikes are looked for.
  max_skipped: int = 10  # Skipped in a row, after which the run goes back.
  lookback: int = 10  # Updates before those that are then left out as well.
  max_rollbacks: int = 3  # Times it goes back before it gives up.
  stuck_after: float = 1800.0  # Seconds without a step that end a run; 0 off.


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """When progress is written."""

  every_steps: int = 20  # Updates between two rows of metrics.
  sample_every: int = 500  # Updates between two sheets of drawn photos; 0 none.
  num_samples: int = 4  # Photos on a sheet.
  dev_every: int = 0  # Updates between two losses of the dev split; 0 none.
  dev_batches: int = 8  # Batches of the dev split they are the mean of.
  profile_steps: tuple = (10, 15)  # What --profile traces, from the start.


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """What is measured, and how text and photos are decoded, in chat too."""

  split: str = "test"  # "dev" or "test".
  max_dialogues: int = 100  # The split's first dialogues; 0 for all of them.
  batch_size: int = 16  # Rows decoded, or photos drawn, at a time.
  speakers: str = "model"  # Whose turns it says: the "model"'s, or "both".
  max_new_tokens: int = 64  # Longest turn written.
  method: str = "greedy"  # How words are chosen: or "beam", or "nucleus".
  num_beams: int = 5  # Of "beam": texts followed at a time.
  length_penalty: float = 1.0  # Of "beam": above 0 favours long texts.
  top_p: float = 0.9  # Of "nucleus": probability of what may be sampled.
  temperature: float = 1.0  # Of "nucleus": logits are divided by it.
  sampler: str = "ddim"  # How photos are drawn: of diffusion.samplers.SAMPLERS.
  sampler_steps: int = 20  # Denoising steps of a photo.
  guidance: float = 3.0  # Classifier-free guidance scale; 1 is none.
  clip: str = ""  # Folder of a CLIPModel, which scores photos; "" for none.
  inception: str = ""  # Folder of FID's Inception, model.safetensors.


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """A whole run; `default()` is these values as a ConfigDict."""

  seed: int = 0  # Everything random follows from it and the step.
  compilation_cache: str = ""  # Compiled programs; "" for ~/.cache, or "off".
  # Of parameters that no stage to come trains; "bfloat16" halves their memory.
  frozen_dtype: str = "float32"
  data: DataConfig = DataConfig()
  model: PhotoChatConfig = PhotoChatConfig(  # The toy; real sizes by name.
    vision=ViTConfig.tiny(),
    qformer=QFormerConfig.tiny(),
    language=LlamaConfig.tiny(),
    text=CLIPTextConfig.tiny(),
    unet=UNetConfig.tiny(),
    vae=VAEConfig.tiny(),
    schedule=ScheduleConfig(),
    bridge=BridgeConfig(),
  )
  pretrained: PretrainedConfig = PretrainedConfig()
  loss: LossConfig = LossConfig()
  optim: OptimConfig = OptimConfig()
  ema: EmaConfig = EmaConfig()
  stages: tuple[StageConfig, ...] = (  # In order; in a ConfigDict by name.
    StageConfig(
      name="autoencoder",
      data="photos",
      trainable=("vae/.*",),
      losses=StageLosses(autoencoder=1.0),
    ),
    StageConfig(
      name="generator",
      data="captions",
      trainable=("unet/.*", "text_model/.*"),
      losses=StageLosses(photo=1.0),
    ),
    StageConfig(
      name="joint",
      trainable=(
        "(vision_model|qformer|language_projection)/.*",
        "(language_model|unet)/.*",
      ),
      losses=StageLosses(text=1.0, caption=1.0, photo=1.0),
    ),
  )
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  health: HealthConfig = HealthConfig()
  log: LogConfig = LogConfig()
  eval: EvalConfig = EvalConfig()

  @property
  def bridge(self) -> BridgeConfig:
    """The settings of the bridge."""
    return self.model.bridge

  def with_data(self, **changes) -> "RunConfig":
    """Returns a copy with fields of `data` changed."""
    data = dataclasses.replace(self.data, **changes)
    return dataclasses.replace(self, data=data)

  def as_dict(self) -> dict[str, Any]:
    """Returns nested plain dicts laid out as the ConfigDict is."""
    result = dataclasses.asdict(self)
    result["bridge"] = result["model"].pop("bridge")
    stages = {stage.pop("name"): stage for stage in result.pop("stages")}
    return {**result, "stages": stages, "stage_order": tuple(stages)}


def section(part: Any) -> ml_collections.ConfigDict:
  """Returns one dataclass as a ConfigDict section, for config files.

  `config.model.vision = section(ViTConfig.eva_g())` chooses a named size,
  `config.stages.warmup = section(StageConfig(steps=100))` adds a stage.
  """
  fields = dataclasses.asdict(part)
  fields.pop("name", None)  # A stage's is its key in `stages`.
  return _loosen(ml_collections.ConfigDict(fields))


def _loosen(section: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Lets a number that may be a schedule become one, which is a tuple."""
  for name, value in section.items():
    if isinstance(value, ml_collections.ConfigDict):
      _loosen(value)
      if name == "losses":
        for term, weight in value.items():
          value[term] = ml_collections.FieldReference(weight, object)
    elif name == "tau":
      section[name] = ml_collections.FieldReference(value, object)
  return section


def default() -> ml_collections.ConfigDict:
  """Returns every setting at its default."""
  return _loosen(ml_collections.ConfigDict(RunConfig().as_dict()))


def check_path(path: str) -> None:
  """Raises a ConfigError if no setting has the dotted path 'optim.eps'."""
  where, node = "config", RunConfig().as_dict()
  for name in path.split("."):
    if where == "config.stages" and name not in node:
      node = {**node, name: node["joint"]}  # Stages have any names.
    _known(name, list(node) if isinstance(node, dict) else [], where)
    where, node = f"{where}.{name}", node[name]


def build(config: ml_collections.ConfigDict | Mapping[str, Any]) -> RunConfig:
  """Checks a ConfigDict and turns it into a `RunConfig`.

  Raises:
    ConfigError: one sentence, for an unknown field (with the nearest name), a
      value of another type, or values which do not fit together.
  """
  is_dict = isinstance(config, ml_collections.ConfigDict)
  fields = config.to_dict() if is_dict else dict(config)
  names = [field.name for field in dataclasses.fields(RunConfig)]
  for name in fields:
    _known(name, [*names, "bridge", "stage_order"], "config")
  stages = fields.pop("stages", {})
  order = fields.pop("stage_order", None)
  bridge = fields.pop("bridge", {})
  run = _fill(RunConfig(), fields, "config")
  bridge = _fill(run.bridge, bridge, "config.bridge")
  named, built = {stage.name: stage for stage in run.stages}, []
  for name in stages if order is None else order:
    _known(name, list(stages), "config.stages")
    start = named.get(name, StageConfig(name=name))
    built.append(_fill(start, stages[name], f"config.stages.{name}"))
  run = dataclasses.replace(
    run,
    model=dataclasses.replace(run.model, bridge=bridge),
    stages=tuple(built) if stages else run.stages,
  )
  config_check.validate(run)
  stages = (
    dataclasses.replace(
      stage,
      trainable=tuple(r for r in stage.trainable if not run.model.is_moot(r)),
    )
    for stage in run.stages
  )
  return dataclasses.replace(run, stages=tuple(stages))


def _known(name: str, names: list[str], where: str) -> None:
  """Raises a ConfigError with the nearest name for one that is not there."""
  if name not in names:
    near = difflib.get_close_matches(name, names, 1, 0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {names}."
    raise ConfigError(f"{where} has no field {name!r}; {hint}")


def _fill(start: Any, fields: Mapping[str, Any], where: str) -> Any:
  """Returns the dataclass `start` with `fields` put in and checked."""
  if not isinstance(fields, Mapping):
    raise ConfigError(f"{where} is a section of fields, not {fields!r}.")
  changes, names = {}, [field.name for field in dataclasses.fields(start)]
  for name, value in fields.items():
    _known(name, names, where)
    old, path = getattr(start, name), f"{where}.{name}"
    if dataclasses.is_dataclass(old):
      changes[name] = _fill(old, value, path)
    else:
      changes[name] = _convert(old, value, path)
  try:
    return dataclasses.replace(start, **changes)
  except ValueError as error:  # A model's own check of its numbers.
    raise ConfigError(f"{where}: {error}") from error


def _convert(old: Any, value: Any, path: str) -> Any:
  """Returns a value in the type of the one it replaces, or raises."""
  if isinstance(value, list | tuple):
    value = tuple(_convert(None, item, path) for item in value)
  if isinstance(old, float) and type(value) is int:
    value = float(value)
  # Blocks of a UNet may share a number; some numbers may be schedules.
  numbers = {type(old), type(value)} == {int, tuple}
  if ".losses." in path or path.endswith(".tau"):
    numbers = type(value) in (float, tuple)
  if old is None or value is None or numbers or type(value) is type(old):
    return value
  raise ConfigError(
    f"{path} must be of type {type(old).__name__}, as {old!r}, not {value!r}."
  )
