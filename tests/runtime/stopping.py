"""A process of two that steps until it is told to stop; see test_interrupt."""

import sys

import jax
import jax.numpy as jnp

from photochat_jax.runtime.interrupt import StopRequest


def main(address: str, index: int) -> None:
  jax.distributed.initialize(address, 2, index)
  mesh = jax.make_mesh(
    (2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rows = jax.NamedSharding(mesh, jax.P("data"))
  total = jax.jit(jnp.sum, out_shardings=jax.NamedSharding(mesh, jax.P()))
  with StopRequest() as stop:
    for step in range(1, 1_000_000):
      ones = jax.make_array_from_callback(
        (2,), rows, lambda _: jnp.ones(1, jnp.float32)
      )
      assert float(total(ones)) == 2
      if step == 5:
        print("stepping", flush=True)
      if code := stop.agreed(step):
        print("stopped", step, flush=True)
        sys.exit(code)


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]))
