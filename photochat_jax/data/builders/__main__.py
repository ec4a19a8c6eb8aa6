r"""`tfds build` without the packages of its neighbours.

  python -m photochat_jax.data.builders photochat --config=text \
      --manual_dir=DIR --file_format=array_record

takes the arguments of `tfds build`, and the names of the builders here. The
command `tfds` imports all of its commands before it runs one, and others need
apache-beam and mlcroissant, which tensorflow-datasets does not install.
"""

import pathlib

from absl import app
from tensorflow_datasets.scripts.cli import build, cli_utils

_FOLDER = pathlib.Path(__file__).parent


def _parse(argv: list[str]) -> build.Args:
  """Parses flags; a name becomes the folder of its builder."""
  known = {f.parent.name for f in _FOLDER.glob("*/*_dataset_builder.py")}
  argv = [str(_FOLDER / a) if a in known else a for a in argv]
  return cli_utils.make_flags_parser(build.Args, __doc__)(argv)


def main(args: build.Args) -> None:
  """Builds."""
  args.execute()


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
