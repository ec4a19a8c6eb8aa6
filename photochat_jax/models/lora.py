"""LoRA: a kernel that stays as it is, and a low-rank change to it.

Hu et al. (arXiv:2106.09685): a dense layer gives x W + s (x A) B, where A is
[in, r], B is [r, out], and s = alpha / r. LoRA exists exactly where the
parameters hold it: `Dense` looks for `lora_a`, `lora_b` and `lora_scale`
beside its `kernel`, and no flag has to agree with them. Where the kernel is
stacked over layers so are the three.

`lora_scale` is a leaf so that an adapter carries its own strength and layers
of one stack may differ in it; 0 says that a layer has none. Its gradient is
zero; what is trained is `.*/lora_(a|b)`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

from photochat_jax.ops import partition

LEAVES = ("lora_a", "lora_b", "lora_scale")
PARTS = ("language_model", "unet")
"""The parts of the model whose dense layers are `Dense`."""

# The query, key and value of the language model, as in the paper's code.
_PAPER = ("language_model/layers/self_attn/(q|k|v)_proj",)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Which dense layers get LoRA, and how much.

  Attributes:
    rank: r; 0 for no LoRA anywhere.
    alpha: the change is multiplied by alpha / rank.
    targets: regexes of the layers' whole paths in the parameters.
  """

  rank: int = 0
  alpha: float = 32.0
  targets: tuple[str, ...] = _PAPER

  def __post_init__(self):
    if self.rank < 0 or not self.alpha > 0:
      raise ValueError(
        f"LoRA's rank={self.rank} must be 0 (none) or more and its "
        f"alpha={self.alpha} more than 0."
      )


class Dense(nn.Dense):
  """A dense layer, with LoRA where its parameters hold it."""

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., in] -> [..., out], in the layer's dtype."""
    y = super().__call__(x)
    if not self.has_variable("params", "lora_a"):
      return y
    a, b, scale = (self.get_variable("params", name) for name in LEAVES)
    x, a, b = promote_dtype(x, a, b, dtype=self.dtype)
    # Scaled where the array is narrow, in the scale's own float32.
    low = ((x @ a) * lax.stop_gradient(scale)).astype(x.dtype)
    contract = (((low.ndim - 1,), (0,)), ((), ()))
    dot_general = self.dot_general or lax.dot_general
    return y + dot_general(low, b, contract, precision=self.precision)


def init(
  config: LoRAConfig, params: Mapping[str, Any], key: jax.Array
) -> dict[str, Any]:
  """Adds fresh LoRA, which changes no result: B is zero.

  A is uniform within 1 / sqrt(in), as in peft (Kaiming with a = sqrt(5)).

  Args:
    config: where; with rank 0 the parameters come back as they are.
    params: of the whole model; only shapes are looked at.
    key: of the random numbers.

  Returns:
    The parameters and the new leaves, float32.

  Raises:
    ValueError: a target matches no layer, or one that takes no LoRA.
  """
  leaves = partition.flatten(params)
  paths = _targets(config, leaves) if config.rank else []
  keys = jax.random.split(key, max(len(paths), 1))
  for path, layer_key in zip(paths, keys, strict=False):
    *stack, width, features = leaves[f"{path}/kernel"].shape
    bound = 1 / math.sqrt(width)
    leaves |= {
      f"{path}/lora_a": jax.random.uniform(
        layer_key, (*stack, width, config.rank), minval=-bound, maxval=bound
      ),
      f"{path}/lora_b": jnp.zeros((*stack, config.rank, features)),
      f"{path}/lora_scale": jnp.full(stack, config.alpha / config.rank),
    }
  return partition.unflatten(leaves)


def _targets(config: LoRAConfig, leaves: Mapping[str, Any]) -> list[str]:
  """The layers' paths, in the parameters' order."""
  layers = dict.fromkeys(path.rpartition("/")[0] for path in leaves)
  chosen = set()
  for regex in config.targets:
    matched = [path for path in layers if re.fullmatch(regex, path)]
    if not matched:
      raise ValueError(
        f"LoRA's target {regex!r} matches no layer; it must match a layer's "
        "whole path, such as language_model/layers/self_attn/q_proj."
      )
    for path in matched:
      kernel = leaves.get(f"{path}/kernel")
      # A dense kernel has two axes, or three with the layers'.
      if path.split("/")[0] not in PARTS or np.ndim(kernel) not in (2, 3):
        raise ValueError(
          f"LoRA's target {regex!r} matches {path}, which takes no LoRA; name "
          f"dense layers of {' or '.join(PARTS)} only."
        )
    chosen.update(matched)
  return [path for path in layers if path in chosen]


def merge(params: Mapping[str, Any]) -> dict[str, Any]:
  """Adds LoRA into the kernels: W + s A B, summed in float32.

  Args:
    params: of the whole model or of a part, with or without LoRA.

  Returns:
    Parameters without LoRA, the kernels in their own dtypes.
  """
  leaves = partition.flatten(params)
  for path in [path for path in leaves if path.endswith("/lora_a")]:
    a, b, scale = (
      jnp.asarray(leaves.pop(path.replace("lora_a", name)), jnp.float32)
      for name in LEAVES
    )
    path = path.replace("lora_a", "kernel")
    change = jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    kernel = jnp.asarray(leaves[path])
    merged = kernel.astype(jnp.float32) + scale[..., None, None] * change
    leaves[path] = merged.astype(kernel.dtype)
  return partition.unflatten(leaves)


def strip(params: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters without LoRA, the kernels as they are."""
  return partition.unflatten(
    {
      path: leaf
      for path, leaf in partition.flatten(params).items()
      if path.rpartition("/")[2] not in LEAVES
    }
  )


def alpha_of(scale: float, rank: int) -> float:
  """The roundest alpha for which alpha / rank is the float32 `scale`."""
  exact = float(scale) * rank
  for digits in range(16):
    if np.float32(round(exact, digits) / rank) == np.float32(scale):
      return round(exact, digits)
  return exact


def config_of(params: Mapping[str, Any]) -> LoRAConfig:
  """The config whose `init` would add the LoRA that is there.

  With it a run can go on training somebody's adapter.

  Args:
    params: arrays of the whole model.

  Raises:
    ValueError: the layers differ in rank or scale, as with no config.
  """
  leaves = partition.flatten(params)
  layers = [
    path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")
  ]
  if not layers:
    return LoRAConfig()
  ranks = {leaves[f"{layer}/lora_a"].shape[-1] for layer in layers}
  scales = np.concatenate(
    [np.ravel(leaves[f"{layer}/lora_scale"]) for layer in layers]
  )
  if len(ranks) > 1 or np.unique(scales).size > 1:
    raise ValueError(
      "The layers of this LoRA differ in rank or scale, which model.lora "
      "cannot say; merge it into the kernels instead."
    )
  rank = ranks.pop()
  return LoRAConfig(rank, alpha_of(scales[0], rank), tuple(layers))
