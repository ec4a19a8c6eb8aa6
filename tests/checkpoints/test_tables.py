"""checkpoints/tables.py on tables made by hand."""

import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from photochat_jax.checkpoints import files, llama, tables
from photochat_jax.checkpoints.tables import Row, Table, TableError
from photochat_jax.models.llama import Llama, LlamaConfig
from photochat_jax.ops import partition


def shapes(**paths):
  """{'a__b': shape} as the nested dict of what `jax.eval_shape` gives."""
  return partition.unflatten(
    {
      path.replace("__", "/"): jax.ShapeDtypeStruct(shape, jnp.float32)
      for path, shape in paths.items()
    }
  )


TABLE = Table(
  name="the toy",
  rows=(
    Row("table/embedding", "model.table.weight"),
    Row(
      r"layers/(\w+)/kernel", r"model.h.{layer}.\1.weight", tables.DENSE, (0, 1)
    ),
    Row(r"layers/(\w+)/bias", r"model.h.{layer}.\1.bias", layers=(0, 1)),
    Row("out/kernel", lambda path: f"head.{path[:3]}.weight", tables.CONV),
  ),
  aliases=((r"^(table|h)\.", r"model.\1."), (r"\.gamma$", ".weight")),
  ignored=(r"model\.position_ids", r"other\..*"),
)
SHAPES = shapes(
  table__embedding=(6, 4),
  layers__fc__kernel=(2, 3, 5),
  layers__fc__bias=(2, 5),
  out__kernel=(1, 2, 3, 4),
)
THEIRS = {
  "model.table.weight": (6, 4),
  "model.h.0.fc.weight": (5, 3),
  "model.h.1.fc.weight": (5, 3),
  "model.h.0.fc.bias": (5,),
  "model.h.1.fc.bias": (5,),
  "head.out.weight": (4, 3, 1, 2),
}


def draw(changes=None, dtype=np.float32):
  """Tensors as the toy's files hold them; None takes one out."""
  rng = np.random.default_rng(0)
  return {
    key: rng.standard_normal(shape).astype(dtype)
    for key, shape in (THEIRS | (changes or {})).items()
    if shape is not None
  }


def test_entries_name_every_tensor_with_its_shape():
  found = tables.entries(TABLE, SHAPES)
  assert {key: entry.shape for key, entry in found.items()} == THEIRS
  assert all(entry.key == key for key, entry in found.items())
  assert {
    key: (entry.path, entry.index) for key, entry in found.items()
  } == {
    "model.table.weight": ("table/embedding", None),
    "model.h.0.fc.weight": ("layers/fc/kernel", 0),
    "model.h.1.fc.weight": ("layers/fc/kernel", 1),
    "model.h.0.fc.bias": ("layers/fc/bias", 0),
    "model.h.1.fc.bias": ("layers/fc/bias", 1),
    "head.out.weight": ("out/kernel", None),
  }


def test_values_stand_where_the_rows_say():
  tensors = draw()
  params = tables.read(TABLE, SHAPES, tensors)
  chosen = partition.flatten(params)
  assert chosen.keys() == partition.flatten(SHAPES).keys()
  np.testing.assert_array_equal(
    chosen["table/embedding"], tensors["model.table.weight"]
  )
  for layer in range(2):
    for i in range(3):
      for o in range(5):
        assert (
          chosen["layers/fc/kernel"][layer, i, o]
          == tensors[f"model.h.{layer}.fc.weight"][o, i]
        )
    np.testing.assert_array_equal(
      chosen["layers/fc/bias"][layer], tensors[f"model.h.{layer}.fc.bias"]
    )
  for o, i, h, w in np.ndindex(4, 3, 1, 2):
    assert (
      chosen["out/kernel"][h, w, i, o]
      == tensors["head.out.weight"][o, i, h, w]
    )
  written = dict(tables.write(TABLE, jax.tree.map(jnp.asarray, params)))
  assert list(written) == list(tables.entries(TABLE, SHAPES))
  for key, array in tensors.items():
    np.testing.assert_array_equal(written[key], array)


def test_layers_may_be_any_numbers_in_any_order():
  table = Table("odd", (Row("x/scale", "h.{layer}.g", layers=(5, 1, 3)),))
  tensors = {f"h.{i}.g": np.full(2, i, np.float32) for i in (1, 3, 5)}
  params = tables.read(table, shapes(x__scale=(3, 2)), tensors)
  np.testing.assert_array_equal(params["x"]["scale"], [[5, 5], [1, 1], [3, 3]])
  written = list(tables.write(table, params))
  assert [(key, value[0]) for key, value in written] == [
    ("h.5.g", 5),
    ("h.1.g", 1),
    ("h.3.g", 3),
  ]


