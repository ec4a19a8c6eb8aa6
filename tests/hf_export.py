"""Our folders, and what the originals' own classes make of them."""

import pytest

from photochat_jax.checkpoints import files, tables

torch = pytest.importorskip("torch")


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
