"""What all tests share: the CPU, compiled programs, hypothesis' settings."""

import os
import pathlib

# Before jax is imported. Subprocesses inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).parents[1] / ".jax_cache"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["HF_HUB_OFFLINE"] = "1"  # Tests use no network.

import hypothesis

# The same examples on every machine, and no limit on the time of one, which
# may hold a compilation.
hypothesis.settings.register_profile(
  "tests",
  derandomize=True,
  deadline=None,
  max_examples=20,
  print_blob=True,
)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser):
  parser.addoption(
    "--kills",
    type=int,
    default=5,
    help="how often test_killed.py kills the trainer",
  )
