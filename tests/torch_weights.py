"""Weights and gradients of transformers' torch models in our form, for tests.

Every mapping takes a torch module and returns our nested dict of numpy
arrays, layers stacked; with `grad=True` it holds `.grad` instead of values.
"""

import numpy as np


def randomise(model, seed):
  """Redraws every parameter in place: fresh models hide bugs behind zeros.

  Matrices get the standard deviation 1 / sqrt(fan in), norm weights the mean
  1, so that activations stay near 1 at any depth. Returns the model in
  evaluation mode.
  """
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, value in model.named_parameters():
      std = 0.2 if value.ndim < 2 else value[0].numel() ** -0.5
      mean = float(value.ndim == 1 and 'norm' in name.lower())
      if name.endswith('bias'):
        mean = 0.0
      value.copy_(mean + std * torch.randn(value.shape, generator=generator))
  return model.eval()


def _arrays(model, grad):
  return {
      name: (value.grad if grad else value.detach()).numpy().copy()
      for name, value in model.named_parameters()
  }


def _nest(flat):
  """{'a.b': x} -> {'a': {'b': x}}."""
  tree = {}
  for path, value in flat.items():
    *parents, leaf = path.split('.')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def _leaf(name, value):
  """torch's (out, in) 'weight' -> 'kernel' (in, out) or norm 'scale'."""
  if not name.endswith('.weight'):
    return name, value
  stem = name.removesuffix('.weight')
  if value.ndim == 1:
    return f'{stem}.scale', value
  return f'{stem}.kernel', value.T


def _stack(arrays, prefix, places):
  """Layers `prefix`<i>. for i in `places`, as one dict of stacked arrays."""
  layers = []
  for place in places:
    start = f'{prefix}{place}.'
    layers.append(
        dict(
            _leaf(name.removeprefix(start), value)
            for name, value in arrays.items()
            if name.startswith(start)
        )
    )
  return {name: np.stack([d[name] for d in layers]) for name in layers[0]}


def _pad_rows(table):
  """[V, D] -> [V up to a multiple of 128, D], with zeros."""
  return np.pad(table, ((0, -len(table) % 128), (0, 0)))


def llama_params(model, grad=False):
  """`LlamaForCausalLM` -> params of `models.llama.Llama`."""
  arrays = _arrays(model, grad)
  tree = _nest(
      _stack(arrays, 'model.layers.', range(model.config.num_hidden_layers))
  )
  tree = {
      'embed_tokens': {
          'embedding': _pad_rows(arrays['model.embed_tokens.weight'])
      },
      'layers': tree,
      'norm': {'scale': arrays['model.norm.weight']},
  }
  if 'lm_head.weight' in arrays:
    tree['lm_head'] = {'kernel': _pad_rows(arrays['lm_head.weight']).T}
  return tree


def vit_params(model, grad=False):
  """`Blip2VisionModel` -> params of `models.vit.ViT`."""
  arrays = _arrays(model, grad)
  kernel = arrays['embeddings.patch_embedding.weight'].transpose(2, 3, 1, 0)
  return {
      'class_embedding': arrays['embeddings.class_embedding'],
      'position_embedding': arrays['embeddings.position_embedding'],
      'patch_embedding': {
          'kernel': kernel.reshape(-1, kernel.shape[-1]),
          'bias': arrays['embeddings.patch_embedding.bias'],
      },
      'layers': _nest(
          _stack(
              arrays, 'encoder.layers.', range(model.config.num_hidden_layers)
          )
      ),
      'post_layernorm': {
          'scale': arrays['post_layernorm.weight'],
          'bias': arrays['post_layernorm.bias'],
      },
  }


def qformer_params(model, query_tokens, grad=False):
  """`Blip2QFormerModel` and its query tokens [1, K, D], a torch parameter."""
  arrays = _arrays(model, grad)
  config = model.config
  every = config.cross_attention_frequency
  query = query_tokens.grad if grad else query_tokens.detach()
  return {
      'query_tokens': query.numpy().copy(),
      'layernorm': {
          'scale': arrays['layernorm.weight'],
          'bias': arrays['layernorm.bias'],
      },
      'layers': {
          f'layer_{i}': _nest(
              _stack(
                  arrays,
                  'encoder.layer.',
                  range(i, config.num_hidden_layers, every),
              )
          )
          for i in range(every)
      },
  }
