"""Sound Hugging Face folders for the tests of this one."""

import functools

import hf_folders
import jax
import pytest

from photochat_jax.models.photochat import PhotoChat


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


_eval_shape = jax.eval_shape


@functools.cache
def _shapes(model):
  return _eval_shape(model.init, jax.random.key(0))


@pytest.fixture
def shapes_once(monkeypatch):
  """Traces the initialisation of equal models only once, to save time."""

  def eval_shape(function, *args):
    model = getattr(function, "__self__", None)
    if isinstance(model, PhotoChat):
      return _shapes(model)
    return _eval_shape(function, *args)

  monkeypatch.setattr(jax, "eval_shape", eval_shape)
