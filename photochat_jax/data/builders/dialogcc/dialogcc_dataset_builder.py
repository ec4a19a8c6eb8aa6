"""DialogCC as a TFDS data set; README.md beside this is its card.

Not for commercial use, which its configs say in their names:

tfds build photochat_jax/data/builders/dialogcc --config=noncommercial \
    --manual_dir=DIR --file_format=array_record
"""

import tensorflow_datasets as tfds

from photochat_jax.data.builders import base

# A revision, not `main`: checksums.tsv has the hashes of its files.
_ROOT = (
  "https://huggingface.co/datasets/passing2961/dialogcc/resolve/"
  "a39f83ccb59d7829ac0a093b924a00c83e3d2041/"
)


class Builder(base.DialogueBuilder):
  """Prepares DialogCC."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}
  BUILDER_CONFIGS = [
    base.DialogueConfig(
      name="noncommercial", description="Dialogues without photos."
    ),
    base.DialogueConfig(
      name="noncommercial_with_photos",
      description="Dialogues, and the photos that were in DIR/photos.",
      photos=True,
    ),
  ]
  MANUAL_DOWNLOAD_INSTRUCTIONS = """
  Optional: without it, the annotations are downloaded. A folder DIR with
  DIR/{train,valid,test}.json of huggingface.co/datasets/passing2961/dialogcc
  and, as far as there are any, DIR/photos as tools/fetch_photos.py writes
  them.
  """
  SOURCE = "dialogcc"
  URLS = {f"{s}.json": f"{_ROOT}{s}.json" for s in ("train", "valid", "test")}
  HOMEPAGE = "https://huggingface.co/datasets/passing2961/dialogcc"
  LICENSE = (
    "CC BY-NC-SA 4.0: not for commercial use, and what is made of it is "
    "shared alike. The photos belong to whoever published them."
  )
