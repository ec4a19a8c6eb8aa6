"""Two real processes that train one model, beside one that trains it alone."""

import json
import os
import shutil

import numpy as np
import pair
import pytest
import two_processes
from PIL import Image

from photochat_jax import evaluate, train

# What srun sets for each of two tasks, alone on its machine.
ENVIRONMENT = {
  "SLURM_JOB_ID": "1",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": str,
  "SLURM_LOCALID": "0",
  "SLURM_STEP_NODELIST": "127.0.0.1",
  "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
  "JAX_NUM_CPU_DEVICES": "1",
  # Compiled in half the time; each process compiles everything.
  "XLA_FLAGS": (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
  ),
}


@pytest.fixture(
  scope="module", params=["joint", pytest.param("all", marks=pytest.mark.slow)]
)
def alone(tmp_path_factory, request):
  """A run of one process: (stages, folder, latents' scale, metrics)."""
  folder = tmp_path_factory.mktemp("alone")
  run, _ = two_processes.settings(request.param)
  state = train.train(run, folder)
  metrics = evaluate.evaluate(run, folder)
  return request.param, folder, float(state.latent_scale), metrics


@pytest.fixture(scope="module")
def together(tmp_path_factory, alone):
  """(folder of two processes, folder they went on in, what each printed)."""
  place = tmp_path_factory.mktemp("together")
  stages, folder, *_ = alone
  other = copy_but_last(stages, folder, place / "other")
  said = pair.run(
    lambda number: (two_processes.__file__, stages, place / "run", other),
    timeout=900,
    **ENVIRONMENT,
    JAX_COORDINATOR_PORT=pair.free_address().split(":")[1],
  )
  return place / "run", other, said


def copy_but_last(stages, folder, target):
  """A copy that has to make the last step again."""
  shutil.copytree(folder, target)
  shutil.rmtree(target / "checkpoints" / str(two_processes.settings(stages)[1]))
  return target


def rows(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def assert_close(found, wanted, tolerance):
  """Rows of `metrics.jsonl`: the same names, and numbers that are close."""
  assert [(r["step"], r["stage"]) for r in found] == [
    (r["step"], r["stage"]) for r in wanted
  ]
  for one, two in zip(found, wanted, strict=True):
    assert one.keys() == two.keys()
    names = [name for name in one if name != "stage"]
    np.testing.assert_allclose(
      [one[n] for n in names], [two[n] for n in names], rtol=tolerance,
      err_msg=str(names),
    )  # fmt: skip


def test_two_train_as_one(alone, together):
  stages, folder, *_ = alone
  run, last = two_processes.settings(stages)
  assert_close(rows(together[0]), rows(folder), 1e-5)
  wanted = [stage.name for stage in run.stages for _ in range(stage.steps)]
  assert [row["stage"] for row in rows(together[0])] == wanted


def test_each_holds_half_and_both_say_the_same(alone, together):
  _, _, scale, metrics = alone
  said = [json.loads(out.splitlines()[-1]) for out, _ in together[2]]
  for number, one in enumerate(said):
    assert one["line"].startswith(f"Process {number} of 2 (by SLURM): 1 of 2")
    # The only task of its machine: JAX would give it the first GPU alone.
    assert one["visible"] == "all"
    (d, v), (part, _) = one["kernel"]
    assert part == d // 2 and v == 768
    np.testing.assert_allclose(one["scale"], scale, rtol=1e-5)
    np.testing.assert_allclose(
      one["perplexity"], metrics["perplexity"], rtol=1e-4
    )
    assert one["first"] == "één" and one["all"] == ["", "ab"]
  assert [one["error"] for one in said] == ["FileNotFoundError", "ClusterError"]


def test_the_first_writes_and_tells(alone, together):
  folder, _, said = together
  run, last = two_processes.settings(alone[0])
  (first, told), (second, nothing) = said
  assert "photo_recall" in first and "Report: " in first
  assert "photo_recall" not in second and "Report: " not in second
  assert f"joint  step {last}/{last}" in told and "step" not in nothing
  # The same files as of one process, none twice, no draft of the data left.
  names = {path.name for path in folder.iterdir()}
  assert names == {path.name for path in alone[1].iterdir()}
  assert len(list((folder / "tensorboard").iterdir())) == 1
  # Photos of the first stage's end, and what the model makes of them.
  sheet = f"samples/{run.stages[0].steps}/{run.stages[0].name}.png"
  sheets = [
    np.asarray(Image.open(place / sheet), np.int32)
    for place in (folder, alone[1])
  ]
  assert np.abs(sheets[0] - sheets[1]).max() <= 1


def test_what_one_saved_two_go_on_with(alone, together):
  assert_close(rows(together[1]), rows(alone[1]), 1e-6)


def test_what_two_saved_one_goes_on_with(alone, together, tmp_path):
  folder = copy_but_last(alone[0], together[0], tmp_path / "run")
  train.train(two_processes.settings(alone[0])[0], folder)
  assert_close(rows(folder)[-1:], rows(together[0])[-1:], 1e-6)
