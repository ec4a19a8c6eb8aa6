"""Plans and tables of ablations; the runs are stand-ins."""

import ast
import dataclasses
import io
import json
import math
import os
import shlex
import subprocess
import sys
import threading

import numpy as np
import pytest
import small_run
from PIL import Image

from photochat_jax.ablation import arms, plot, runs, table
from photochat_jax.config import ConfigError


def jobs_of(out, names=("aligned", "rloo"), seeds=(0, 3)):
  return runs.plan(
    "configs/tiny.py", small_run.run_config(), arms.choose(names), seeds, out,
    ["--config.data.told_share=0.05"],
  )  # fmt: skip


def test_each_seed_has_a_base_from_which_arms_begin(tmp_path):
  jobs = jobs_of(tmp_path)
  assert [(j.name, j.seed) for j in jobs] == [
    ("before_joint", 0), ("aligned", 0), ("rloo", 0),
    ("before_joint", 3), ("aligned", 3), ("rloo", 3),
  ]  # fmt: skip
  base, rloo = jobs[3].command, jobs[5].command
  for name, command in (("before_joint", base), ("rloo", rloo)):
    assert command[3:6] == (
      f"--workdir={tmp_path}/seed3/{name}",
      "--config=configs/tiny.py",
      "--config.seed=3",
    )
    assert "--config.data.told_share=0.05" in command
  assert "--config.stage_order=('autoencoder', 'generator',)" in base
  assert set(rloo[7:]) == {
    "--config.stage_order=('joint',)",
    f"--config.pretrained.run={tmp_path}/seed3/before_joint",
    "--config.bridge.draw=gumbel",
    "--config.bridge.estimator=rloo",
    "--config.bridge.matrix=none",
  }


def test_arms_that_begin_earlier_share_less(tmp_path):
  stages = [
    dataclasses.replace(small_run.run_config().stages[0], name=name)
    for name in ("autoencoder", "generator", "perceiver", "dialogue", "joint")
  ]
  run = dataclasses.replace(small_run.run_config(), stages=tuple(stages))
  jobs = runs.plan(
    "c.py", run, arms.choose(["none", "pipeline", "linear"]), [1], tmp_path
  )
  assert [j.name for j in jobs] == [
    "before_dialogue", "before_joint", "captions",
    "none", "pipeline", "linear",
  ]  # fmt: skip
  folder = tmp_path / "seed1"
  orders, begins = {}, {}
  for job in jobs:
    for word in job.command:
      name, _, value = word.partition("=")
      if name == "--config.stage_order":
        orders[job.name] = ast.literal_eval(value)
      if name == "--config.pretrained.run":
        begins[job.name] = value
  whole = tuple(stage.name for stage in stages)
  assert orders == {
    "before_dialogue": whole[:3], "before_joint": whole[3:4],
    "none": whole[4:], "pipeline": whole[3:], "linear": whole,
  }  # fmt: skip
  assert begins == {
    "before_joint": f"{folder}/before_dialogue",
    "none": f"{folder}/before_joint",
    "pipeline": f"{folder}/before_dialogue",
  }
  # Its captions are of the photos that the pipeline is shown.
  data = f"{folder}/before_dialogue/data"
  assert set(jobs[2].command[2:]) == {
    f"--path={data}", "--dataset=photochat",
    f"--workdir={folder}/before_dialogue",
  }  # fmt: skip
  assert f"--config.data.path={data}" in jobs[4].command


def test_what_is_done_is_not_done_again(tmp_path):
  jobs, made = jobs_of(tmp_path), []

  def execute(command, log):
    made.append(command)
    if len(made) == 3:
      return 1
    folder = log.parent / "eval"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"perplexity": len(made)}))
    return 0

  with pytest.raises(runs.RunFailed, match="rloo.*ended with 1; .*log.txt"):
    runs.run_all(jobs, execute=execute)
  assert set(runs.read(jobs)) == {("before_joint", 0), ("aligned", 0)}
  told = []
  runs.run_all(jobs, lambda job, _, done: told.append(done), execute)
  assert told == [True, True, False, False, False, False]
  assert made == [j.command for j in (*jobs[:3], *jobs[2:])]
  assert runs.read(jobs)["rloo", 3] == {"perplexity": 7}


