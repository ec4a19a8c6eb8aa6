"""Sound Hugging Face folders for the tests of this one."""

import functools

import hf_folders
import jax
import pytest

from photochat_jax.checkpoints import pretrained


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
  """The folder of `llm`, `blip2`, `diffusion`; nobody writes to it."""
  root = tmp_path_factory.mktemp("sound")
  hf_folders.write(root)
  return root


@pytest.fixture
def root(sound, tmp_path):
  """A copy of the sound folders, to be damaged."""
  return hf_folders.copy(sound, tmp_path / "hub")


@functools.cache
def _shapes(model):
  return jax.eval_shape(model.init, jax.random.key(0))


@pytest.fixture
def shapes_once(monkeypatch):
  """Traces the initialisation of equal models only once, to save time."""

  class Jax:
    random = jax.random

    @staticmethod
    def eval_shape(init, key):
      return _shapes(init.__self__)

  monkeypatch.setattr(pretrained, "jax", Jax)
