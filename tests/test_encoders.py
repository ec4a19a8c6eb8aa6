"""The names of the networks whose results are kept."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import random_params
import small_run

from photochat_jax import encoders
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.ops import partition


@functools.cache
def draw_params():
  model = PhotoChat(small_run.run_config().model)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return random_params.draw(shapes)


@pytest.mark.parametrize("kind", ["moments", "features"])
def test_another_preparation_is_another_identity(kind):
  run, params = small_run.run_config(), draw_params()
  weights, transform = encoders.identity(run, params, kind)

  def changed(**parts):
    """The identity with numbers of some parts changed."""
    for part, numbers in parts.items():
      config = dataclasses.replace(getattr(run.model, part), **numbers)
      parts[part] = config
    model = dataclasses.replace(run.model, **parts)
    other = dataclasses.replace(run, model=model)
    return encoders.identity(other, params, kind)

  got = changed(unet={"sample_size": 8}, vision={"image_size": 16})
  assert got[0] == weights and got[1] != transform
  # Numbers that change what the same parameters do.
  got = changed(
    vae={"norm_num_groups": 2}, vision={"num_attention_heads": 1}
  )
  assert got[0] != weights and got[1] == transform
  # Numbers of the computation, and what the result is multiplied by.
  numbers = {"dtype": "bfloat16", "remat": "full"}
  assert (weights, transform) == changed(
    vae={**numbers, "scaling_factor": 2.0}, vision=numbers
  )


@pytest.mark.parametrize(
  "kind, tops",
  [
    ("moments", {"encoder", "quant_conv"}),
    (
      "features",
      {
        "class_embedding",
        "patch_embedding",
        "position_embedding",
        "post_layernorm",
        "layers",
      },
    ),
  ],
)
def test_every_parameter_that_is_applied_counts(kind, tops):
  """One bit of any of them is another network; nothing else is."""
  run, params = small_run.run_config(), draw_params()
  encoder = encoders.Encoder(PhotoChat(run.model), kind)
  name = encoders.identity(run, params, kind)
  for path, leaf in partition.flatten(params[encoder.part]).items():
    before = leaf.copy()
    leaf.reshape(-1).view(np.uint32)[-1] ^= 1
    got = encoders.identity(run, params, kind)
    assert (got != name) == (path.split("/")[0] in tops), path
    leaf[...] = before
  shapes = encoder.shapes()
  assert {path.split("/")[0] for path in shapes} == tops
  applied = encoder.applied(params[encoder.part])
  assert {p: x.shape for p, x in shapes.items()} == {
    p: x.shape for p, x in applied.items()
  }
