"""Our parameters as folders, and what the originals' classes make of them."""

import jax
import numpy as np
import pytest

from photochat_jax.checkpoints import files, tables

torch = pytest.importorskip("torch")


def draw(shapes):
  """Parameters of our own, every one random and of telling size."""
  rng = np.random.default_rng(0)

  def one(path, leaf):
    noise = rng.standard_normal(leaf.shape)
    if path[-1].key == "kernel":
      noise *= np.prod(leaf.shape[-2:-1]) ** -0.5
    elif path[-1].key == "scale":
      noise = 1 + 0.3 * noise
    elif path[-1].key == "bias":
      noise *= 0.3
    return noise.astype(np.float32)

  return jax.tree_util.tree_map_with_path(one, shapes)


def publish(folder, content, table, params, stem=files.MODEL):
  """Writes a folder for others to open, in several files."""
  files.write_tensors(folder, tables.write(table, params), stem, 20_000)
  assert (folder / f"{stem}.safetensors.index.json").exists()
  files.write_json(folder / "config.json", content)


def opened(cls, folder):
  """What the original's own class makes of a folder, without complaint."""
  model, told = cls.from_pretrained(folder, output_loading_info=True)
  assert not any(told.values()), told
  assert {value.dtype for value in model.state_dict().values()} == {
    torch.float32
  }
  return model.eval()