def test_seeds_are_worked_on_together_and_a_fault_ends_both(tmp_path):
  jobs = jobs_of(tmp_path, seeds=(0, 1, 2))
  together, ended = threading.Barrier(2, timeout=60), []

  def execute(command, log):
    seed, name = log.parent.parent.name, log.parent.name
    if name == "before_joint" and seed != "seed2":
      together.wait()  # Neither goes on without the other.
    if (seed, name) == ("seed0", "aligned"):
      return 3
    if (seed, name) == ("seed1", "aligned"):
      while not (tmp_path / "seed0" / "aligned").exists():
        pass
    (log.parent / "eval").mkdir()
    (log.parent / "eval" / "metrics.json").write_text("{}")
    ended.append((seed, name))
    return 0

  with pytest.raises(runs.RunFailed, match="seed0/aligned.* ended with 3"):
    runs.run_all(jobs, execute=execute, parallel=2)
  # What was under way ended, and a seed's runs keep their order.
  assert ("seed0", "rloo") not in ended
  for seed in ("seed0", "seed1", "seed2"):
    order = [name for of, name in ended if of == seed]
    assert order == ["before_joint", "aligned", "rloo"][: len(order)]


def test_captions_of_a_real_data_set_are_of_one_seed(tmp_path):
  run = small_run.run_config()
  real = dataclasses.replace(
    run,
    stages=(dataclasses.replace(run.stages[-1], name="dialogue"), *run.stages),
    data=dataclasses.replace(run.data, source="photochat", path="data/photos"),
  )
  pipeline = arms.choose(["pipeline"])
  with pytest.raises(ConfigError, match="need one seed at a time"):
    runs.plan("c.py", real, pipeline, [0, 1], tmp_path)
  captioner = runs.plan("c.py", real, pipeline, [3], tmp_path)[0]
  assert "--path=data/photos" in captioner.command


def test_an_ablation_needs_shared_stages(tmp_path):
  run = small_run.run_config()
  alone = type(run)(**vars(run) | {"stages": run.stages[-1:]})
  alone = dataclasses.replace(alone, stages=run.stages[:1])
  with pytest.raises(ConfigError, match="aligned needs a stage called joint"):
    runs.plan("x.py", alone, arms.choose(["aligned"]), [0], tmp_path)
  with pytest.raises(ValueError, match="no arm 'alinged'; choose core"):
    arms.choose(["alinged"])
  assert [a.name for a in arms.choose(["none", "core"])][:2] == [
    "none", "aligned"
  ]  # fmt: skip


def test_intervals_by_hand():
  # Values 1, 2, 6: mean 3, deviation sqrt(7); t(0.975, 2) is 4.302653.
  found = table.estimate([1.0, 2.0, 6.0])
  assert found.mean == 3
  assert found.half == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-6)
  assert str(table.estimate([0.5])) == "0.500"
  assert str(table.estimate([])) == "–"


def results(told):
  return {
    (arm, seed): {"attribute_accuracy": {"told": value}, "perplexity": None}
    for arm, row in told.items()
    for seed, value in row.items()
  }


def test_differences_are_of_the_same_seed():
  found = results({"none": {0: 0.1, 1: 0.3, 2: 0.2}, "rloo": {1: 0.9, 0: 0.7}})
  name = "attribute_accuracy.told"
  apart = table.difference(found, "rloo", "none", name)
  assert apart.mean == pytest.approx(0.6) and apart.count == 2
  np.testing.assert_allclose(apart.half, 0, atol=1e-12)
  assert table.difference(found, "rloo", "none", "perplexity").count == 0


