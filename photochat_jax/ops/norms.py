"""Root-mean-square normalisation (arXiv:1910.07467); others are Flax's."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax


class RMSNorm(nn.Module):
  """HF's `LlamaRMSNorm`; computed in float32, returned in `dtype`.

  Attributes:
    epsilon: added to the mean square.
    dtype: of the result.
  """

  epsilon: float = 1e-5
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[..., D] -> [..., D]."""
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x = x * lax.rsqrt(mean_square + self.epsilon)
    return (x * scale).astype(self.dtype)
