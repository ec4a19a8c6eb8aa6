"""The tool, on the smallest model and the smallest topology."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
import ml_collections
import small_run

def get_config():
  run = small_run.run_config({"draw": "gumbel"})
  config = ml_collections.ConfigDict(run.as_dict())
  config.mesh.data, config.mesh.fsdp = 1, -1
  return config
"""


def call(*arguments):
  return subprocess.run(
    [sys.executable, "tools/compile_for_tpu.py", *arguments],
    cwd=ROOT,
    env={
      **os.environ,
      # It compiles sooner so.
      "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
      "JAX_MEMORY_FITTING_EFFORT": "-1.0",
      "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    },
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture
def config(tmp_path):
  file = tmp_path / "small.py"
  file.write_text(CONFIG)
  return f"--config={file}"


def test_a_whole_step_is_compiled_for_four_chips(config, tmp_path):
  pytest.importorskip("libtpu", reason="needs pip install -e '.[tpu]'")
  out = tmp_path / "found.json"
  told = call(config, "--topology=v5e-4", "--batch=4", f"--out={out}")
  assert told.returncode == 0, told.stderr
  last = told.stdout.splitlines()[-1]
  assert last.startswith("fits: 0.") and "of 16 GB per chip" in last
  found = json.loads(out.read_text())
  assert found["last_line"] == last and found["fits"]
  assert found["about"]["chips"] == 4 and found["about"]["batch_size"] == 4
  assert found["about"]["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
  assert found["aliased_share"] >= 0.95
  # Every part of the model is in the program, and both directions.
  parts = {row["part"].split(".")[0] for row in found["traffic"]}
  assert {"ViT", "QFormer", "Llama", "CLIPText", "UNet", "VAE"} <= parts
  assert {r["direction"] for r in found["traffic"]} == {"forward", "backward"}
  lines = [row["source"] for row in found["buffers"]]
  assert any(line.startswith("photochat_jax/") for line in lines)
  assert set(found["flops"]) >= {"language_model", "unet", "text_model"}
  # Nothing but the time is on standard error.
  assert set(line.split(",")[0] for line in told.stderr.splitlines()) <= {
    "tracing",
    "compiling",
  }


@pytest.mark.parametrize(
  "arguments, sentence",
  [
    (["--topology=v5e:2x2x2"], "No topology is called 'v5e:2x2x2'"),
    (["--topology=v5e:2x2", "--stage=jiont"], "no stage 'jiont'"),
    (["--topology=v5e:2x2", "--batch=0"], "batch"),
    (["--topology=v5e:2x2", "--config.optim.epz=1"], "did you mean 'eps'?"),
    ([], "Give --config=FILE"),
  ],
)
def test_a_wrong_question_is_one_sentence(config, arguments, sentence):
  told = call(config, *arguments)
  assert told.returncode == 2 and told.stdout == ""
  assert sentence in told.stderr and len(told.stderr.splitlines()) == 1
