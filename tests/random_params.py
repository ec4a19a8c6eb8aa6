"""Parameters of a module, every one random: fresh ones hide bugs."""

import jax
import numpy as np


def draw(shapes, seed=0):
  """Draws parameters of telling size.

  Args:
    shapes: nested dict of what has a shape, as `jax.eval_shape` gives it.
    seed: of the draws.

  Returns:
    float32 arrays: kernels with the standard deviation 1 / sqrt(fan in), so
    that activations stay near 1, scales round 1, biases round 0.
  """
  rng = np.random.default_rng(seed)

  def one(path, leaf):
    noise = rng.standard_normal(leaf.shape)
    if path[-1].key == "kernel":
      # A convolution's (h, w, in, out); or (in, out), perhaps of all layers.
      fan_in = leaf.shape[:-1] if leaf.ndim == 4 else leaf.shape[-2:-1]
      noise *= np.prod(fan_in) ** -0.5
    elif path[-1].key == "scale":
      noise = 1 + 0.3 * noise
    elif path[-1].key == "bias":
      noise *= 0.3
    return noise.astype(np.float32)

  return jax.tree_util.tree_map_with_path(one, shapes)
