"""A store holds what the networks of a run make of its photos, and no other."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pair
import pytest
import random_params
import small_run
import toy_agent
from PIL import Image

from photochat_jax import encoders, precompute, record
from photochat_jax.checkpoints.manager import CheckpointError, Checkpoints
from photochat_jax.data import images, moments, photochat, synthetic
from photochat_jax.data.moments import MomentsError
from photochat_jax.models import vit
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.state import TrainState

encode_photo = jax.jit(PhotoChat.encode_photo, static_argnums=0)
ROOT = pathlib.Path(__file__).parents[1]
SIZES = ((8, 8), (16, 9), (9, 16), (31, 8), (5, 5), (64, 48), (10, 12))


def make_run(workdir, params=None, step=0, ema=None):
  """A workdir with a checkpoint, as a trained run leaves it."""
  run = small_run.run_config()
  model = PhotoChat(run.model)
  params = params or draw_params()
  unet = {"unet": params["unet"]}
  state = TrainState(
    step=jnp.int32(step),
    params=params,
    opt_state=(),
    ema={**unet, **(ema or {})},
    latent_scale=jnp.float32(1),
  )
  record.write(run, str(workdir))
  with Checkpoints(workdir, model=run.as_dict()["model"]) as saved:
    saved.save(step, state, {})
  return run, model, params


@functools.cache
def draw_params(seed=0):
  """Every number random, those of the encoders and all others."""
  model = PhotoChat(toy_agent.config(768, 768, 24))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return random_params.draw(shapes, seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("run"))
  return workdir, *make_run(workdir)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Photo id -> file: noise of all shapes, and a file that is no photo."""
  folder = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  found = {}
  for i, (width, height) in enumerate(SIZES):
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    path = folder / f"{i}.png"
    Image.fromarray(pixels).save(path)
    found[f"train/{i}"] = path
  found["train/page"] = folder / "page.jpg"
  found["train/page"].write_bytes(b"<html>")
  return found


def whole(photos):
  return [photo_id for photo_id in photos if photo_id != "train/page"]


def close(got, want):
  """Equal but for the rounding to float16 and the order of sums.

  A float16 has 11 binary digits, so a number is rounded by at most 2^-11 of
  it, and a very small one by 2^-25. What batches of another size do to
  float32 sums is far below: 1e-5.
  """
  want = np.asarray(want)
  bound = 2.0**-11 * np.abs(want) + 2.0**-25 + 1e-5
  assert got.shape == want.shape
  assert (np.abs(got - want) <= bound).all(), np.abs(got - want).max()
  assert np.abs(want).max() > 0.1  # Zeros would tell nothing.


@pytest.fixture(scope="module")
def made(trained, photos, tmp_path_factory):
  """A store of moments, with what was told of making it."""
  out = tmp_path_factory.mktemp("out")
  report = precompute.precompute(
    trained[0], photos, out, batch_size=3, photos_per_shard=4
  )
  return out, report


def test_moments_are_the_autoencoders(trained, photos, made):
  _, run, model, params = trained
  store = moments.open_store(made[0], *encoders.identity(run, params))
  assert sorted(store) == sorted(whole(photos))
  for photo_id in store:
    pixels = images.load_photo(photos[photo_id], model.photo_shape[0])
    for flipped in (False, True):
      # One at a time, mirrored as `data.pipeline` does it.
      seen = pixels[:, ::-1] if flipped else pixels
      mean, logvar = encode_photo(model, params, seen[None])
      got = store.get(photo_id, flipped)
      c = mean.shape[-1]
      close(got[..., :c], mean[0])
      close(got[..., c:], logvar[0])


def test_a_mirror_images_moments_are_not_mirrored_moments(made, photos):
  store = moments.open_store(made[0])
  for photo_id in whole(photos):
    mirrored = store.get(photo_id)[:, ::-1]
    assert np.abs(mirrored - store.get(photo_id, True)).max() > 0.1


def test_features_are_the_vits(trained, photos, tmp_path):
  workdir, run, model, params = trained
  report = precompute.precompute(workdir, photos, tmp_path, "features", 4)
  assert report.encoded == len(SIZES)
  store = moments.open_store(
    tmp_path, *encoders.identity(run, params, "features"), "features"
  )

  @jax.jit
  def see(pixels):
    vision = model.parts["vision_model"]
    own = {"params": params["vision_model"]}
    return vision.apply(own, vit.normalise(pixels[None]))[0]

  for photo_id in whole(photos):
    pixels = images.load_vision(photos[photo_id], run.model.vision.image_size)
    for flipped in (False, True):
      seen = pixels[:, ::-1] if flipped else pixels
      close(store.get(photo_id, flipped), see(seen))


def test_damaged_photos_are_named_and_counted(made, photos):
  report = made[1]
  assert report.encoded == len(SIZES) and report.there == 0
  assert list(report.broken) == ["train/page"]
  assert "damaged: train/page: " in str(report)
  assert "is not a photo" in str(report) and str(photos["train/page"]) in str(
    report
  )


