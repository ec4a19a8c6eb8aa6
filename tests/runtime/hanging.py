"""One of two processes that step, until the second one hangs.

See test_watchdog.
"""

import sys
import threading

import jax
import jax.numpy as jnp

from photochat_jax.runtime.watchdog import Watchdog


def fall_asleep() -> None:
  threading.Event().wait()


def main(address: str, process: int, workdir: str) -> None:
  jax.distributed.initialize(address, 2, process)
  mesh = jax.make_mesh(
    (2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rows = jax.NamedSharding(mesh, jax.P("data"))
  total = jax.jit(jnp.sum, out_shardings=jax.NamedSharding(mesh, jax.P()))
  ones = jax.make_array_from_callback(
    (2,), rows, lambda index: jnp.ones(1, jnp.float32)
  )
  total(ones).block_until_ready()
  with Watchdog(workdir, 4.0) as watchdog:
    for step in range(1, 1_000_000):
      if process == 1 and step == 42:
        fall_asleep()
      watchdog.beat(step)
      total(ones).block_until_ready()


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
