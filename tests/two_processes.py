"""One of two processes that train together; `test_two_processes.py` starts it.

python two_processes.py joint|all FOLDER OTHER  trains these stages and
evaluates in FOLDER, goes on with the run in OTHER, and prints a line of JSON at
the end. The environment says which process it is, as SLURM's does.
"""

import dataclasses
import json
import sys

import jax
import small_run

from photochat_jax import evaluate, train
from photochat_jax.config import MeshConfig
from photochat_jax.runtime import cluster


def settings(stages):
  """The smallest run, 'joint' or 'all' of its stages, and its last step.

  Every parameter is divided, and the step before the last one is saved.
  """
  run = small_run.run_config(mesh=MeshConfig(data=1, fsdp=-1))
  if stages == "joint":
    run = dataclasses.replace(run, stages=run.stages[-1:])
  last = sum(stage.steps for stage in run.stages)
  keep = dataclasses.replace(run.checkpoint, every_steps=last - 1, keep=10)
  return dataclasses.replace(run, checkpoint=keep), last


def main(stages, folder, other):
  run, _ = settings(stages)
  line = cluster.start()
  number = jax.process_index()
  state = train.train(run, folder)
  kernel = state.params["language_model"]["lm_head"]["kernel"]
  metrics = evaluate.evaluate(run, folder)
  train.train(run, other)
  said = {
    "line": line,
    "visible": jax.config.values["jax_cuda_visible_devices"],
    "kernel": [kernel.shape, kernel.addressable_shards[0].data.shape],
    "scale": float(state.latent_scale),
    "perplexity": metrics["perplexity"],
    "first": cluster.text_of_first("één" if number == 0 else "something else"),
    "all": cluster.texts_of_all("ab" * number),
  }
  try:
    cluster.by_first("open it", lambda: open("/nowhere/at/all"))
  except (OSError, cluster.ClusterError) as error:
    said["error"] = type(error).__name__
  print(json.dumps(said))


if __name__ == "__main__":
  main(*sys.argv[1:])
