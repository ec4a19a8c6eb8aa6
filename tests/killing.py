"""A server of trainer processes; see test_killed.

It imports all there is to import and touches no device. For each line that it
reads from its standard input, `STEPS FOLDER`, it forks a process that trains
there, STEPS updates a stage, and prints the process's number and, when it has
ended, its exit code.
"""

import dataclasses
import os
import sys
import traceback

import small_run
import tensorflow  # noqa: F401 - imported before the forks, as it takes long.

from photochat_jax import train
from photochat_jax.state import digest


def work(steps: int, folder: str) -> int:
  """Trains; the last state's digest goes to FOLDER/digest."""
  run = small_run.run_config(steps=steps)
  checkpoint = dataclasses.replace(run.checkpoint, every_steps=1)
  run = dataclasses.replace(run, checkpoint=checkpoint)
  try:
    state = train.train(run, folder)
  except SystemExit as stopped:
    return stopped.code
  except BaseException:
    traceback.print_exc()
    return 1
  with open(os.path.join(folder, "digest"), "w") as file:
    file.write(digest(state))
  return 0


def main() -> None:
  print("ready", flush=True)
  for line in sys.stdin:
    steps, folder = line.strip().split(" ", 1)
    child = os.fork()
    if not child:
      code = work(int(steps), folder)
      sys.stderr.flush()
      os._exit(code)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
  main()