def test_only_what_is_new_is_encoded(trained, photos, made, monkeypatch):
  decoded = []
  decode = images.decode

  def counted(content, name):
    decoded.append(pathlib.Path(name).name)
    return decode(content, name)

  monkeypatch.setattr(images, "decode", counted)
  out, workdir = made[0], trained[0]
  again = precompute.precompute(workdir, photos, out, batch_size=3)
  # A damaged photo may have been fetched anew, so it is looked at again.
  assert decoded == ["page.jpg"]
  assert (again.encoded, again.there) == (0, len(SIZES))


def test_a_replaced_photo_is_encoded_again(trained, photos, tmp_path):
  workdir, _, model, params = trained
  mine = {"a": tmp_path / "a.png", "b": photos["train/1"]}
  mine["a"].write_bytes(photos["train/0"].read_bytes())
  out = tmp_path / "out"
  precompute.precompute(workdir, mine, out)
  old = moments.open_store(out).get("a")
  mine["a"].write_bytes(photos["train/5"].read_bytes())
  report = precompute.precompute(workdir, mine, out)
  assert (report.encoded, report.there) == (1, 1)
  store = moments.open_store(out)
  assert store.changed(mine) == []
  pixels = images.load_photo(mine["a"], model.photo_shape[0])
  mean, _ = encode_photo(model, params, pixels[None])
  close(store.get("a")[..., : mean.shape[-1]], mean[0])
  assert np.abs(store.get("a") - old).max() > 0.1


def test_two_hosts_make_what_one_makes(trained, photos, made, tmp_path):
  reports = [
    precompute.precompute(
      trained[0], photos, tmp_path, batch_size=3, host=host, hosts=2
    )
    for host in range(2)
  ]
  assert [r.encoded + len(r.broken) for r in reports] == [4, 4]
  # Neither looked at the other's.
  assert [r.there for r in reports] == [0, 0]
  both, one = moments.open_store(tmp_path), moments.open_store(made[0])
  assert sorted(both) == sorted(one)
  for photo_id in one:
    for flipped in (False, True):
      got, want = both.get(photo_id, flipped), one.get(photo_id, flipped)
      np.testing.assert_allclose(got, want, atol=1e-5, rtol=2.0**-10)


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from photochat_jax import precompute
from photochat_jax.data import moments_files
finish, done = moments_files.Writer.finish, []
def finish_twice(writer):
  if len(done) == 2:
    os.kill(os.getpid(), signal.SIGKILL)
  done.append(finish(writer))
moments_files.Writer.finish = finish_twice
import jax
assert jax.device_count() == 2
precompute.precompute({run!r}, {photos!r}, {out!r}, batch_size=1,
                      photos_per_shard=2)
