"""Torch state dicts of CLIP text, UNet and VAE as our nested parameters."""

import re

import numpy as np
import torch


def randomise(module, seed, kernel_scale=1.0, loud=None):
  """Draws every parameter anew: fresh ones hide bugs behind zeros and ones.

  A small `kernel_scale` makes activations so faint that the epsilons of
  normalisations show; names that hold `loud` are not scaled.
  """
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      scale = 1.0 if loud and loud in name else kernel_scale
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim > 1:
        fan_in = parameter[0].numel()
        parameter.copy_(noise * fan_in**-0.5 * scale)
      else:
        bias_scale = 1.0
        if name.endswith("bias") and "norm" not in name:
          bias_scale = scale
        parameter.copy_((0.3 * noise + 0.5) * bias_scale)


def nested(flat):
  """{'a/b': leaf} -> {'a': {'b': leaf}}."""
  tree = {}
  for path, leaf in flat.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def convert_leaf(key, tensor):
  """One torch tensor -> (our leaf name, array); kernels are transposed."""
  array = tensor.detach().numpy()
  if key.endswith(".bias"):
    return "bias", array
  if "embedding." in key and "time" not in key:
    return "embedding", array
  if array.ndim == 1:
    return "scale", array
  if array.ndim == 4 and array.shape[2:] == (1, 1):
    array = array[:, :, 0, 0]
  if array.ndim == 4:
    return "kernel", array.transpose(2, 3, 1, 0)
  return "kernel", array.T


def conv_params(state):
  """State dict of a diffusers UNet or autoencoder -> our parameters."""
  flat = {}
  for key, tensor in state.items():
    leaf, array = convert_leaf(key, tensor)
    module = re.sub(r"\.(\d+)", r"_\1", key.rsplit(".", 1)[0])
    flat[f"{module.replace('.', '/')}/{leaf}"] = array
  return nested(flat)


def clip_text_params(state):
  """State dict of a transformers `CLIPTextModel` -> our parameters."""
  flat, layers = {}, {}
  for key, tensor in state.items():
    key = re.sub(r"^(text_model\.)?((embeddings|encoder)\.)?", "", key)
    leaf, array = convert_leaf(key, tensor)
    module = key.rsplit(".", 1)[0].replace(".", "/")
    numbered = re.fullmatch(r"layers/(\d+)/(.*)", module)
    if numbered:
      path = f"layers/{numbered[2]}/{leaf}"
      layers.setdefault(path, {})[int(numbered[1])] = array
    else:
      flat[f"{module}/{leaf}"] = array
  for path, by_layer in layers.items():
    flat[path] = np.stack([by_layer[i] for i in sorted(by_layer)])
  return nested(flat)
