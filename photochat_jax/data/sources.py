"""The data sets that can be read, by name."""

from collections.abc import Mapping
from types import MappingProxyType, ModuleType

from etils import epath

from photochat_jax.data import dialogcc, mmdialog, photochat, photochat_plus
from photochat_jax.data.builders import prepared
from photochat_jax.data.records import MAX_BROKEN, Quarantine
from photochat_jax.data.schema import Coverage, Dialogue

_MODULES: Mapping[str, ModuleType] = MappingProxyType({
  "photochat": photochat,
  "dialogcc": dialogcc,
  "photochat_plus": photochat_plus,
  "mmdialog": mmdialog,
  "tfds": prepared,
})  # fmt: skip
READERS = MappingProxyType({n: m.read_split for n, m in _MODULES.items()})
"""name -> its `read_split(path, split, caption_source, ...)`."""


def _module(source: str) -> ModuleType:
  if source not in _MODULES:
    raise ValueError(
      f"There is no data set {source!r}; it must be one of "
      f"{', '.join(_MODULES)}."
    )
  return _MODULES[source]


def list_splits(source: str, path: epath.PathLike) -> tuple[str, ...]:
  """The splits, of `schema.SPLITS`, that a folder has.

  Args:
    source: a name of `READERS`.
    path: the data set's folder.

  Raises:
    ValueError: there is no such data set.
  """
  return _module(source).list_splits(path)


def read_split(
  source: str,
  path: epath.PathLike,
  split: str,
  caption_source: str = "given",
  max_broken: float = MAX_BROKEN,
  quarantine: Quarantine | None = None,
) -> tuple[list[Dialogue], Coverage]:
  """Reads one split of a data set.

  Args:
    source: a name of `READERS`.
    path: its folder.
    split: 'train', 'dev' or 'test'.
    caption_source: one of `records.CAPTION_SOURCES`.
    max_broken: the share of broken records, 0 to 1, that is borne.
    quarantine: takes what is left out.

  Returns:
    The dialogues and what was found.

  Raises:
    ValueError: there is no such data set or split, a file is no list of
      dialogues, or too many records are broken or none can be used.
  """
  return _module(source).read_split(
    path, split, caption_source, max_broken, quarantine
  )
