"""Starts trainers that can be killed; see test_killed.

This program imports all there is to import, which takes long, and touches no
device. For each line of its standard input, `PROCESSES STEPS STEPS FOLDER`, it
forks so many processes that together train there, so many updates in each of
two stages with a checkpoint after each update. It prints the processes' numbers
and, when they have ended, their exit codes. In the folder are, beside what
every run writes,

  batches.<process>.jsonl  a line for each start and for each batch it takes
  digests.json             of the last state, where there is one process
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import traceback

import pair
import small_run
import tensorflow  # noqa: F401 - imported before the forks.

from photochat_jax import train, trainer
from photochat_jax.config import LogConfig, StageConfig, StageLosses
from photochat_jax.runtime import cluster
from photochat_jax.state import digest


def run_config(steps):
  """Little to compile: each start does it again."""
  run = small_run.run_config(
    stages=(
      small_run.stages(steps[0])[0],
      StageConfig(
        name="talk",
        steps=steps[1],
        data="dialogues",
        batch_size=2,
        trainable=("language_model/.*",),
        losses=StageLosses(text=1.0, caption=1.0),
      ),
    ),
    log=LogConfig(every_steps=1, sample_every=0, num_samples=0),
  )
  model = run.model
  change = dataclasses.replace
  model = change(
    model,
    qformer=change(
      model.qformer, num_hidden_layers=1, cross_attention_frequency=1
    ),
    language=change(model.language, num_hidden_layers=1),
    vae=change(model.vae, block_out_channels=(8,)),
    unet=change(
      model.unet, block_out_channels=(8,), attention=(False,), sample_size=8
    ),
  )
  return change(
    run, model=model, checkpoint=change(run.checkpoint, every_steps=1)
  )


class Noted:
  """A pipeline whose batches are noted as they are taken."""

  def __init__(self, data, start, note):
    self._data, self._start, self._note = data, start, note

  def __getattr__(self, name):
    return getattr(self._data, name)

  def batches(self, start, num):
    for number, batch in enumerate(self._data.batches(start, num), start):
      content = hashlib.sha256()
      for name, array in sorted(batch.items()):
        content.update(f"{name} {array.dtype} {array.shape}".encode())
        content.update(array.tobytes())
      self._note(
        step=self._start + number + 1,
        examples=self._data.names(number),
        content=content.hexdigest(),
      )
      yield batch


def work(process, address, steps, folder):
  """Trains, and returns the exit code."""
  path = folder / f"batches.{process}.jsonl"

  def note(**line):
    with path.open("a") as file:
      file.write(json.dumps(line) + "\n")

  updates = trainer.Trainer.updates
  trainer.Trainer.updates = lambda self, leg, data, *rest: updates(
    self, leg, Noted(data, leg.start, note), *rest
  )
  note(start=os.getpid())
  try:
    if address:
      cluster.start(address, 2, process)
    state = train.train(run_config(steps), folder)
  except SystemExit as stopped:
    return stopped.code
  except BaseException:
    traceback.print_exc()
    return 1
  if not address:
    digests = {"params": digest(state.params), "state": digest(state)}
    (folder / "digests.json").write_text(json.dumps(digests))
  return 0


def main():
  print("ready", flush=True)
  for line in sys.stdin:
    *numbers, folder = line.strip().split(" ", 3)
    processes, *steps = map(int, numbers)
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    address = pair.free_address() if processes > 1 else None
    children = []
    for process in range(processes):
      children.append(os.fork())
      if not children[-1]:
        os.dup2(2, 1)
        code = work(process, address, steps, folder)
        sys.stderr.flush()
        os._exit(code)
    print(*children, flush=True)
    ended = [os.waitpid(child, 0)[1] for child in children]
    print(*map(os.waitstatus_to_exitcode, ended), flush=True)


if __name__ == "__main__":
  main()
