"""Every parameter has a place on every mesh."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from photochat_jax import sharding
from photochat_jax.config import ConfigError, StageConfig
from photochat_jax.state import TrainState


class FakeMesh:
  """A mesh's sizes, for what only looks at them."""

  def __init__(self, **shape):
    self.shape = shape


MESH = FakeMesh(data=2, fsdp=4, tensor=2)


@pytest.mark.parametrize("rows, accumulate", [(12, 1), (8, 2), (20, 2)])
def test_rows_that_do_not_divide_are_refused_with_the_stage(rows, accumulate):
  stage = StageConfig(name="joint", batch_size=rows, accumulate=accumulate)
  with pytest.raises(ConfigError, match=f"joint.batch_size is {rows}; .* of 8"):
    sharding.check_rows(stage, MESH)
  sharding.check_rows(dataclasses.replace(stage, batch_size=16), MESH)


@pytest.mark.parametrize(
  "axes, shape, expected",
  [
    (("fsdp", "tensor"), (8, 6), P("fsdp", "tensor")),
    # Aligned to the last dimensions: a layer axis stays whole.
    (("fsdp", "tensor"), (32, 8, 6), P(None, "fsdp", "tensor")),
    (("fsdp", "tensor"), (3, 3, 8, 6), P(None, None, "fsdp", "tensor")),
    # What does not divide stays whole.
    (("fsdp", "tensor"), (6, 6), P(None, "tensor")),
    (("fsdp", "tensor"), (8, 3), P("fsdp", None)),
    ((None, "fsdp"), (77, 8), P(None, "fsdp")),
    # A rule longer than the array loses its first axes.
    (("fsdp", "tensor"), (6,), P("tensor")),
    ((), (8, 8), P(None, None)),
  ],
)
def test_rules_are_aligned_and_divide(axes, shape, expected):
  assert sharding.spec_of(axes, shape, MESH) == expected


def test_one_device_holds_everything():
  mesh = sharding.make_mesh()
  assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
  params = {"unet": {"conv_in": {"kernel": jnp.ones((3, 3, 4, 8))}}}
  placed = sharding.shardings(params, mesh)
  assert placed["unet"]["conv_in"]["kernel"].is_fully_replicated


def test_an_unknown_parameter_is_named():
  with pytest.raises(ValueError, match="unet/magic"):
    sharding.shardings({"unet": {"magic": jnp.ones(2)}}, sharding.make_mesh())


@pytest.mark.parametrize(
  "sizes", [(2, 1, 1), (-1, 2, 1), (-1, -1, 1), (0, 1, 1)]
)
def test_a_mesh_that_does_not_fit_is_an_error(sizes):
  with pytest.raises(ValueError, match="does not fit 1 devices"):
    sharding.make_mesh(*sizes)


def check_every_part():
  """Run with 8 devices: the default run's state on several meshes."""
  from photochat_jax import config
  from photochat_jax.models.photochat import PhotoChat

  assert jax.device_count() == 8
  model = PhotoChat(config.RunConfig().model)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  opt_state = jax.eval_shape(optax.adam(1e-3).init, shapes)
  state = TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32),
    params=shapes,
    opt_state=opt_state,
    ema={"unet": shapes["unet"]},
    latent_scale=jax.ShapeDtypeStruct((), jnp.float32),
  )
  for sizes in ((8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2), (-1, 4, 1)):
    mesh = sharding.make_mesh(*sizes)
    placed = sharding.state_shardings(state, mesh)
    whole = local = 0
    for leaf, place in zip(
      jax.tree.leaves(state), jax.tree.leaves(placed), strict=True
    ):
      shard = place.shard_shape(leaf.shape)  # Raises if it does not divide.
      whole += np.prod(leaf.shape)
      local += np.prod(shard)
    for moment in ("mu", "nu"):
      moments = getattr(placed.opt_state[0], moment)
      assert jax.tree.leaves(moments) == jax.tree.leaves(placed.params)
    assert jax.tree.leaves(placed.ema) == jax.tree.leaves(placed.params["unet"])
    # Nearly all of the state is divided by fsdp and tensor together.
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert whole / ways <= local <= 1.15 * whole / ways, (sizes, local / whole)


def check_values():
  """Run with 8 devices: a sharded state and batch hold the same numbers."""
  mesh = sharding.make_mesh(2, 2, 2)
  kernel = jnp.arange(64.0).reshape(8, 8)
  state = TrainState(
    step=jnp.int32(1),
    params={"vae": {"conv": {"kernel": kernel}}},
    opt_state=(),
    ema={},
    latent_scale=jnp.float32(1),
  )
  placed = sharding.shard_state(state, mesh)
  got = placed.params["vae"]["conv"]["kernel"]
  assert got.sharding.spec == P("fsdp", "tensor")
  np.testing.assert_array_equal(got, kernel)
  rows = np.arange(24, dtype=np.int32).reshape(8, 3)
  batch = sharding.shard_batch({"tokens": rows, "mask": rows[:, 0] > 5}, mesh)
  np.testing.assert_array_equal(batch["tokens"], rows)
  assert batch["tokens"].addressable_shards[0].data.shape == (2, 3)
  with jax.set_mesh(mesh):
    total = jax.jit(lambda x, w: (x @ w[:3]).sum())(batch["tokens"], got)
  np.testing.assert_allclose(total, (rows @ np.asarray(kernel)[:3]).sum())
  with pytest.raises(ValueError, match="6 rows cannot be divided over 4"):
    sharding.shard_batch({"tokens": rows[:6]}, mesh)


def test_on_eight_devices(monkeypatch, request):
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  path = [str(request.path.parent), str(request.path.parents[1])]
  code = (
    f"import sys; sys.path[:0] = {path}; import test_sharding as t; "
    "t.check_every_part(); t.check_values(); print('both')"
  )
  program = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert program.stdout == "both\n", program.stderr
