"""Two processes that know of each other, each with its slice of every batch."""

import pathlib

import numpy as np
import pair
import pytest
import small_run

from photochat_jax import inputs
from photochat_jax.data import photochat, pipeline

STEPS = (0, 3, 17)

# What a host does: joins the other, makes its rows, and hands them to jax as
# its part of a global array.
HOST = """
import sys
import numpy as np
import jax
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_platforms", "cpu")
address, host, folder = sys.argv[1:]
jax.distributed.initialize(address, 2, int(host))
from photochat_jax import sharding
from test_hosts import STEPS, make
assert jax.process_count() == 2
mesh = sharding.make_mesh()
source = make(folder, sharding.rows_here(mesh, 4))
found = {}
for step, batch in zip(range(max(STEPS) + 1), source.batches()):
  if step not in STEPS:
    continue
  for name, array in sharding.shard_batch(batch, mesh).items():
    (shard,) = array.addressable_shards
    assert array.shape[0] == 2 * batch[name].shape[0]
    found[f"{step}/{name}"] = np.asarray(shard.data)
    found[f"{step}/{name}/rows"] = np.arange(array.shape[0])[shard.index[0]]
np.savez(f"{folder}/host_{host}.npz", **found)
"""


def make(folder, rows=None):
  """Batches of a run with every kind of change to photos, and a mixture.

  Args:
    folder: where the two sets are.
    rows: of each batch of four, those to make; all by default.
  """
  run = small_run.run_config(data={"crop": True, "flip": True})
  sets = [
    photochat.read_split(pathlib.Path(folder) / name, "train")[0]
    for name in ("one", "two")
  ]
  return pipeline.Pipeline(
    sets[0],
    "dialogues",
    inputs.data_spec(run, 4),
    *inputs.load_tokenizers(run),
    seed=3,
    stage="talk",
    rows=rows,
    mix=[pipeline.Part("two", 0.7, sets[1])],
  )


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hosts")
  for name, seed in (("one", 0), ("two", 1)):
    small_run.synthetic.generate(seed, 12, 1, 1, folder / name, 8)
  address = pair.free_address()
  pair.run(lambda host: ("-c", HOST, address, host, folder), timeout=300)
  return folder, [np.load(folder / f"host_{host}.npz") for host in (0, 1)]


def test_the_union_of_two_hosts_is_the_batch_of_one_process(hosts):
  folder, found = hosts
  whole = make(folder)
  for step in STEPS:
    batch = whole.batch(step)
    for name, array in batch.items():
      rows = [host[f"{step}/{name}/rows"].tolist() for host in found]
      assert rows == [[0, 1], [2, 3]]  # disjoint, and all of them
      union = np.concatenate([host[f"{step}/{name}"] for host in found])
      assert union.dtype == array.dtype
      np.testing.assert_array_equal(union, array, name)


def test_no_example_is_on_both_hosts(hosts):
  _, found = hosts
  for step in STEPS:
    ids = []
    for host in found:
      said = host[f"{step}/caption_mask"].any(axis=-1)
      ids.append(set(host[f"{step}/example_id"][said].tolist()))
    assert ids[0] and ids[1] and not ids[0] & ids[1]
