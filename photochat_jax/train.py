"""Training: stages, checkpoints, and what keeps a long run alive.

A run is a list of stages (`config.stages`). `step` counts updates over all of
them and is, with the seed, the whole position of the run: data are keyed by
(seed, stage, step in stage). At a boundary the optimiser starts anew, the
averaged weights become the weights and averaging starts anew from them, and
after the autoencoder's stage the scale of its latents is measured. What is
saved at a boundary is the next stage's beginning, so a resumed run restores
exactly what the uninterrupted one went on with.
"""

from typing import Any

import jax
from etils import epath

from photochat_jax import feed, initial, inputs, sharding
from photochat_jax.checkpoints.manager import Checkpoints
from photochat_jax.config import ConfigError, RunConfig
from photochat_jax.initial import Leg
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.progress import Progress, parameter_table
from photochat_jax.runtime import xla_flags
from photochat_jax.runtime.health import Health
from photochat_jax.runtime.interrupt import StopRequest
from photochat_jax.runtime.meters import Meters
from photochat_jax.runtime.profiling import Profiler
from photochat_jax.runtime.watchdog import Watchdog
from photochat_jax.state import TrainState
from photochat_jax.trainer import Trainer


def plan_stages(
  run: RunConfig, has_photos: bool
) -> tuple[list[Leg], list[str]]:
  """Lays the stages out, leaving out those without data.

  Args:
    run: the run.
    has_photos: whether any photo of the train split has a file.

  Returns:
    The legs in order, and one line for each stage that is skipped.
  """
  legs, skipped, start = [], [], 0
  for index, stage in enumerate(run.stages):
    if stage.data != "dialogues" and not has_photos:
      skipped.append(
        f"Stage {stage.name} is skipped: there are no photo files."
      )
    elif stage.steps:
      legs.append(Leg(index, stage, start, start + stage.steps))
      start += stage.steps
  return legs, skipped


def train(
  run: RunConfig,
  workdir: epath.PathLike,
  profile: bool = False,
  started: float | None = None,
) -> TrainState:
  """Trains all stages, going on from the newest checkpoint if there is one.

  Args:
    run: the run's settings.
    workdir: its folder.
    profile: trace the steps `log.profile_steps` of this start.
    started: `time.time()` at the program's start; now by default.

  Returns:
    The last state.

  Raises:
    ValueError: the settings, the data or a checkpoint do not fit, or the run
      does not recover from bad updates.
    Interrupted: it was asked to stop (`runtime.interrupt`); the state is
      saved.
  """
  llm_tokenizer, clip_tokenizer = inputs.load_tokenizers(run)
  _check_vocabularies(run, llm_tokenizer, clip_tokenizer)
  data = feed.Feed(run, workdir, llm_tokenizer, clip_tokenizer)
  legs, skipped = plan_stages(run, bool(data.photos))
  if not legs:
    raise ConfigError("No stage has both steps and data: nothing to train.")
  mesh = sharding.make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
  keep = run.checkpoint
  with (
    Checkpoints(
      workdir,
      keep.keep,
      run.as_dict()["model"],
      keep.keep_best,
      keep.best_metric,
    ) as checkpoints,
    jax.set_mesh(mesh),
    StopRequest() as stop,
    Watchdog(workdir, run.health.stuck_after) as watchdog,
  ):
    model = PhotoChat(run.model)
    health = Health(run.health, workdir)
    meters = Meters(run, mesh, started)

    def leg_at(step: int) -> Leg:
      return next((leg for leg in legs if step < leg.end), legs[-1])

    def abstract(step: int) -> TrainState:
      return initial.abstract_state(run, model, mesh, leg_at(step))

    found = checkpoints.restore_newest(abstract, cast=True)
    if found is None:
      step, damaged = 0, []
      state = initial.init_state(run, model, mesh, legs[0], llm_tokenizer)
    else:
      state, step, damaged = found
      meta = checkpoints.read_meta(step)
      # A checkpoint that was converted and not trained has neither.
      health.restore(meta.get("health", health.state()))
      meters.restore(meta.get("meters"))
    data.open_moments(state.params)
    traced = run.log.profile_steps if profile else None
    with (
      Progress(workdir, legs[-1].end, step) as progress,
      Profiler(workdir, traced, progress.message) as profiler,
    ):
      for line in (*damaged, *_flags(), *data.coverage(), *skipped):
        progress.message(line)
      if found is None:
        progress.message(parameter_table(state.params))
      else:
        progress.message(f"Going on from step {step}.")
      trainer = Trainer(
        run=run,
        model=model,
        mesh=mesh,
        feed=data,
        llm_tokenizer=llm_tokenizer,
        clip_tokenizer=clip_tokenizer,
        workdir=epath.Path(workdir),
        checkpoints=checkpoints,
        progress=progress,
        health=health,
        stop=stop,
        watchdog=watchdog,
        meters=meters,
        profiler=profiler,
      )
      legs = [leg for leg in legs if step < leg.end]
      # All before the first stage, so that what is wrong is told at once.
      batches = [trainer.batches(leg.stage) for leg in legs]
      for number, leg in enumerate(legs):
        following = legs[number + 1] if number + 1 < len(legs) else None
        state = trainer.run_stage(leg, batches[number], following, state)
  return state


def _flags() -> list[str]:
  """What XLA is told, on devices for which there is something to tell."""
  device = jax.devices()[0]
  if device.platform == "cpu":
    return []
  return xla_flags.describe(device.device_kind)


def _check_vocabularies(run: RunConfig, llm: Any, clip: Any) -> None:
  """The models' sizes are the tokenizers', or everything after is wrong."""
  for name, size, tokenizer in (
    ("language", run.model.language.vocab_size, llm),
    ("text", run.model.text.vocab_size, clip),
  ):
    if size != tokenizer.vocab_size:
      raise ConfigError(
        f"config.model.{name}.vocab_size is {size} and its tokenizer has "
        f"{tokenizer.vocab_size} ids; set it to that."
      )
