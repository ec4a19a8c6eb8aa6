"""ops/norms.py against transformers and float64 numpy."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.ops import norms


def test_equals_llama_rms_norm():
  torch = pytest.importorskip('torch')
  from transformers.models.llama import modeling_llama

  rng = np.random.default_rng(0)
  x, scale = rng.standard_normal((2, 3, 16)), rng.standard_normal(16)
  x, scale = x.astype(np.float32), scale.astype(np.float32)
  reference = modeling_llama.LlamaRMSNorm(16, eps=0.1)
  reference.weight.data = torch.from_numpy(scale)
  want = reference(torch.from_numpy(x)).detach().numpy()
  got = norms.RMSNorm(epsilon=0.1).apply({'params': {'scale': scale}}, x)
  chex.assert_trees_all_close(got, want, atol=1e-5)


def test_bfloat16_is_rounded_once():
  # Squares of 2^9 and their sum over 512 places overflow bfloat16's 8 bits.
  rng = np.random.default_rng(1)
  x = jnp.asarray(512 + 8 * rng.standard_normal((1, 512)), jnp.bfloat16)
  scale = rng.standard_normal(512).astype(np.float32)
  got = norms.RMSNorm(dtype=jnp.bfloat16).apply({'params': {'scale': scale}}, x)
  exact = np.asarray(x, np.float64)
  exact = exact / np.sqrt(np.mean(exact**2) + 1e-5) * scale
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-8)
