"""The state as a pytree, and its digest."""

import jax
import jax.numpy as jnp
import numpy as np

from photochat_jax.state import TrainState, digest


def make_state(**changes):
  fields = {
    "step": jnp.int32(3),
    "params": {"unet": {"kernel": jnp.arange(4.0)}},
    "opt_state": (jnp.zeros(2),),
    "ema": {},
    "latent_scale": jnp.float32(1),
  }
  return TrainState(**{**fields, **changes})


def test_a_state_passes_through_jit_with_its_fields():
  got = jax.jit(lambda s: s.replace(step=s.step + 1))(make_state())
  assert isinstance(got, TrainState) and int(got.step) == 4
  np.testing.assert_array_equal(got.params["unet"]["kernel"], np.arange(4.0))


def test_weights_have_no_optimiser():
  got = make_state().weights()
  assert got.opt_state == () and len(jax.tree.leaves(got)) == 3


def test_the_digest_sees_every_bit_dtype_shape_and_name():
  kernel = jnp.arange(4.0)
  same = make_state(params={"unet": {"kernel": jnp.array([0.0, 1, 2, 3])}})
  assert digest(make_state()) == digest(same)
  others = [
    {"unet": {"kernel": kernel.at[3].add(2.0**-20)}},
    {"unet": {"kernel": kernel.astype(jnp.bfloat16)}},
    {"unet": {"kernel": kernel.reshape(2, 2)}},
    {"unet": {"weight": kernel}},
    {"unet": {"kernel": jnp.array([-0.0, 1, 2, 3])}},
  ]
  digests = {digest(make_state(params=params)) for params in others}
  assert len(digests) == 5 and digest(make_state()) not in digests