def test_the_table_reads_well():
  found = results({"none": {0: 0.1, 1: 0.2}, "rloo": {0: 0.7, 1: 0.9}})
  text = table.markdown(
    table.tables(found, {"none": "apart", "rloo": "RLOO"})
  )
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in text.splitlines()
    if line.startswith("|")
  ]
  assert rows[0][:3] == ["arm", "seeds", "told"]
  assert rows[2][:3] == ["none: apart", "2", "0.150 ± 0.635"]
  assert rows[3][:3] == ["rloo: RLOO", "2", "0.800 ± 1.271"]
  assert rows[3][-1] == "–"
  # 0.6 and 0.7: 0.65, deviation 0.0707, half 12.706 * 0.05.
  assert rows[-1][:2] == ["rloo", "0.650 ± 0.635 *"]


def test_the_tool_prints_its_commands(request, tmp_path):
  root = request.path.parents[2]
  made = subprocess.run(
    [
      sys.executable, root / "tools" / "run_ablation.py",
      "--config=configs/tiny.py", "--arms=none", "--seeds=2", "--dry-run",
      f"--out={tmp_path}", "--config.stages.joint.steps=7",
    ],
    cwd=root, capture_output=True, text=True, check=False,
    env={**os.environ, "PYTHONPATH": str(root)},
  )  # fmt: skip
  assert made.returncode == 0, made.stderr
  lines = [shlex.split(line) for line in made.stdout.splitlines()]
  assert len(lines) == 4
  assert all("--config.stages.joint.steps=7" in line for line in lines)
  assert "--config.bridge.matrix=none" in lines[3]


def test_the_picture_has_a_panel_for_each_figure():
  found = results({"none": {0: 0.1, 1: 0.2}, "rloo": {0: 0.7}})
  names = {"none": "apart", "rloo": "RLOO", "static": "not yet"}

  def draw():
    pixels = Image.open(io.BytesIO(plot.draw(found, names))).convert("RGB")
    return np.asarray(pixels)

  one = draw()
  assert (one < 100).all(-1).sum() > 300  # Words.
  for metrics in found.values():
    metrics["perplexity"] = 3.0
  two = draw()
  assert two.shape[0] == one.shape[0]
  assert two.shape[1] - one.shape[1] == 3 * 130


def test_a_sweep_has_its_values_in_columns():
  found = {
    "0.05": results({"none": {0: 0.1, 1: 0.2}, "rloo": {0: 0.7}}),
    "0.5": results({"rloo": {0: 0.9}}),
  }
  tables = table.sweep(found, {"none": "", "rloo": ""}, "data.told_share")
  told = tables[0]
  assert told.note == "told, by data.told_share."
  assert told.heads == ["arm", "0.05", "0.5"]
  assert told.rows == [
    ["none", "0.150 ± 0.635", "–"],
    ["rloo", "0.700", "0.900"],
  ]
  pixels = Image.open(
    io.BytesIO(plot.draw_sweep(found, {"none": "", "rloo": ""}, "told_share"))
  )
  assert min(pixels.size) > 200


def test_the_tool_plans_a_sweep(request, tmp_path):
  root = request.path.parents[2]

  def run(*flags):
    return subprocess.run(
      [
        sys.executable, root / "tools" / "run_ablation.py",
        "--config=configs/tiny.py", "--arms=none", "--seeds=1", "--dry-run",
        f"--out={tmp_path}", *flags,
      ],
      cwd=root, capture_output=True, text=True, check=False,
      env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip

  made = run("--sweep=data.told_share=0.5,0.05")
  assert made.returncode == 0, made.stderr
  lines = [shlex.split(line) for line in made.stdout.splitlines()]
  shares = [
    share
    for share in ("0.05", "0.5")
    for line in lines
    if f"--config.data.told_share={share}" in line
    and f"--workdir={tmp_path}/data.told_share={share}/seed0/none" in line
  ]
  assert shares == ["0.05", "0.5"] and len(lines) == 4
  for wrong in ("data.told_shar=1", "data.told_share=many", "seed"):
    made = run(f"--sweep={wrong}")
    assert made.returncode == 2
    assert len(made.stderr.splitlines()) == 1 and "--sweep=" in made.stderr
