"""One of two processes that save and restore: ADDRESS NUMBER FOLDER.

It prints what was restored as JSON. The arrays lie on both.
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from photochat_jax.checkpoints import manager


def main(address, number, folder):
  jax.distributed.initialize(address, 2, int(number))
  mesh = jax.make_mesh((2,), ("fsdp",), (AxisType.Auto,))
  where = NamedSharding(mesh, PartitionSpec("fsdp"))

  def state(seed):
    x = np.random.default_rng(seed).normal(size=(8, 64)).astype("float32")
    put = jax.make_array_from_callback(x.shape, where, lambda i: x[i])
    return {"params": {"x": put}}

  def abstract(step):
    leaf = jax.ShapeDtypeStruct((8, 64), np.float32, sharding=where)
    return {"params": {"x": leaf}}

  with manager.Checkpoints(folder, 4) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state(step), {})
    checkpoints.wait()
    digest = checkpoints.read_meta(3)["digests"]["params/x"]
    if number == "1":
      # Only this process sees that the second is damaged.
      read = checkpoints._handler.restore
      checkpoints._handler.restore = lambda folder, **kwargs: (
        _fail() if folder.parent.name == "3" else read(folder, **kwargs)
      )
    got, step, told = checkpoints.restore_newest(abstract)
    same = all(
      np.array_equal(shard.data, want.data)
      for shard, want in zip(
        got["params"]["x"].addressable_shards,
        state(step)["params"]["x"].addressable_shards,
        strict=True,
      )
    )
    steps = checkpoints.steps()
    checkpoints.save(3, got, {})
    checkpoints.wait()
    checkpoints.delete_after(1)
    left = checkpoints.steps()
  print(json.dumps([step, same, told, steps, left, digest]))


def _fail():
  raise ValueError("a bad block")


if __name__ == "__main__":
  main(*sys.argv[1:])