def test_keys_of_other_versions_and_foreign_keys_are_understood():
  tensors = draw()
  old = {
    key.removeprefix("model.").replace("fc.weight", "fc.gamma"): value
    for key, value in tensors.items()
  }
  assert old.keys() & tensors.keys() == {"head.out.weight"}
  old["position_ids"] = old["other.x"] = np.zeros(1)
  with pytest.raises(TableError) as caught:
    tables.read(TABLE, SHAPES, old)
  assert caught.value.extra == ("position_ids",)
  old["model.position_ids"] = old.pop("position_ids")
  jax.tree.map(
    np.testing.assert_array_equal,
    tables.read(TABLE, SHAPES, old),
    tables.read(TABLE, SHAPES, tensors),
  )


@pytest.mark.parametrize(
  "changes,kind,keys",
  [
    ({"model.h.1.fc.bias": None}, "missing", ("model.h.1.fc.bias",)),
    ({"model.h.2.fc.bias": (5,)}, "extra", ("model.h.2.fc.bias",)),
    (
      {"model.h.0.fc.weight": (3, 5)},
      "misshapen",
      (("model.h.0.fc.weight", (3, 5), (5, 3)),),
    ),
  ],
)
def test_a_single_fault_is_told_as_it_is(changes, kind, keys):
  with pytest.raises(TableError, match="of the toy do not fit") as caught:
    tables.read(TABLE, SHAPES, draw(changes))
  told = {
    name: getattr(caught.value, name)
    for name in ("missing", "extra", "misshapen")
  }
  assert told.pop(kind) == keys
  assert not any(told.values())


def test_all_faults_are_told_at_once():
  tensors = draw(
    {
      "model.table.weight": None,
      "model.h.0.fc.weight": (5, 4),
      "model.h.1.fc.weight": (5, 4),
      "model.h.0.fc.bias": (5, 1),
      "model.h.7.fc.bias": (5,),
      "model.h.8.fc.bias": (5,),
      "lm_head": (2,),
      "h.1.fc.bias": (5,),
    }
  )

  def unread(name):
    raise AssertionError(f"{name} was read")

  # Shapes are told without reading a value.
  tensors = {
    key: files.Tensor(
      key, "I64" if key.startswith("head") else "F32", value.shape, unread
    )
    for key, value in tensors.items()
  }
  with pytest.raises(TableError) as caught:
    tables.read(TABLE, SHAPES, tensors)
  error = caught.value
  assert error.missing == ("model.table.weight",)
  assert error.extra == ("model.h.7.fc.bias", "model.h.8.fc.bias", "lm_head")
  assert error.misshapen == (
    ("model.h.0.fc.weight", (5, 4), (5, 3)),
    ("model.h.1.fc.weight", (5, 4), (5, 3)),
    ("model.h.0.fc.bias", (5, 1), (5,)),
  )
  assert str(error) == (
    "The weights of the toy do not fit its config: "
    "1 missing: model.table.weight; "
    "3 unknown: model.h.*.fc.bias (2), lm_head; "
    "3 of another shape: "
    "model.h.*.fc.weight (2) are [5, 4] and must be [5, 3]; "
    "model.h.0.fc.bias are [5, 1] and must be [5]; "
    "head.out.weight stored as I64, but only float32, float16 and bfloat16 can "
    "be read, nothing quantised; "
    "h.1.fc.bias there a second time by another name; "
    "take both whole from one checkpoint."
  )


@pytest.mark.parametrize(
  "rows,message",
  [
    ((), "0 rows of the table of bad match a/bias; exactly one must"),
    (
      (Row("a/.*", "x"), Row(".*/scale", "y"), Row(".*/bias", "z")),
      "2 rows of the table of bad match a/bias; exactly one must",
    ),
    # The whole path must match.
    ((Row("a/bia", "x"),), "0 rows"),
    (
      (Row("a/bias", "x", layers=range(3)),),
      "a/bias has 2 layers and its row in the table of bad names 3",
    ),
    ((Row(r"a/\w+", "x"),), "a/scale and a/bias both come from x"),
    # The layers of one parameter, whose number the key leaves out.
    ((Row("a/bias", "x", layers=(0, 1)),), "a/bias and a/bias both come"),
  ],
)
def test_mistakes_in_a_table_are_told(rows, message):
  with pytest.raises(ValueError, match=message):
    tables.entries(Table("bad", rows), shapes(a__scale=(2, 3), a__bias=(2, 3)))


