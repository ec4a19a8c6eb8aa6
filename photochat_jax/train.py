"""The training loop: stages, checkpoints, samples; short, and pure inside.

A run is a list of stages (`config.stages`). `step` counts updates over all of
them and is, with the seed, the whole position of the run: data are keyed by
(seed, stage, step in stage). At a boundary the optimiser starts anew, the
averaged weights become the weights and averaging starts anew from them, and
after the autoencoder's stage the scale of its latents is measured. What is
saved at a boundary is the next stage's beginning, so a resumed run restores
exactly what the uninterrupted one went on with.
"""

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from photochat_jax import (
  feed,
  initial,
  inputs,
  optim,
  samples,
  sharding,
  train_step,
)
from photochat_jax.checkpoints.manager import Checkpoints
from photochat_jax.config import ConfigError, RunConfig, StageConfig
from photochat_jax.data import pipeline, vocabulary
from photochat_jax.initial import Leg
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.progress import Progress, parameter_table
from photochat_jax.state import TrainState

# Photos that the scale of the latents is measured on, at most.
MEASURED_PHOTOS = 512


class Interrupted(SystemExit):
  """The run was asked to stop; its state is saved. Exit code 130."""


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


def train(run: RunConfig, workdir: epath.PathLike) -> TrainState:
  """Trains all stages, going on from the newest checkpoint if there is one.

  Args:
    run: the run's settings.
    workdir: its folder.

  Returns:
    The last state.

  Raises:
    ValueError: the settings, the data or a checkpoint do not fit.
    Interrupted: Ctrl-C or SIGTERM came; the state is saved.
  """
  llm_tokenizer, clip_tokenizer = inputs.load_tokenizers(run)
  _check_vocabularies(run, llm_tokenizer, clip_tokenizer)
  data = feed.Feed(run, workdir, llm_tokenizer, clip_tokenizer)
  legs, skipped = plan_stages(run, bool(data.photos))
  if not legs:
    raise ConfigError("No stage has both steps and data: nothing to train.")
  trainer = _Trainer(
    run=run,
    model=PhotoChat(run.model),
    mesh=sharding.make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor),
    feed=data,
    llm_tokenizer=llm_tokenizer,
    clip_tokenizer=clip_tokenizer,
    workdir=epath.Path(workdir),
  )
  model_settings = run.as_dict()["model"]
  with (
    Checkpoints(workdir, run.checkpoint.keep, model_settings) as checkpoints,
    jax.set_mesh(trainer.mesh),
  ):
    step = checkpoints.latest()
    leg = next((leg for leg in legs if (step or 0) < leg.end), legs[-1])
    where = (run, trainer.model, trainer.mesh, leg)
    if step is None:
      state = initial.init_state(*where, llm_tokenizer)
    else:
      state = checkpoints.restore(initial.abstract_state(*where), step)
    data.open_moments(state.params)
    with Progress(workdir, legs[-1].end, step or 0) as progress:
      for line in (*data.coverage(), *skipped):
        progress.message(line)
      if step is not None:
        progress.message(f"Going on from step {step}.")
      else:
        progress.message(parameter_table(state.params))
      legs = [leg for leg in legs if int(state.step) < leg.end]
      # All before the first stage, so that what is wrong is told at once.
      batches = [trainer.batches(leg.stage, progress) for leg in legs]
      for number, leg in enumerate(legs):
        following = legs[number + 1] if number + 1 < len(legs) else None
        state = trainer.run_stage(
          leg, batches[number], following, state, checkpoints, progress
        )
  return state


