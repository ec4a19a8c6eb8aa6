"""The batches that the README's figures were measured on stay what they are.

The digests were taken when those figures were, from `configs/tiny.py` with 40
dialogues. They are no oracle of what is right; a change that moves them makes
the figures those of another run, to be measured anew.
"""

import hashlib

import numpy as np
import pytest

from configs import tiny
from photochat_jax import config as config_lib
from photochat_jax import inputs
from photochat_jax.data import pipeline

STEPS = {
  "autoencoder": (0, 1, 2, 300, 599),
  "generator": (0, 1, 2, 450, 899),
  "perceiver": (0, 1, 2, 125, 249),
  "dialogue": (0, 1, 2, 325, 649),
  "joint": (0, 1, 2, 150, 299),
}
DIGESTS = {
  "autoencoder": (
    "1fe8ead03fd93497e1e45738e114f5c87ab08bbbdc4c981f86141964d73d126a"
  ),
  "generator": (
    "1a5d9d732d8888554149225bca6b9169642a47d8d8adced95cf9262d3b0a8547"
  ),
  "perceiver": (
    "e3642841afb2748d25fcae0499484b75df9ed6f6a32f4215b5b49558218dfc59"
  ),
  "dialogue": (
    "38ebb60ccda309883c5c3aa6605c2e22bce6287b4f58dbd73d20184fadf2a423"
  ),
  "joint": (
    "9563c9faa4e423ee6362180350c95d69c42b056a23869cd0329607d1c065de69"
  ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  config = tiny.get_config()
  config.unlock()
  data = config.data
  data.num_train, data.num_dev, data.num_test = 40, 4, 4
  run = config_lib.build(config)
  folder = tmp_path_factory.mktemp("data")
  dialogues, _ = inputs.read_split(run, folder, "train")
  return run, dialogues, inputs.load_tokenizers(run)


@pytest.mark.parametrize("stage", DIGESTS)
def test_batches_are_those_of_the_published_figures(run, stage):
  run, dialogues, tokenizers = run
  (stage,) = (s for s in run.stages if s.name == stage)
  source = pipeline.Pipeline(
    dialogues,
    stage.data,
    inputs.data_spec(run, stage.batch_size),
    *tokenizers,
    run.seed,
    stage.name,
  )
  content = hashlib.sha256()
  for step in STEPS[stage.name]:
    batch = source.batch(step)
    for name in sorted(batch):
      # Which photo stands where is in example_id; how a JPEG is decoded is
      # Pillow's affair.
      if name not in ("photos_in", "photos_out"):
        array = np.ascontiguousarray(batch[name])
        content.update(f"{name} {array.dtype} {array.shape}".encode())
        content.update(array.tobytes())
  assert content.hexdigest() == DIGESTS[stage.name]
