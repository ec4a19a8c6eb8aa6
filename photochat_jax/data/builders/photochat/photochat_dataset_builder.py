"""PhotoChat as a TFDS data set; README.md beside this is its card.

tfds build photochat_jax/data/builders/photochat --config=text \
    --manual_dir=DIR --file_format=array_record
"""

import tensorflow_datasets as tfds

from photochat_jax.data.builders import base

_ROOT = (
  "https://raw.githubusercontent.com/google-research/google-research/master/"
  "multimodalchat/photochat/"
)
_FILES = {"train": 21, "dev": 2, "test": 2}


class Builder(base.DialogueBuilder):
  """Prepares PhotoChat."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}
  BUILDER_CONFIGS = [
    base.DialogueConfig(name="text", description="Dialogues without photos."),
    base.DialogueConfig(
      name="with_photos",
      description="Dialogues, and the photos that were in DIR/photos.",
      photos=True,
    ),
  ]
  MANUAL_DOWNLOAD_INSTRUCTIONS = """
  Optional: without it, the annotations are downloaded. A folder DIR with
  DIR/{train,dev,test}/*.json of github.com/google-research/google-research,
  multimodalchat/photochat, and, as far as there are any, DIR/photos as
  tools/fetch_photos.py writes them.
  """
  SOURCE = "photochat"
  URLS = {
    name: _ROOT + name
    for split, count in _FILES.items()
    for name in (f"{split}/{split}_{i:02d}.json" for i in range(count))
  }
  HOMEPAGE = (
    "https://github.com/google-research/google-research/tree/master/"
    "multimodalchat"
  )
  LICENSE = "CC BY 4.0; the photos have their own, as Open Images lists them."
