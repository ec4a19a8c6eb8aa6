"""What a training run carries from one step to the next."""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np

from photochat_jax.ops import partition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The whole state of a run, a pytree of arrays.

  Attributes:
    step: int32 scalar, updates made so far over all stages; it alone fixes
      the next batch.
    params: nested dict of every part's parameters, trainable or not.
    opt_state: the optimiser's state for the trainable parameters of the
      current stage, or () where nothing is trained.
    ema: moving averages, a subtree of `params` by part (`{}` without any).
    latent_scale: float32 scalar, the factor which brings the autoencoder's
      latents to unit variance.
  """

  step: Any
  params: Any
  opt_state: Any
  ema: Any
  latent_scale: Any

  def replace(self, **changes) -> "TrainState":
    """Returns a copy with the named fields changed."""
    return dataclasses.replace(self, **changes)

  def weights(self) -> "TrainState":
    """Returns the state without the optimiser: what inference needs."""
    return self.replace(opt_state=())


def digest(tree: Any) -> str:
  """Returns one sha256 over every leaf's path, dtype, shape and bytes.

  Two trees have the same digest exactly if they are equal bit for bit, so it
  tells whether a resumed run is the run which was never interrupted.

  Args:
    tree: a pytree of arrays which this process can read whole.
  """
  total = hashlib.sha256()
  for path, leaf in sorted(partition.flatten(tree).items()):
    array = np.asarray(jax.device_get(leaf))
    total.update(f"{path} {array.dtype} {array.shape}\n".encode())
    total.update(np.ascontiguousarray(array).tobytes())
  return total.hexdigest()
