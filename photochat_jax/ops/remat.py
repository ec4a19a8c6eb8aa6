"""What is kept for the backward pass, and what is computed again: by name.

| policy          | kept of each layer                                  |
|-----------------|-----------------------------------------------------|
| `none`          | everything                                          |
| `dots`          | results of matrix products                          |
| `dots_no_batch` | those of activations and weights, not attention's   |
| `full`          | nothing but the layer's input                       |

From top to bottom a step takes less memory and more time.
"""

import flax.linen as nn
import jax

POLICIES = {
  "none": jax.checkpoint_policies.everything_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


def remat(
  layer: type[nn.Module], policy: str, scanned: bool = False
) -> type[nn.Module]:
  """A layer's class which recomputes itself in the backward pass.

  Args:
    layer: a linen class.
    policy: one of `POLICIES`; with 'none' the class comes back as it is.
    scanned: whether it is the body of `nn.scan`, where XLA cannot merge the
      recomputation with the first pass and need not be kept from it.

  Raises:
    ValueError: there is no such policy.
  """
  if policy not in POLICIES:
    raise ValueError(f"remat={policy!r} must be one of {', '.join(POLICIES)}.")
  if policy == "none":
    return layer
  return nn.remat(layer, prevent_cse=not scanned, policy=POLICIES[policy])
