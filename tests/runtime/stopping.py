"""One of two processes that step until they are told to stop.

See test_interrupt. It prints `stepping` when it has made some steps, and
`stopped N` when it stops after N.
"""

import sys

import jax
import jax.numpy as jnp

from photochat_jax.runtime.interrupt import Interrupted, StopRequest


def main(address: str, process: int) -> None:
  jax.distributed.initialize(address, 2, process)
  mesh = jax.make_mesh(
    (2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rows = jax.NamedSharding(mesh, jax.P("data"))
  total = jax.jit(jnp.sum, out_shardings=jax.NamedSharding(mesh, jax.P()))
  ones = jax.make_array_from_callback(
    (2,), rows, lambda index: jnp.ones(1, jnp.float32)
  )
  made = 0
  with StopRequest() as stop:
    # As in a run that goes back now and then: numbers come again.
    while True:
      for step in range(10):
        assert float(total(ones)) == 2
        made += 1
        if made == 5:
          print("stepping", flush=True)
        if code := stop.agreed(step):
          print("stopped", made, flush=True)
          raise Interrupted(code)


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]))
