"""Checkpoints: what is saved comes back bit for bit, or a sentence says why.

Damage is in `test_damaged_checkpoints.py`.
"""

import json
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pair
import pytest

from photochat_jax.checkpoints import checks, manager
from photochat_jax.state import TrainState, digest

MODEL = {"unet": {"block_out_channels": (8, 16), "layers_per_block": 1}}


def make_state(seed=0):
  rng = np.random.default_rng(seed)
  params = {
    "unet": {
      "kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
      "bias": jnp.asarray(rng.normal(size=3), jnp.float32),
    },
    "vae": {"kernel": jnp.asarray(rng.normal(size=2), jnp.bfloat16)},
  }
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  trained = {"unet": params["unet"]}
  _, opt_state = tx.update(trained, tx.init(trained), trained)
  return TrainState(
    step=jnp.int32(7),
    params=params,
    opt_state=opt_state,
    ema=trained,
    latent_scale=jnp.float32(0.5),
  )


def flat(tree):
  leaves, _ = jax.tree_util.tree_flatten(tree)
  return [(leaf.dtype, np.asarray(leaf).tobytes()) for leaf in leaves]


@pytest.fixture
def saved(tmp_path):
  with manager.Checkpoints(tmp_path, keep=2, model=MODEL) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, make_state(step), {"stage": f"s{step}"})
  return tmp_path


def test_a_state_comes_back_bit_for_bit_in_another_manager(saved):
  state = make_state(3)
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    got = checkpoints.restore(jax.eval_shape(lambda: state))
  assert jax.tree.structure(got) == jax.tree.structure(state)
  assert flat(got) == flat(state)
  assert digest(got) == digest(state) != digest(make_state(2))


def test_only_the_newest_are_kept_and_each_can_be_read(saved):
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    assert checkpoints.steps() == [2, 3] and checkpoints.latest() == 3
    assert checkpoints.read_meta()["stage"] == "s3"
    assert checkpoints.read_meta(2)["stage"] == "s2"
    got = checkpoints.restore(make_state(), step=2)
    assert flat(got) == flat(make_state(2))
    with pytest.raises(manager.CheckpointError, match=r"step 1 .*\[2, 3\]"):
      checkpoints.restore(make_state(), step=1)


def test_saving_a_step_again_changes_nothing(saved):
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    assert not checkpoints.save(3, make_state(9), {"stage": "again"})
    assert checkpoints.read_meta()["stage"] == "s3"


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
  state = make_state()
  expected = flat(state)
  with manager.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    jax.tree.map(lambda leaf: leaf.delete(), state)
    checkpoints.wait()
    assert flat(checkpoints.restore(make_state(5))) == expected


def test_inference_reads_no_optimiser(saved):
  (item,) = (saved / "checkpoints" / "3").glob("optimizer")
  item.rename(saved / "elsewhere")
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    got = checkpoints.restore(make_state().weights())
  assert flat(got) == flat(make_state(3).weights())


def test_a_state_without_an_optimiser_can_be_saved(tmp_path):
  state = make_state().weights()
  with manager.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    assert flat(checkpoints.restore(state)) == flat(state)
    with pytest.raises(manager.CheckpointError, match="opt_state/.* missing"):
      checkpoints.restore(make_state())


def test_another_dtype_is_an_error_that_names_the_leaf(saved):
  state = make_state()
  params = {**state.params, "vae": {"kernel": jnp.zeros(2, jnp.float32)}}
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    with pytest.raises(
      manager.CheckpointError,
      match=r"params/vae/kernel is bfloat16\[2\] there and float32\[2\] here",
    ):
      checkpoints.restore(state.replace(params=params))


def test_missing_extra_and_misshapen_leaves_are_all_named(saved):
  state = make_state()
  params = {
    "unet": {"kernel": jnp.zeros((4, 4)), "gate": jnp.zeros(1)},
    "vae": state.params["vae"],
  }
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    with pytest.raises(manager.CheckpointError) as caught:
      checkpoints.restore(state.replace(params=params))
  assert "params/unet/gate is missing" in str(caught.value)
  assert "params/unet/bias is not wanted" in str(caught.value)
  assert "params/unet/kernel is float32[4, 3] there" in str(caught.value)
  assert "\n" not in str(caught.value)


