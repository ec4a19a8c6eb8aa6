"""One stage of training: the loop round the update.

Everything that differs between processes or runs stays on the host and out of
the numbers: a step's batch and its random numbers follow from its number
alone. The loop never waits for the device but for metrics that are some steps
old.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from photochat_jax import (
  captions,
  feed,
  initial,
  latents,
  objective,
  optim,
  samples,
  sharding,
  train_step,
  validation,
)
from photochat_jax.checkpoints.manager import Checkpoints
from photochat_jax.config import RunConfig, StageConfig
from photochat_jax.data import pipeline, vocabulary
from photochat_jax.initial import Leg
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.progress import Progress
from photochat_jax.runtime.health import GoBack, Health
from photochat_jax.runtime.interrupt import Interrupted, StopRequest
from photochat_jax.runtime.meters import Meters
from photochat_jax.runtime.profiling import Profiler
from photochat_jax.runtime.watchdog import Watchdog
from photochat_jax.state import TrainState


@dataclasses.dataclass
class Trainer:
  """Runs stages; what all of them share."""

  run: RunConfig
  model: PhotoChat
  mesh: Any
  feed: feed.Feed
  llm_tokenizer: Any
  clip_tokenizer: Any
  workdir: epath.Path
  checkpoints: Checkpoints
  progress: Progress
  health: Health
  stop: StopRequest
  watchdog: Watchdog
  meters: Meters
  profiler: Profiler
  made: int = 0  # Steps of this process, for the profiler.

  @functools.cached_property
  def vocabulary_map(self) -> Any:
    """The bridge's, see `data.vocabulary`."""
    table, coverage = vocabulary.build_vocabulary_map(
      self.llm_tokenizer, self.clip_tokenizer
    )
    logging.info("%s", coverage)
    return table

  def batches(self, stage: StageConfig) -> pipeline.Pipeline:
    """A stage's data, and tells what they are.

    Raises:
      ConfigError: the rows cannot be divided over the devices.
    """
    sharding.check_rows(stage, self.mesh)
    data = self.feed.batches(stage.data, stage.batch_size, stage.name)
    for line in self.feed.describe(stage.name, data):
      self.progress.message(line)
    return data

  def run_stage(
    self,
    leg: Leg,
    data: pipeline.Pipeline,
    following: Leg | None,
    state: TrainState,
  ) -> TrainState:
    """Trains a stage from wherever the state is in it to its end.

    Args:
      leg: the stage and its place.
      data: its batches.
      following: the next stage, None after the last.
      state: donated.

    Returns:
      The next stage's first state.
    """
    stage = leg.stage
    step_fn = self.compile_step(leg, state)
    while int(state.step) < leg.end:
      bad = None
      try:
        state = self.updates(leg, data, step_fn, state)
      except GoBack as error:
        # Its frames hold the state, which would then be there twice.
        bad = error.with_traceback(None)
      if bad is not None:
        state = self.go_back(leg, bad)
    with self.watchdog.paused():
      if stage.losses.autoencoder:
        photos = self.feed.plain_batches("photos", 64, "scale")
        state = state.replace(
          latent_scale=latents.measure_scale(self.model, state.params, photos)
        )
      self.sample(stage, state)
      if following:
        state = initial.begin_stage(self.run, following, state)
        state = sharding.shard_state(state, self.mesh)
      self.save(leg.end, stage, state)
    if broken := self.feed.take_broken(data):
      self.progress.message(f"Stage {stage.name}: {broken}")
    # A stage's programs are of no use to the next one, and take memory.
    jax.clear_caches()
    return state

  def updates(
    self, leg: Leg, data: pipeline.Pipeline, step_fn: Any, state: TrainState
  ) -> TrainState:
    """Makes a stage's updates.

    Raises:
      GoBack: too many were skipped in a row.
      Interrupted: the run was asked to stop; the state is saved.
    """
    run, stage = self.run, leg.stage
    step, pending, metrics = int(state.step), None, None
    dev_loss = self.dev_loss(leg)
    self.meters.begin(stage)
    batches = data.batches(step - leg.start, leg.end - step)
    for batch in self.meters.batches(batches):
      names = functools.partial(data.names, step - leg.start)
      step += 1
      self.made += 1
      self.profiler.step(self.made, metrics)
      left_out = step in self.health.left_out
      if left_out:
        state = _leave_out(state)
      else:
        state, metrics = step_fn(state, sharding.shard_batch(batch, self.mesh))
        self.health.watch(step, metrics, names)
      self.meters.step_done(counts=not left_out)
      if not left_out and (
        step % run.log.every_steps == 0 or step == leg.end
      ):
        # One report late, so that the device need not be waited for.
        self.progress.perf(step, self.meters.take())
        _report(self.progress, pending, stage.name)
        pending = (step, metrics)
      self.watchdog.beat(step)
      if step == leg.end:
        break
      dev = None
      if dev_loss and step % run.log.dev_every == 0:
        with self.paused(metrics):
          dev = dev_loss(state)
        self.progress.write(step, dev, stage.name)
      if run.log.sample_every and step % run.log.sample_every == 0:
        with self.paused(metrics):
          self.sample(stage, state)
      code = self.stop.agreed(step)
      if code or step % run.checkpoint.every_steps == 0:
        # What is saved is reported: a resumed run goes on after it.
        _report(self.progress, pending, stage.name)
        pending = None
        with self.paused(metrics):
          self.save(step, stage, state, dev)
      if code:
        self.checkpoints.wait()
        self.progress.message(
          f"Stopped at step {step}, which is saved in {self.workdir}; the "
          "same command goes on from there."
        )
        raise Interrupted(code)
    self.health.finish()
    _report(self.progress, pending, stage.name)
    return state

  @contextlib.contextmanager
  def paused(self, metrics: Any) -> Iterator[None]:
    """For what is no training; `metrics` are the last step's."""
    with self.meters.paused(metrics), self.watchdog.paused():
      yield

  def save(
    self,
    step: int,
    stage: StageConfig,
    state: TrainState,
    metrics: dict[str, float] | None = None,
  ) -> None:
    """Begins to write a checkpoint."""
    meta = {
      "stage": stage.name,
      "health": self.health.state(),
      "meters": self.meters.state(),
    }
    # Losses of different stages are no measure of what is best.
    is_last = stage is self.run.stages[-1]
    self.checkpoints.save(step, state, meta, metrics if is_last else None)

  def dev_loss(self, leg: Leg) -> validation.DevLoss | None:
    """What measures the stage's loss on the dev split, if it is asked for."""
    if not self.run.log.dev_every:
      return None
    stage = leg.stage
    return validation.DevLoss(
      self.model,
      self.run,
      leg,
      self.mesh,
      self.feed.dev_batches(
        stage.data, stage.batch_size // stage.accumulate, stage.name
      ),
      self.clip_tokenizer.encode_padded(""),
      self.vocabulary_map,
    )

  def go_back(self, leg: Leg, bad: GoBack) -> TrainState:
    """The state of an earlier checkpoint, and nothing saved after it."""
    self.checkpoints.wait()
    step = self.health.go_back(bad, self.checkpoints.steps(), leg.start)
    self.progress.message(
      f"Updates {bad.first} to {bad.last} were skipped; going back to step "
      f"{step or 0}, see skipped.jsonl."
    )
    where = (self.run, self.model, self.mesh, leg)
    self.checkpoints.delete_after(step or 0)
    self.progress.rewind(step or 0)
    meta = {} if step is None else self.checkpoints.read_meta(step)
    self.meters.restore(meta.get("meters"))
    if step is None:
      return initial.init_state(*where, self.llm_tokenizer)
    return self.checkpoints.restore(
      initial.abstract_state(*where), step, cast=True
    )

  def compile_step(self, leg: Leg, state: TrainState):
    """The stage's update, jitted with the state donated."""
    run = self.run
    trainable, _ = optim.split(state.params, leg.stage.trainable)
    retokenise = vocabulary.Retokeniser(
      self.llm_tokenizer, self.clip_tokenizer, run.bridge.max_tokens
    )
    in_program = captions.draws_in_program(run, leg.stage)
    where = sharding.state_shardings(state, self.mesh)
    step_fn = jax.jit(
      train_step.make_train_step(
        self.model,
        run,
        leg.index,
        leg.start,
        optim.make_optimizer(run.optim, run.health, leg.stage, trainable),
        self.clip_tokenizer.encode_padded(""),
        self.vocabulary_map,
        retokenise if in_program else None,
        self.mesh,
      ),
      out_shardings=(where, None),
      donate_argnums=0,
    )
    if in_program or not captions.draws_own(run, leg.stage):
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
    samples = len(y) // (rows * photos)
    each = np.repeat(mask.reshape(-1, n), samples, axis=0)
    z, alignment, final = retokenise(y, each)
    found = {
      "caption_tokens": y,
      "clip_tokens": z,
      "alignment": alignment,
      "caption_final": final,
    }
    local = {
      name: array.reshape(rows, photos * samples, *array.shape[1:])
      for name, array in found.items()
    }
    return {**batch, **sharding.shard_batch(local, self.mesh)}

  def sample(self, stage: StageConfig, state: TrainState) -> None:
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
        self.progress,
      )


@functools.partial(jax.jit, donate_argnums=0)
def _leave_out(state: TrainState) -> TrainState:
  """Takes a step without an update."""
  return state.replace(step=state.step + 1)


def _local(array: jax.Array) -> np.ndarray:
  """This process's rows of an array divided by rows."""
  shards = {s.index[0].start or 0: s.data for s in array.addressable_shards}
  return np.concatenate([np.asarray(shards[k]) for k in sorted(shards)])


def _report(progress: Progress, pending: Any, stage: str) -> None:
  """Writes a step's metrics."""
  if pending is not None:
    step, metrics = pending
    progress.write(step, objective.means(metrics), stage)