@dataclasses.dataclass
class _Trainer:
  """What all stages share."""

  run: RunConfig
  model: PhotoChat
  mesh: Any
  feed: feed.Feed
  llm_tokenizer: Any
  clip_tokenizer: Any
  workdir: epath.Path

  @functools.cached_property
  def vocabulary_map(self) -> Any:
    table, coverage = vocabulary.build_vocabulary_map(
      self.llm_tokenizer, self.clip_tokenizer
    )
    logging.info("%s", coverage)
    return table

  def batches(
    self, stage: StageConfig, progress: Progress
  ) -> pipeline.Pipeline:
    """A stage's data, and tells what they are."""
    data = self.feed.batches(stage.data, stage.batch_size, stage.name)
    for line in self.feed.describe(stage.name, data):
      progress.message(line)
    return data

  def run_stage(
    self,
    leg: Leg,
    data: pipeline.Pipeline,
    following: Leg | None,
    state: TrainState,
    checkpoints: Checkpoints,
    progress: Progress,
  ) -> TrainState:
    """Trains a stage from wherever the state is in it to its end."""
    run, stage = self.run, leg.stage
    step_fn = self.compile_step(leg, state)
    step, pending = int(state.step), None
    with _stop_asked() as asked:
      for batch in data.batches(step - leg.start, leg.end - step):
        state, metrics = step_fn(state, sharding.shard_batch(batch, self.mesh))
        step += 1
        if step % run.log.every_steps == 0 or step == leg.end:
          # One report late, so that the device need not be waited for.
          _report(progress, pending, stage.name)
          pending = (step, metrics)
        if step == leg.end:
          break
        if run.log.sample_every and step % run.log.sample_every == 0:
          self.sample(stage, state, progress)
        if asked or step % run.checkpoint.every_steps == 0:
          checkpoints.save(step, state, {"stage": stage.name})
        if asked:
          checkpoints.wait()
          progress.message(
            f"Stopped at step {step}, which is saved in {self.workdir}; the "
            "same command goes on from there."
          )
          raise Interrupted(130)
      _report(progress, pending, stage.name)
      if stage.losses.autoencoder:
        state = state.replace(latent_scale=self.measure_scale(state))
      self.sample(stage, state, progress)
      if following:
        state = initial.begin_stage(run, following, state)
        state = sharding.shard_state(state, self.mesh)
      checkpoints.save(step, state, {"stage": stage.name})
    if broken := self.feed.take_broken(data):
      progress.message(f"Stage {stage.name}: {broken}")
    # A stage's programs are of no use to the next one, and take memory.
    jax.clear_caches()
    return state

  def compile_step(self, leg: Leg, state: TrainState):
    """The stage's update, jitted with the state donated."""
    run = self.run
    trainable, _ = optim.split(state.params, leg.stage.trainable)
    draws = (
      leg.stage.data == "dialogues"
      and leg.stage.losses.photo
      and run.bridge.draw != "gold"
    )
    retokenise = vocabulary.Retokeniser(
      self.llm_tokenizer, self.clip_tokenizer, run.bridge.max_tokens
    )
    in_program = draws and run.bridge.retokenise == "callback"
    where = sharding.state_shardings(state, self.mesh)
    step_fn = jax.jit(
      train_step.make_train_step(
        self.model,
        run,
        leg.index,
        leg.start,
        optim.make_optimizer(run.optim, leg.stage, trainable),
        self.clip_tokenizer.encode_padded(""),
        self.vocabulary_map,
        retokenise if in_program else None,
        self.mesh,
      ),
      out_shardings=(where, None),
      donate_argnums=0,
    )
    if not draws or in_program:
      return step_fn
    draw_fn = jax.jit(
      train_step.make_draw_step(self.model, run, leg.index, leg.start),
      out_shardings=sharding.batch_sharding(self.mesh),
    )

    def two_passes(state, batch):
      return step_fn(state, self.retokenised(retokenise, draw_fn, state, batch))

    return two_passes

  def retokenised(self, retokenise, draw_fn, state, batch):
    """A batch whose captions are those that the model draws."""
    y = _local(draw_fn(state, batch))
    mask = _local(batch["caption_mask"])
    rows, photos, n = mask.shape
    z, alignment, final = retokenise(y, mask.reshape(-1, n))
    local = {
      "caption_tokens": y.reshape(rows, photos, n),
      "clip_tokens": z.reshape(rows, photos, -1),
      "alignment": alignment.reshape(rows, photos, -1, n),
      "caption_final": final.reshape(rows, photos, n),
    }
    return {**batch, **sharding.shard_batch(local, self.mesh)}

  def measure_scale(self, state: TrainState) -> jax.Array:
    """1 / the standard deviation of the latents, as for Stable Diffusion."""
    data = self.feed.plain_batches("photos", 64, "scale")
    encode = jax.jit(self.model.encode_photo)
    latents, count = [], 0
    for batch in data.batches():
      photos = batch["photos_out"][batch["photos_out_mask"]]
      latents.append(np.asarray(encode(state.params, photos)[0]))
      count += len(photos)
      if count >= min(MEASURED_PHOTOS, data.describe()["examples"]):
        break
    scale = 1.0 / np.std(np.concatenate(latents))
    logging.info("The latents' scale is %.4f.", scale)
    return jnp.float32(scale)

  def sample(
    self, stage: StageConfig, state: TrainState, progress: Progress
  ) -> None:
    """Writes photos to look at, where there are photos and the stage draws."""
    kind, count = samples.kind_of(stage), self.run.log.num_samples
    if kind and count and self.feed.photos:
      samples.write(
        self.model,
        self.run,
        stage,
        state,
        self.feed.plain_batches(kind, count, "samples").batch(0),
        self.clip_tokenizer.encode_padded(""),
        self.workdir,
        progress,
      )


def _local(array: jax.Array) -> np.ndarray:
  """This process's rows of an array divided by rows."""
  shards = {s.index[0].start or 0: s.data for s in array.addressable_shards}
  return np.concatenate([np.asarray(shards[k]) for k in sorted(shards)])


def _report(progress: Progress, pending, stage: str) -> None:
  """Writes a step's metrics, nats turned into means."""
  if pending is None:
    return
  step, metrics = pending
  numbers = {
    f"train/{name}": float(value)
    for name, value in metrics.items()
    if not name.endswith(("_nats", "_tokens"))
  }
  for name in ("text", "caption"):
    if f"{name}_nats" in metrics:
      count = max(float(metrics[f"{name}_tokens"]), 1.0)
      numbers[f"train/{name}_loss"] = float(metrics[f"{name}_nats"]) / count
  progress.write(step, numbers, stage)


@contextlib.contextmanager
def _stop_asked() -> Iterator[list[int]]:
  """Collects SIGINT and SIGTERM; a second SIGINT ends the program at once."""
  asked: list[int] = []

  def handle(number, frame):
    del frame
    if asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    asked.append(number)

  kept = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield asked
  finally:
    for number, handler in kept.items():
      signal.signal(number, handler)


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
