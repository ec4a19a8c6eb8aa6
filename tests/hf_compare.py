"""What tests against torch's originals share: how numbers are compared."""

import re

import numpy as np
import pytest

from photochat_jax.checkpoints import tables
from photochat_jax.ops import partition

torch = pytest.importorskip("torch")

# Compiling is nearly all the time of these tests: do it half as well.
FAST = {"xla_backend_optimization_level": 0}


def channels_first(x):
  """Our photos or latents [B, h, w, C] as a torch tensor [B, C, h, w]."""
  return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def channels_last(x):
  """A torch tensor [B, C, h, w] as numpy [B, h, w, C]."""
  return x.detach().permute(0, 2, 3, 1).numpy()


def cotangent(shape, seed):
  """What outputs are multiplied with to have one number to differentiate."""
  draws = np.random.default_rng(seed).standard_normal(shape)
  return (draws / np.sqrt(draws.size)).astype(np.float32)


def arrays(model, grad=False):
  """A torch module's state, or the gradients of its parameters, as numpy.

  A parameter which got no gradient has zeros.
  """
  if not grad:
    state = model.state_dict()
  else:
    state = {
      name: torch.zeros_like(value) if value.grad is None else value.grad
      for name, value in model.named_parameters()
    }
  return {key: value.detach().numpy().copy() for key, value in state.items()}


def gradients(pair):
  """The gradients in the original of a `hf_models.Pair`, as ours would be."""
  return tables.read(pair.table, pair.shapes, arrays(pair.oracle, grad=True))


def assert_outputs_equal(got, want, atol=1e-4):
  """Every output is the original's, which is neither faint nor huge."""
  assert got.shape == want.shape
  assert 0.1 < np.std(want) < 30
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)


# A key's bias adds the same to all scores of a query; softmax does not see it.
_BLIND = r".*(k_proj|key|to_k)/bias"


def assert_gradients_equal(got, want, atol=1e-4):
  """Every gradient is the original's, and there is one to speak of.

  Each leaf must agree to `atol` and to a thousandth of its largest number, so
  that parts with faint gradients are compared as well.
  """
  got, want = partition.flatten(got), partition.flatten(want)
  assert got.keys() == want.keys()
  for path, wanted in want.items():
    assert got[path].shape == wanted.shape, path
    largest = np.abs(wanted).max()
    assert largest > 1e-4 or re.fullmatch(_BLIND, path), path
    np.testing.assert_allclose(
      got[path],
      wanted,
      rtol=0,
      atol=min(atol, 1e-3 * largest + 1e-6),
      err_msg=path,
    )


def assert_same(got, want):
  """Two trees of arrays are equal bit for bit, dtypes too."""
  got, want = partition.flatten(got), partition.flatten(want)
  assert got.keys() == want.keys()
  for path, wanted in want.items():
    assert got[path].dtype == wanted.dtype, path
    assert got[path].shape == wanted.shape, path
    assert got[path].tobytes() == wanted.tobytes(), path
