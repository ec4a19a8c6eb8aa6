"""Checkpoints: what is saved comes back bit for bit, or a sentence says why."""

import hashlib
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from photochat_jax.checkpoints import manager
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


@pytest.mark.parametrize("name", ["weights/_METADATA", "meta/metadata"])
def test_a_damaged_checkpoint_is_named(saved, name):
  file = saved / "checkpoints" / "3" / name
  file.write_bytes(file.read_bytes()[:10])
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    with pytest.raises(manager.CheckpointError, match="step 3 .*damaged"):
      checkpoints.restore(make_state())


def test_the_difference_of_settings():
  saved = json.loads(json.dumps({"a": {"b": (1, (2, 3))}, "c": None}))
  same = {"a": {"b": (1, (2, 3))}, "c": None}
  assert manager.first_difference(saved, same) is None
  found = manager.first_difference(saved, {**same, "d": 5})
  assert found == ("model.d", None, 5)
  changed = {"a": {"b": (1, (2, 4))}, "c": None}
  assert manager.first_difference(saved, changed)[0] == "model.a.b"


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


def rewrite(folder, step, change):
  """Saves changed weights in the place of a step's, the digests as before.

  A flipped bit inside Orbax's compressed chunks may or may not be noticed by
  the decompression; values that differ without any other sign must be.
  """
  with manager.Checkpoints(folder, model=MODEL) as checkpoints:
    meta = checkpoints.read_meta(step)
    state = checkpoints.restore(jax.eval_shape(lambda: make_state(step)), step)
  other = folder / "other"
  with manager.Checkpoints(other, model=MODEL) as checkpoints:
    checkpoints.save(step, change(state), meta)
  weights = folder / "checkpoints" / str(step) / "weights"
  shutil.rmtree(weights)
  shutil.move(other / "checkpoints" / str(step) / "weights", weights)


def test_values_that_are_not_what_was_saved_are_named(saved):
  def change(state):
    kernel = np.array(state.params["unet"]["kernel"])
    kernel.view(np.int32)[0, 0] ^= 1  # The last bit.
    unet = {**state.params["unet"], "kernel": jnp.asarray(kernel)}
    return state.replace(params={**state.params, "unet": unet})

  rewrite(saved, 3, change)
  abstract = jax.eval_shape(lambda: make_state(3))
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    with pytest.raises(
      manager.CheckpointError, match="step 3 .*damaged: params/unet/kernel are"
    ):
      checkpoints.restore(abstract)
    checkpoints.restore(abstract, 2)


def test_the_digests_are_those_of_the_bytes(saved):
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    digests = checkpoints.read_meta(3)["digests"]
  kernel = np.asarray(make_state(3).params["vae"]["kernel"])
  expected = hashlib.sha256(b"bfloat16 (2,) " + kernel.tobytes()).hexdigest()
  assert digests["params/vae/kernel"] == expected
  assert "step" in digests and any("opt_state" in path for path in digests)


def test_the_dtypes_that_were_saved(saved):
  with manager.Checkpoints(saved, model=MODEL) as checkpoints:
    dtypes = checkpoints.dtypes()
  assert dtypes["params/vae/kernel"] == jnp.bfloat16
  assert dtypes["params/unet/bias"] == jnp.float32