def test_the_optimiser_of_another_stage_is_an_error(saved):
  state = make_state()
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  other = state.replace(opt_state=tx.init({"vae": state.params["vae"]}))
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    with pytest.raises(manager.CheckpointError, match="mu/vae.* is missing"):
      checkpoints.restore(other)


def test_a_checkpoint_of_another_config_names_the_field(saved):
  other = {"unet": {"block_out_channels": (8, 32), "layers_per_block": 1}}
  with manager.Checkpoints(saved, model=other) as checkpoints:
    for read in (
      checkpoints.read_meta,
      lambda: checkpoints.restore(make_state()),
    ):
      with pytest.raises(
        manager.CheckpointError,
        match=r"model.unet.block_out_channels is \[8, 16\] there and \[8, 32\]",
      ):
        read()


def test_an_empty_folder_says_what_to_do(tmp_path):
  with manager.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() is None
    with pytest.raises(manager.CheckpointError, match="train first"):
      checkpoints.restore(make_state())


def test_the_difference_of_settings():
  saved = json.loads(json.dumps({"a": {"b": (1, (2, 3))}, "c": None}))
  same = {"a": {"b": (1, (2, 3))}, "c": None}
  assert checks.first_difference(saved, same) is None
  found = checks.first_difference(saved, {**same, "d": 5})
  assert found == ("model.d", None, 5)
  changed = {"a": {"b": (1, (2, 4))}, "c": None}
  assert checks.first_difference(saved, changed)[0] == "model.a.b"


def test_settings_of_the_computation_may_differ(saved):
  other = {"unet": {**MODEL["unet"], "dtype": "bfloat16", "remat": "full"}}
  other["scan_unroll"] = 4
  other["vae"] = {"tile_size": 64}
  with manager.Checkpoints(saved, model=other) as checkpoints:
    with pytest.raises(manager.CheckpointError, match=r"model\.vae is None"):
      checkpoints.read_meta()
  del other["vae"]
  with manager.Checkpoints(saved, model=other) as checkpoints:
    assert flat(checkpoints.restore(make_state())) == flat(make_state(3))
  assert checks.first_difference({"tile_size": 1}, {"tile_size": 2}) is None


def test_restoring_puts_arrays_where_the_shapes_say(saved):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
    make_state(),
  )
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    got = checkpoints.restore(abstract)
  assert all(leaf.sharding == device for leaf in jax.tree.leaves(got))
  chex.assert_trees_all_equal(got, make_state(3))


def test_the_dtypes_that_were_saved(saved):
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    dtypes = checkpoints.dtypes()
  assert dtypes["params/vae/kernel"] == jnp.bfloat16
  assert dtypes["params/unet/bias"] == jnp.float32


def test_a_cast_rounds_what_was_checked(saved):
  state = make_state(3)
  wanted = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape,
      jnp.bfloat16 if leaf.dtype == jnp.float32 else leaf.dtype,
    ),
    state,
  )
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    with pytest.raises(manager.CheckpointError, match="float32.* there and"):
      checkpoints.restore(wanted)
    got = checkpoints.restore(wanted, cast=True)
    # An integer is no number of another precision.
    step = state.replace(step=jnp.float32(0))
    with pytest.raises(manager.CheckpointError, match="step is int32"):
      checkpoints.restore(step, cast=True)
  expected = jax.tree.map(
    lambda leaf, want: np.asarray(leaf).astype(want.dtype), state, wanted
  )
  assert flat(got) == flat(expected)


def test_the_newest_with_its_step_or_nothing(saved, tmp_path):
  asked = []

  def abstract_of(step):
    asked.append(step)
    return make_state()

  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    state, step, damaged = checkpoints.restore_newest(abstract_of)
  assert (step, damaged, asked) == (3, [], [3])
  assert flat(state) == flat(make_state(3))
  with manager.Checkpoints(tmp_path / "none") as checkpoints:
    assert checkpoints.restore_newest(abstract_of) is None
  other = {"unet": {**MODEL["unet"], "layers_per_block": 2}}
  with manager.Checkpoints(saved, model=other) as checkpoints:
    with pytest.raises(manager.CheckpointError, match="of another config"):
      checkpoints.restore_newest(abstract_of)
    assert checkpoints.steps() == [2, 3]


