"""Bad updates in a real run: told, and undone when they go on."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from photochat_jax import train, trainer
from photochat_jax.checkpoints.manager import Checkpoints
from photochat_jax.config import HealthConfig
from photochat_jax.runtime.health import GoBack, Health, UnhealthyError

STEPS = 6


def the_run(**health):
  """One stage of six updates, each saved."""
  run = small_run.run_config(steps=STEPS)
  checkpoint = dataclasses.replace(run.checkpoint, every_steps=1, keep=9)
  return dataclasses.replace(
    run,
    stages=run.stages[1:2],  # The generator's: small, and quick to compile.
    checkpoint=checkpoint,
    health=HealthConfig(max_skipped=2, **health),
  )


def spoil(monkeypatch, bad):
  """Lets the updates of these numbers meet a loss that is no number."""
  compile_step = trainer.Trainer.compile_step

  def spoilt(self, leg, state):
    step_fn = compile_step(self, leg, state)

    def update(state, batch):
      if int(state.step) + 1 not in bad:
        return step_fn(state, batch)
      scale = np.asarray(state.latent_scale)
      nan = jax.device_put(jnp.float32(np.nan), state.latent_scale.sharding)
      after, metrics = step_fn(state.replace(latent_scale=nan), batch)
      scale = jax.device_put(scale, after.latent_scale.sharding)
      return after.replace(latent_scale=scale), metrics

    return update

  monkeypatch.setattr(trainer.Trainer, "compile_step", spoilt)


def written(folder):
  lines = (folder / "skipped.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_single_bad_update_is_told_and_the_run_goes_on(
  tmp_path, monkeypatch
):
  spoil(monkeypatch, {3})
  state = train.train(the_run(), tmp_path)
  assert int(state.step) == STEPS
  (row,) = written(tmp_path)
  assert (row["step"], row["loss"]) == (3, "nan")
  # A row is a photo here, and there are two.
  assert len(row["examples"]) == 2
  assert all(name.startswith("photo ") for name in row["examples"])


def test_bad_updates_in_a_row_are_undone_and_left_out(tmp_path, monkeypatch):
  spoil(monkeypatch, {4, 5})
  state = train.train(the_run(lookback=1), tmp_path)
  assert int(state.step) == STEPS
  *skipped, back = written(tmp_path)
  assert [row["step"] for row in skipped] == [4, 5]
  assert back == {"went_back_to": 2, "from": 5, "times": 1}
  with Checkpoints(tmp_path) as saved:
    health = saved.read_meta(STEPS)["health"]
    assert saved.steps() == list(range(1, STEPS + 1))
  # The two, and the one before them.
  assert health == {"left_out": [3, 4, 5], "rollbacks": 1}
  rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
  steps = [json.loads(row)["step"] for row in rows]
  assert steps == [1, 2, 6]
  assert all(
    math.isfinite(json.loads(row)["train/loss"]) for row in rows
  )
  # Three updates were made, so the optimiser counts three.
  assert int(state.opt_state.accepted) == 3


def test_a_run_that_does_not_recover_ends_with_a_sentence(
  tmp_path, monkeypatch
):
  spoil(monkeypatch, set(range(1, STEPS + 1)))
  run = the_run(lookback=0, max_rollbacks=1)
  with pytest.raises(UnhealthyError, match="went back 1 times.*skipped.jsonl"):
    train.train(run, tmp_path)


@pytest.mark.parametrize(
  ("saved", "start", "target", "left_out"),
  [
    ([10, 20, 30], 0, 20, range(25, 33)),  # Before the five it looks back.
    ([26, 30], 10, 26, range(27, 33)),  # The oldest there is.
    ([], 0, None, range(25, 33)),  # From the beginning.
    ([28], 28, 28, range(29, 33)),  # Not beyond the stage's own start.
  ],
)
def test_where_it_goes_back_to(tmp_path, saved, start, target, left_out):
  health = Health(HealthConfig(lookback=5), tmp_path)
  assert health.go_back(GoBack(30, 32), saved, start) == target
  assert health.left_out == set(left_out)
  again = Health(HealthConfig(), tmp_path)
  again.restore(json.loads(json.dumps(health.state())))
  assert again.state() == health.state()


def test_without_an_older_checkpoint_it_says_what_to_do(tmp_path):
  health = Health(HealthConfig(), tmp_path)
  with pytest.raises(UnhealthyError, match=r"raise checkpoint\.keep"):
    health.go_back(GoBack(30, 32), [31, 32], 10)