@pytest.mark.parametrize(
  "ours,theirs",
  [
    ("conv_in/kernel", "conv_in.weight"),
    ("time_embedding/linear_1/bias", "time_embedding.linear_1.bias"),
    (
      "up_blocks_0/attentions_2/transformer_blocks_1/attn1/to_out_0/kernel",
      "up_blocks.0.attentions.2.transformer_blocks.1.attn1.to_out.0.weight",
    ),
    (
      "mid_block/attentions_0/transformer_blocks_0/ff/net_0/proj/kernel",
      "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
    ),
    ("up_blocks_10/resnets_0/norm/scale", "up_blocks.10.resnets.0.norm.weight"),
  ],
)
def test_names_of_modules_differ_in_punctuation(ours, theirs):
  assert tables.module_key(ours) == theirs


def test_dtypes_are_kept_widened_or_as_asked():
  half = draw(dtype=np.float16)
  kept = tables.read(TABLE, SHAPES, half)
  assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {
    np.dtype(np.float16)
  }
  # One layer is wider: so is the parameter, and no other.
  mixed = {**half, "model.h.1.fc.bias": np.full(5, 1 / 3, np.float32)}
  got = partition.flatten(tables.read(TABLE, SHAPES, mixed))
  assert got.pop("layers/fc/bias").dtype == np.float32
  assert {leaf.dtype for leaf in got.values()} == {np.dtype(np.float16)}
  # Neither of the two half precisions holds the other.
  mixed["model.h.1.fc.bias"] = mixed["model.h.1.fc.bias"].astype(
    ml_dtypes.bfloat16
  )
  bias = tables.read(TABLE, SHAPES, mixed)["layers"]["fc"]["bias"]
  assert bias.dtype == np.float32
  np.testing.assert_array_equal(
    bias, [mixed[f"model.h.{i}.fc.bias"].astype(np.float32) for i in range(2)]
  )
  wide = tables.read(TABLE, SHAPES, half, "float32")
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x, y.astype(np.float32)),
    wide,
    kept,
  )
  narrow = tables.read(TABLE, SHAPES, draw(), ml_dtypes.bfloat16)
  want = draw()["model.table.weight"].astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(narrow["table"]["embedding"], want)


def test_each_parameter_is_placed_once_and_whole():
  tensors, placed = draw(), []

  def place(path, array):
    placed.append(path)
    return path, array.copy()

  params = tables.read(TABLE, SHAPES, tensors, place=place)
  assert placed == list(partition.flatten(SHAPES))
  want = partition.flatten(tables.read(TABLE, SHAPES, tensors))
  for path, array in want.items():
    *parents, leaf = path.split("/")
    node = params
    for parent in parents:
      node = node[parent]
    assert node[leaf][0] == path
    np.testing.assert_array_equal(node[leaf][1], array)


def peak_of(function):
  """Bytes allocated at the worst moment of a call, beyond those before it."""
  tracemalloc.start()
  before, _ = tracemalloc.get_traced_memory()
  result = function()
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  return peak - before, result


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_reading_holds_one_tensor_besides_the_parameters(stored, tmp_path):
  config = LlamaConfig(
    vocab_size=40_002,
    hidden_size=32,
    intermediate_size=8192,
    num_hidden_layers=6,
    num_attention_heads=1,
    num_key_value_heads=1,
  )
  wanted = jax.eval_shape(
    Llama(config).init,
    jax.random.key(0),
    jnp.zeros((1, 2, 32)),
    jnp.zeros((1, 2), jnp.int32),
    jnp.zeros((1, 2), jnp.int32),
  )["params"]
  table = llama.table(config, 40_000, fresh=(40_000, 40_001))
  sizes = {k: e.shape for k, e in tables.entries(table, wanted).items()}
  files.write_tensors(
    tmp_path, ((key, np.ones(shape, stored)) for key, shape in sizes.items())
  )
  tensors = files.Tensors(tmp_path)
  largest = max(np.prod(shape) for shape in sizes.values())
  largest *= np.dtype(stored).itemsize
  assert largest > 2e6

  def read(**options):
    return lambda: tables.read(table, wanted, tensors, np.float32, **options)

  peak, params = peak_of(read())
  tree = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert params["layers"]["mlp"]["up_proj"]["kernel"].nbytes > 5e6
  assert tree < peak < tree + 1.3 * largest
  # What is placed elsewhere leaves the host at once.
  peak, _ = peak_of(read(place=lambda path, array: None))
  most = max(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert peak < most + 1.3 * largest