"""


def test_a_killed_run_goes_on(trained, photos, made, tmp_path, monkeypatch):
  """Killed as the third shard of two photos would be finished.

  The killed run divides its batches over two devices, this one has one.
  """
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
  code = KILLED.format(
    path=[str(ROOT)],
    run=trained[0],
    photos={i: str(path) for i, path in photos.items()},
    out=str(tmp_path),
  )
  program = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert program.returncode == -signal.SIGKILL, program.stderr
  assert len(moments.open_store(tmp_path)) == 4
  assert len(list(tmp_path.glob("moments/*.tmp"))) == 1
  report = precompute.precompute(trained[0], photos, tmp_path)
  assert (report.there, report.encoded) == (4, len(SIZES) - 4)
  assert not list(tmp_path.glob("moments/*.tmp"))
  resumed, one = moments.open_store(tmp_path), moments.open_store(made[0])
  for photo_id in one:
    got, want = resumed.get(photo_id, True), one.get(photo_id, True)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=2.0**-10)


def flip_a_bit(params, part, path):
  """The parameters with the last bit of one number flipped."""
  params = jax.tree.map(np.copy, params)
  node = params[part]
  for name in path.split("/"):
    node = node[name]
  node.reshape(-1).view(np.uint32)[-1] ^= 1
  return params


def test_other_weights_are_refused(trained, photos, made, tmp_path):
  _, run, _, params = trained
  other = flip_a_bit(params, "vae", "quant_conv/kernel")
  with pytest.raises(MomentsError, match="made by other weights"):
    moments.open_store(made[0], *encoders.identity(run, other))
  make_run(tmp_path, other)
  with pytest.raises(MomentsError, match="made by other weights"):
    precompute.precompute(str(tmp_path), photos, made[0])
  # The decoder makes no moments.
  same = flip_a_bit(params, "vae", "decoder/conv_in/kernel")
  moments.open_store(made[0], *encoders.identity(run, same))


def test_bfloat16_weights_are_their_values(trained, photos, tmp_path):
  """A run converted in bfloat16, and one that trains from it in float32."""
  half = {
    part: jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), tree)
    if part == "vae"
    else tree
    for part, tree in trained[3].items()
  }
  run, model, _ = make_run(tmp_path / "run", half)
  precompute.precompute(str(tmp_path / "run"), photos, tmp_path)
  wide = jax.tree.map(lambda x: x.astype(np.float32), {"vae": half["vae"]})
  store = moments.open_store(tmp_path, *encoders.identity(run, wide))
  pixels = images.load_photo(photos["train/5"], model.photo_shape[0])
  mean, _ = encode_photo(model, wide, pixels[None])
  close(store.get("train/5")[..., : mean.shape[-1]], mean[0])


def test_what_encodes_alone_is_read(trained, tmp_path):
  workdir, run, _, params = trained
  read = precompute.read_part(run, workdir, "moments")
  assert set(read) == {"vae"} and set(read["vae"]) == {"encoder", "quant_conv"}
  want = {name: params["vae"][name] for name in read["vae"]}
  jax.tree.map(np.testing.assert_array_equal, read["vae"], want)
  # Averages, where there are any, are the weights that a next stage has.
  averaged = draw_params(1)["vae"]
  make_run(tmp_path, params, ema={"vae": averaged})
  read = precompute.read_part(run, str(tmp_path), "moments")
  want = {name: averaged[name] for name in read["vae"]}
  jax.tree.map(np.testing.assert_array_equal, read["vae"], want)


def test_a_damaged_checkpoint_is_refused(tmp_path):
  run, _, _ = make_run(tmp_path)
  path = tmp_path / "checkpoints/0/meta/metadata"
  meta = json.loads(path.read_text())
  # As if the array had changed, and not its digest.
  meta["digests"]["params/vae/quant_conv/bias"] = "0" * 64
  path.write_text(json.dumps(meta))
  with pytest.raises(CheckpointError, match="is damaged"):
    precompute.read_part(run, str(tmp_path), "moments")
  precompute.read_part(run, str(tmp_path), "features")
  with pytest.raises(CheckpointError, match="no checkpoint"):
    precompute.read_part(run, str(tmp_path / "none"), "moments")


def test_no_photo_at_all_is_an_error(trained, photos, tmp_path):
  page = {"train/page": photos["train/page"], "gone": tmp_path / "gone.jpg"}
  with pytest.raises(MomentsError, match="None of 2 photos can be used"):
    precompute.precompute(trained[0], page, tmp_path)


def test_the_command(trained, tmp_path):
  data = synthetic.generate(0, 6, 2, 2, tmp_path / "data", 8, 0.25)
  next((pathlib.Path(data) / "photos").rglob("*.jpg")).unlink()
  found, missing = precompute.find_photos("photochat", data)
  assert missing == 1
  # Every split's: those that training, samples and evaluation ask for.
  splits = {
    turn.photo.id
    for split in ("train", "dev", "test")
    for dialogue in photochat.read_split(data, split)[0]
    for turn in dialogue.turns
    if turn.photo and turn.photo.path
  }
  assert set(found) == splits

  def run(*arguments):
    return subprocess.run(
      [
        sys.executable,
        str(ROOT / "tools" / "precompute.py"),
        f"--workdir={trained[0]}",
        f"--out={tmp_path / 'out'}",
        f"--path={data}",
        *arguments,
      ],
      capture_output=True,
      text=True,
      check=False,
      cwd=ROOT,
      env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

  program = run("--features")
  assert program.returncode == 0, program.stderr
  assert f"{len(found)} photos have a file, 1 have none." in program.stdout
  assert f"{len(found)}/{len(found)}" in program.stdout  # The bar.
  for kind in ("moments", "features"):
    assert f"{kind}: {len(found)} photos encoded" in program.stdout
    store = moments.open_store(tmp_path / "out", kind=kind)
    assert store.missing(found) == []
    assert f"--path={data}" in store.about.command("NEW")
  program = run("--dataset=photochat", "--host=2", "--hosts=2")
  assert program.returncode == 1
  assert program.stderr.startswith("precompute: --host=2 --hosts=2 must be")
  assert program.stderr.count("\n") == 1


CONNECTED = """
import sys
sys.path[:0] = {path!r}
import jax
host = int(sys.argv[1])
jax.distributed.initialize({address!r}, 2, host)
from jax.experimental import multihost_utils
from photochat_jax import encoders, precompute, record, sharding
precompute.precompute({run!r}, {photos!r}, {out!r}, host=host, hosts=2)
run = record.read({run!r})
params = precompute.read_part(run, {run!r}, "moments")
mesh = sharding.make_mesh(1, 2, 1)
divided = jax.tree.map(
  lambda array, where: jax.make_array_from_callback(
    array.shape, where, lambda index: array[index]
  ),
  params,
  sharding.shardings(params, mesh),
)
assert not all(x.is_fully_addressable for x in jax.tree.leaves(divided))
print(*encoders.identity(run, divided))
"""


@pytest.mark.slow
def test_two_connected_processes(trained, photos, made, tmp_path):
  """As a pod runs it, with parameters that lie on both."""
  code = CONNECTED.format(
    path=[str(ROOT)],
    address=pair.free_address(),
    run=trained[0],
    photos={i: str(path) for i, path in photos.items()},
    out=str(tmp_path),
  )
  told = pair.run(lambda host: ("-c", code, host), timeout=600)
  names = " ".join(encoders.identity(trained[1], trained[3]))
  assert all(out.splitlines()[-1] == names for out, _ in told)
  store = moments.open_store(tmp_path)
  assert sorted(store) == sorted(moments.open_store(made[0]))
