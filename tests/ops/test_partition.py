"""The regex tables against what their rows say."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from photochat_jax.ops import partition

PARAMS = {
  "language_model": {
    "layers": {"self_attn": {"q_proj": {"kernel": 1, "bias": 2}}},
    "norm": {"scale": 3},
  },
  "unet": {"conv_in": {"kernel": 4}},
}


def test_flatten_joins_the_keys_of_any_tree():
  assert partition.flatten(PARAMS) == {
    "language_model/layers/self_attn/q_proj/kernel": 1,
    "language_model/layers/self_attn/q_proj/bias": 2,
    "language_model/norm/scale": 3,
    "unet/conv_in/kernel": 4,
  }
  assert partition.flatten(({"a": 5}, [6, 7])) == {"0/a": 5, "1/0": 6, "1/1": 7}


names = st.text("abcxyz_09", min_size=1, max_size=3)
trees = st.dictionaries(
  names,
  st.recursive(
    st.integers(),
    lambda children: st.dictionaries(names, children, min_size=1, max_size=3),
    max_leaves=8,
  ),
  max_size=4,
)


@given(trees)
def test_unflatten_is_the_inverse_of_flatten(tree):
  assert partition.unflatten(partition.flatten(tree)) == tree


def test_the_first_row_that_matches_wins():
  table = ((".*/bias", "a"), ("language_model/.*", "b"), (".*", "c"))
  assert partition.match(table, PARAMS) == {
    "language_model": {
      "layers": {"self_attn": {"q_proj": {"kernel": "b", "bias": "a"}}},
      "norm": {"scale": "b"},
    },
    "unet": {"conv_in": {"kernel": "c"}},
  }
  turned = partition.match(tuple(reversed(table)), PARAMS)
  assert set(jax.tree.leaves(turned)) == {"c"}


def test_a_regex_must_match_the_whole_path():
  with pytest.raises(ValueError, match="unet/conv_in/kernel"):
    partition.match((("unet", 1), ("language_model.*", 2)), PARAMS)


def test_every_parameter_without_a_row_is_named():
  with pytest.raises(ValueError) as caught:
    partition.match(((".*/kernel", 1),), PARAMS)
  assert "language_model/layers/self_attn/q_proj/bias" in str(caught.value)
  assert "language_model/norm/scale" in str(caught.value)
  assert "unet/conv_in/kernel" not in str(caught.value)


def test_values_may_be_trees_and_leaves_only_shapes():
  shapes = jax.eval_shape(lambda: {"a": {"b": jnp.zeros((2, 3))}})
  assert partition.match((("a/b", ("x", None)),), shapes) == {
    "a": {"b": ("x", None)}
  }


def test_select_keeps_the_order_and_divides_completely():
  paths = list(partition.flatten(PARAMS))
  matched, others = partition.select(("unet/.*", ".*/bias"), paths)
  assert matched == [
    "language_model/layers/self_attn/q_proj/bias",
    "unet/conv_in/kernel",
  ]
  assert others == [
    "language_model/layers/self_attn/q_proj/kernel",
    "language_model/norm/scale",
  ]


def test_a_regex_that_matches_nothing_is_an_error():
  with pytest.raises(ValueError, match="'unett/.*' matches no parameter"):
    partition.select((".*/bias", "unett/.*"), partition.flatten(PARAMS))


def constrained(shape, *axes):
  """Where `constrain` puts an array on a mesh of 2 x 3 x 4 devices."""
  mesh = jax.sharding.AbstractMesh((2, 3, 4), ("data", "fsdp", "tensor"))
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.make_jaxpr(lambda x: partition.constrain(x, *axes))(
      jax.ShapeDtypeStruct(shape, "float32")
    )
  (equation,) = traced.eqns
  return tuple(equation.params["sharding"].spec)


def test_an_activation_is_divided_by_rows_and_where_it_is_said():
  rows = ("data", "fsdp")
  assert constrained((12, 5, 8)) == (rows, None, None)
  assert constrained((12, 5, 8), "tensor") == (rows, None, "tensor")
  # What does not divide is left whole: 7 rows by 6, 6 numbers by 4.
  assert constrained((7, 5, 6), "tensor") == (None, None, None)


def test_without_a_mesh_nothing_is_said():
  x = jnp.ones((2, 3))
  assert partition.constrain(x) is x