def test_a_part_is_read_alone(saved):
  path = "params/unet/kernel"
  wanted = {path: jax.ShapeDtypeStruct((4, 3), jnp.float32)}
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    for step in (2, 3):
      got = checkpoints.read_part(wanted, step)
      assert list(got) == [path] and isinstance(got[path], np.ndarray)
      np.testing.assert_array_equal(
        got[path], make_state(step).params["unet"]["kernel"]
      )
    for leaf, what in (
      (jax.ShapeDtypeStruct((4, 3), jnp.bfloat16), "is float32"),
      (jax.ShapeDtypeStruct((3, 4), jnp.float32), "is float32"),
    ):
      with pytest.raises(manager.CheckpointError, match=what):
        checkpoints.read_part({path: leaf})
    with pytest.raises(manager.CheckpointError, match="a/b is missing"):
      checkpoints.read_part({**wanted, "a/b": leaf})


def test_going_back_removes_what_came_after(saved):
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    checkpoints.save(4, make_state(4), {})
    checkpoints.delete_after(3)
    assert checkpoints.steps() == [3]
    assert not (saved / "checkpoints" / "4").exists()
    assert checkpoints.save(4, make_state(5), {})
    checkpoints.wait()
    assert flat(checkpoints.restore(make_state())) == flat(make_state(5))
    checkpoints.delete_after(0)
    assert checkpoints.steps() == []


def test_the_best_are_kept_beside_the_newest(tmp_path):
  """Also by a manager that did not save them."""
  state = {"params": {"a": jnp.ones(3)}}
  values = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: float("nan"), 6: 9.0, 7: 8.0}
  seen = []
  for steps in ((1, 2, 3, 4), (5, 6, 7)):
    with manager.Checkpoints(tmp_path, 2, None, 2, "dev/loss") as checkpoints:
      for step in steps:
        value = values[step]
        metrics = {"dev/other": 0.0} | (
          {} if value is None else {"dev/loss": value}
        )
        checkpoints.save(step, state, {}, metrics)
        checkpoints.wait()
        seen.append(checkpoints.steps())
  assert seen == [
    [1],
    [1, 2],
    [2, 3],
    [2, 3, 4],
    [2, 3, 4, 5],
    [2, 3, 5, 6],
    [2, 3, 6, 7],
  ]


MEMORY = """
import sys
import jax, jax.numpy as jnp
from photochat_jax.checkpoints import digests, manager

def memory(name):
  with open("/proc/self/status") as status:
    return 1024 * next(int(x.split()[1]) for x in status if name in x)

def draw(key):
  keys = enumerate(jax.random.split(key, 16))
  return {str(i): jax.random.normal(k, (2560, 2560)) for i, k in keys}

state = jax.block_until_ready({"params": jax.jit(draw)(jax.random.key(0))})
size = sum(x.nbytes for x in jax.tree.leaves(state))
with manager.Checkpoints(sys.argv[1]) as checkpoints:
  checkpoints.save(0, {"params": {"a": jnp.ones(3)}}, {})
  checkpoints.wait()
  open("/proc/self/clear_refs", "w").write("5")  # The peak begins anew.
  before = memory("VmRSS")
  checkpoints.save(1, state, {})
  checkpoints.wait()
  print((memory("VmHWM") - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_holds_little_more_than_one_copy(tmp_path):
  """Of 400 MB, on the CPU, where a copy on the host is another one."""
  done = subprocess.run(
    [sys.executable, "-c", MEMORY, str(tmp_path)],
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert 0 < float(done.stdout.split()[-1]) <= 1.3


def test_two_processes_skip_what_one_cannot_read(tmp_path):
  script = pathlib.Path(__file__).with_name("saving_together.py")
  address = pair.free_address()
  said = pair.run(lambda number: (script, address, number, tmp_path))
  x = np.random.default_rng(3).normal(size=(8, 64)).astype("float32")
  with manager.Checkpoints(tmp_path / "alone") as checkpoints:
    checkpoints.save(1, {"params": {"x": x}}, {})
    checkpoints.wait()
    expected = checkpoints.read_meta()["digests"]["params/x"]
  for (out, _), what in zip(
    said, ("processes 1 cannot read it", "a bad block"), strict=True
  ):
    step, same, told, steps, left, digest = json.loads(out.splitlines()[-1])
    assert (step, same, steps, left) == (2, True, [1, 2], [1])
    assert len(told) == 1 and what in told[0] and "3.damaged" in told[0]
    assert digest == expected
