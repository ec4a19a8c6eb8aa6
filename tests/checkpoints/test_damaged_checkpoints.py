"""Damage to a checkpoint is told, and never restored."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.checkpoints import manager

MODEL = {"unet": {"layers_per_block": 1}}
KINDS = ("flip", "truncate", "zero", "delete", "swap")


def make_state(seed):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  params = {
    "unet": {"kernel": draw(40, 30), "bias": draw(30)},
    "vae": {"kernel": draw(50).astype(jnp.bfloat16)},
  }
  return {
    "step": jnp.int32(seed),
    "params": params,
    "opt_state": {"mu": {"kernel": draw(40, 30)}},
  }


def flat(tree):
  return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def opened(folder, keep=3):
  return manager.Checkpoints(folder, keep, MODEL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  with opened(folder) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, make_state(step), {"stage": f"s{step}"})
  return folder


@pytest.fixture
def run(whole, tmp_path):
  shutil.copytree(whole, tmp_path / "run")
  return tmp_path / "run"


def damage(file, kind, rng, others):
  """Damages a file; returns whether it changed."""
  content = file.read_bytes()
  if kind == "delete":
    file.unlink()
    return True
  if kind == "swap":
    other = others[rng.integers(len(others))]
    changed = other.read_bytes()
    other.write_bytes(content)
  elif not content:
    return False
  elif kind == "flip":
    changed = bytearray(content)
    changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
  elif kind == "truncate":
    changed = content[: rng.integers(len(content))]
  else:
    start, stop = sorted(rng.integers(0, len(content) + 1, 2))
    changed = content[:start] + bytes(stop - start) + content[stop:]
  file.write_bytes(changed)
  return bytes(changed) != content


def damage_all(whole, copy):
  """Damages every file in every way: (cases, how many were noticed)."""
  step = whole / "checkpoints" / "3"
  files = [p.relative_to(step) for p in step.rglob("*") if p.is_file()]
  expected, cases, noticed = flat(make_state(3)), 0, 0
  rng = np.random.default_rng(0)
  where = copy / "checkpoints" / "3"
  for kind in KINDS:
    for name in sorted(files):
      shutil.rmtree(copy, ignore_errors=True)
      shutil.copytree(step, where)
      others = [where / other for other in files if other != name]
      if not damage(where / name, kind, rng, others):
        continue
      cases += 1
      try:
        with opened(copy) as checkpoints:
          meta = checkpoints.read_meta(3)
          got = checkpoints.restore(make_state(0), 3)
      except manager.CheckpointDamaged as error:
        noticed += 1
        assert "step 3" in str(error) and "\n" not in str(error)
      else:
        assert flat(got) == expected, (kind, name)
        assert meta["stage"] == "s3", (kind, name)
  return cases, noticed


def test_no_damage_of_a_file_is_silent(whole, tmp_path):
  """In a process of its own.

  Where one array cannot be read, Orbax leaves the reading of the others
  behind, which warns whenever it is collected.
  """
  done = subprocess.run(
    [sys.executable, __file__, whole, tmp_path / "run"],
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    check=False,
  )
  assert done.returncode == 0, done.stderr[-5000:]
  cases, noticed = json.loads(done.stdout.splitlines()[-1])
  assert cases >= 80 and noticed >= cases / 2, (cases, noticed)


def change_value(folder, step):
  """Flips a bit of a weight in a checkpoint whose files are all sound."""
  other = folder.parent / "other"
  state = make_state(step)
  kernel = np.array(state["params"]["unet"]["kernel"])
  kernel.view(np.int32)[0, 0] ^= 1
  state["params"]["unet"]["kernel"] = jnp.asarray(kernel)
  with opened(other) as checkpoints:
    checkpoints.save(step, state, {})
  weights = folder / "checkpoints" / str(step) / "weights"
  shutil.rmtree(weights)
  shutil.move(other / "checkpoints" / str(step) / "weights", weights)
  shutil.rmtree(other)


def test_one_bit_in_sound_files_is_named(run):
  change_value(run, 3)
  with opened(run) as checkpoints:
    with pytest.raises(
      manager.CheckpointDamaged, match="step 3 .*: params/unet/kernel are not"
    ):
      checkpoints.restore(make_state(0), 3)
    part = {"params/unet/kernel": jax.ShapeDtypeStruct((40, 30), jnp.float32)}
    with pytest.raises(manager.CheckpointDamaged, match="unet/kernel are not"):
      checkpoints.read_part(part)
    checkpoints.read_part(
      {"params/unet/bias": jax.ShapeDtypeStruct((30,), jnp.float32)}
    )
    # Nor is it hidden by a cast.
    wanted = make_state(0)
    wanted["params"]["unet"]["bias"] = jnp.zeros(30, jnp.bfloat16)
    with pytest.raises(manager.CheckpointDamaged, match="unet/kernel are not"):
      checkpoints.restore(wanted, 3, cast=True)
    checkpoints.restore(make_state(0), 2)


@pytest.mark.parametrize("name", ["weights/_METADATA", "meta/metadata"])
def test_a_truncated_file_is_named(run, name):
  file = run / "checkpoints" / "3" / name
  file.write_bytes(file.read_bytes()[:10])
  with opened(run) as checkpoints:
    with pytest.raises(manager.CheckpointDamaged, match="step 3 .*damaged"):
      checkpoints.restore(make_state(0))


@pytest.mark.parametrize("key", ["stage", "model", "metrics"])
def test_what_is_beside_the_arrays_is_checked(run, key):
  file = run / "checkpoints" / "3" / "meta" / "metadata"
  meta = json.loads(file.read_text())
  file.write_text(json.dumps({**meta, key: "other"}))
  with opened(run) as checkpoints:
    with pytest.raises(manager.CheckpointDamaged, match="meta is not what was"):
      checkpoints.read_meta(3)


def test_an_earlier_versions_checkpoint_is_not_called_damaged(run):
  file = run / "checkpoints" / "3" / "meta" / "metadata"
  meta = json.loads(file.read_text())
  del meta["checksum"]
  meta["digests"] = dict.fromkeys(meta["digests"], "0" * 64)
  file.write_text(json.dumps(meta))
  with opened(run) as checkpoints:
    with pytest.raises(manager.CheckpointError, match="earlier version"):
      checkpoints.restore_newest(lambda step: make_state(0))
    assert checkpoints.steps() == [1, 2, 3]


def test_a_damaged_one_is_put_aside_and_the_one_before_goes_on(run):
  change_value(run, 3)
  (run / "checkpoints" / "3.damaged").mkdir()
  (run / "checkpoints" / "2" / "meta" / "metadata").write_text("{")
  with opened(run) as checkpoints:
    state, step, told = checkpoints.restore_newest(lambda step: make_state(0))
    assert step == 1 and flat(state) == flat(make_state(1))
    assert "step 3 " in told[0] and "params/unet/kernel are not" in told[0]
    assert "kept as 3.damaged.2" in told[0]
    assert "step 2 " in told[1] and "kept as 2.damaged," in told[1]
    assert checkpoints.steps() == [1]
    # Their steps are made and saved again.
    for step in (2, 3):
      assert checkpoints.save(step, make_state(10 + step), {})
    checkpoints.wait()
  names = {path.name for path in (run / "checkpoints").iterdir()}
  assert names == {"1", "2", "2.damaged", "3", "3.damaged", "3.damaged.2"}
  with opened(run) as checkpoints:
    state, step, told = checkpoints.restore_newest(lambda step: make_state(0))
  assert (step, told) == (3, []) and flat(state) == flat(make_state(13))


def test_where_all_are_damaged_nothing_begins_anew(run):
  for step in (1, 2, 3):
    shutil.rmtree(run / "checkpoints" / str(step) / "weights")
  for _ in range(2):  # A launcher starts the command again.
    with opened(run) as checkpoints:
      with pytest.raises(
        manager.CheckpointDamaged, match="Every .*step 1"
      ) as it:
        checkpoints.restore_newest(lambda step: make_state(0))
      assert "step 3" in str(it.value) and checkpoints.steps() == [1, 2, 3]
  assert isinstance(it.value, manager.CheckpointError)


def test_what_the_process_may_not_read_is_not_damaged(run, monkeypatch):
  def refuse(self, *_, **__):
    raise PermissionError("no")

  with opened(run) as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(type(checkpoints.directory), "read_text", refuse)
      with pytest.raises(PermissionError):
        checkpoints.restore_newest(lambda step: make_state(0))
    assert checkpoints.steps() == [1, 2, 3]


if __name__ == "__main__":
  print(json.dumps(damage_all(*map(pathlib.Path, sys.argv[1:]))))
