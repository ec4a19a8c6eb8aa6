"""Hugging Face folders, read and written without torch.

A folder holds JSON files and weights in safetensors: one file, or several with
an `.index.json` which says what lies where. Files are memory-mapped and a
tensor is read when it is asked for. Weights that only Python's pickle opens
are refused, because opening them runs whatever code they hold.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath
from safetensors import numpy as safetensors_numpy

MODEL, DIFFUSION = "model", "diffusion_pytorch_model"
"""How transformers and diffusers call their weights."""

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")
# Of a zip, as torch saves now, and of torch's magic number before that.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")
_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F64": np.dtype(np.float64),
}
_LFS = b"version https://git-lfs"
# An owner and a name; ./here and ../there are folders.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD_BYTES = 4 * 1024**3


class WeightsError(ValueError):
  """A folder of weights cannot be used; the message says what to do."""


def reason(error: Exception, most: int = 160) -> str:
  """A complaint, cut to `most` letters, as part of a sentence of ours."""
  # The system's own words, which do not name the file again.
  text = getattr(error, "strerror", None) or str(error)
  text = " ".join(text.split()).removesuffix(".")
  text = text or type(error).__name__
  return text if len(text) <= most else f"{text[:most]}..."


def find_folder(name: str, patterns: Iterable[str] = ()) -> epath.Path:
  """A local folder, or one of the Hugging Face hub.

  Args:
    name: a folder, or a hub id such as `stabilityai/sd-vae-ft-mse`, which is
      looked up in the local cache and fetched where there is a network
      (HF_HOME and HF_HUB_OFFLINE count as usual).
    patterns: of the files needed from a hub.

  Raises:
    WeightsError: there is neither.
  """
  folder = epath.Path(name)
  if folder.is_dir():
    return folder
  if folder.exists():
    raise WeightsError(
      f"{name} is a file; give the folder which holds config.json."
    )
  if not _HUB_ID.fullmatch(str(name)):
    raise WeightsError(
      f"There is no folder {name}; give the folder of a checkpoint, or a hub "
      "id such as owner/name."
    )
  import huggingface_hub

  try:
    found = huggingface_hub.snapshot_download(
      str(name), allow_patterns=list(patterns) or None
    )
  except Exception as error:  # Its own, those of HTTP and of the system.
    raise WeightsError(
      f"{name} is no folder here and could not be had from the hub "
      f"({reason(error)}); check the name, the network and, where the owner "
      "asks for consent, `hf auth login`, or give a local folder."
    ) from error
  return epath.Path(found)


def read_json(path: epath.PathLike) -> dict[str, Any]:
  """An object from a JSON file.

  Raises:
    WeightsError: there is no such file, or it holds something else.
  """
  path = epath.Path(path)
  data = _read_bytes(path)
  if data.startswith(_LFS):
    raise _pointer(path)
  try:
    content = json.loads(data, parse_constant=_constant)
  # Nested a thousand times, it is more than the parser's stack holds.
  except (ValueError, RecursionError) as error:
    raise WeightsError(
      f"{path} is not JSON ({reason(error)}); fetch it again."
    ) from error
  if not isinstance(content, dict):
    raise WeightsError(
      f"{path} must hold a JSON object, not a {type(content).__name__}; fetch "
      "it again."
    )
  return content


def write_json(path: epath.PathLike, content: Mapping[str, Any]) -> None:
  """Writes an object as people like to read it."""
  epath.Path(path).write_text(json.dumps(content, indent=2) + "\n")


def sha256(path: epath.PathLike) -> str:
  """The SHA-256 of a file's content, in hexadecimal.

  Raises:
    WeightsError: it cannot be read.
  """
  path = epath.Path(path)
  with _opened(path) as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


class Tensor:
  """A tensor on disk: its shape and dtype are known, its values are not.

  `numpy.asarray` reads it, anew each time.
  """

  def __init__(self, name: str, dtype: str, shape: Iterable[int], get):
    self.name = name
    self.stored = dtype
    self.shape = tuple(shape)
    self._get = get

  @property
  def dtype(self) -> np.dtype:
    """Of the values.

    Raises:
      WeightsError: it is stored in a format that weights never have.
    """
    if self.stored not in _DTYPES:
      raise WeightsError(
        f"{self.name} is stored as {self.stored}; take a checkpoint which is "
        "not quantised, in float32, float16 or bfloat16."
      )
    return _DTYPES[self.stored]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy  # Always a fresh array.
    values = self._get(self.name)
    return values if dtype is None else values.astype(dtype)


class Tensors(Mapping[str, Tensor]):
  """All weights of a folder, by name.

  Attributes:
    folder: where they are.
    files: the weight files' names.
  """

  def __init__(self, folder: epath.PathLike, stem: str = MODEL):
    """Opens the files and checks that they are whole.

    Args:
      folder: which holds them.
      stem: `MODEL` or `DIFFUSION`, how the weight files' names begin.

    Raises:
      WeightsError: there are none, they are damaged, they are pickles, or
        they are not those of the index.
    """
    self.folder = epath.Path(folder)
    self.files, index = _find(self.folder, stem)
    self._tensors: dict[str, Tensor] = {}
    for name in self.files:
      opened = _open(self.folder / name)
      for key in opened.keys():  # noqa: SIM118 (no mapping)
        if key in self._tensors:
          raise WeightsError(
            f"{self.folder / name} holds {key} a second time; fetch the "
            "folder again."
          )
        part = opened.get_slice(key)
        self._tensors[key] = Tensor(
          key, part.get_dtype(), part.get_shape(), opened.get_tensor
        )
    if index is not None and set(index) != set(self._tensors):
      odd = sorted(set(index) ^ set(self._tensors))
      more = f" and {len(odd) - 1} more tensors" if odd[1:] else ""
      raise WeightsError(
        f"The index in {self.folder} and the weight files there differ in "
        f"{odd[0]!r}{more}; fetch the folder again."
      )

  def __getitem__(self, key: str) -> Tensor:
    return self._tensors[key]

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __len__(self) -> int:
    return len(self._tensors)

  def hashes(self) -> dict[str, str]:
    """The SHA-256 of each weight file and of config.json, by name."""
    names = [*self.files]
    if (self.folder / "config.json").exists():
      names.append("config.json")
    return {name: sha256(self.folder / name) for name in names}


def read_file(path: epath.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
  """The tensors and the metadata of one safetensors file.

  Raises:
    WeightsError: it is missing or damaged.
  """
  opened = _open(epath.Path(path))
  tensors = {}
  for key in opened.keys():  # noqa: SIM118 (no mapping)
    part = opened.get_slice(key)
    tensors[key] = Tensor(
      key, part.get_dtype(), part.get_shape(), opened.get_tensor
    )
  return tensors, dict(opened.metadata() or {})


def write_tensors(
  folder: epath.PathLike,
  tensors: Iterable[tuple[str, np.ndarray]],
  stem: str = MODEL,
  shard_bytes: int = _SHARD_BYTES,
  progress: Callable[[str], None] = lambda key: None,
) -> None:
  """Writes weights as transformers and diffusers do, in one file or several.

  Args:
    folder: made where it is not there.
    tensors: (name, values), taken one by one.
    stem: `MODEL` or `DIFFUSION`.
    shard_bytes: a file is closed when it would become larger; as much is held
      in memory.
    progress: told the name of each tensor taken.

  Raises:
    WeightsError: the folder already holds weights.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  old = [path.name for path in folder.glob("*.safetensors*")]
  if old:
    raise WeightsError(
      f"{folder} already holds {old[0]}; give a new folder, nothing is "
      "overwritten."
    )
  shards, shard, total = [], {}, 0

  def close():
    path = folder / f"{stem}.part{len(shards)}"
    safetensors_numpy.save_file(shard, path, {"format": "pt"})
    shards.append((path, list(shard)))
    shard.clear()

  held = 0
  for key, values in tensors:
    progress(key)
    if shard and held + values.nbytes > shard_bytes:
      close()
      held = 0
    shard[key] = np.ascontiguousarray(values)
    held += values.nbytes
    total += values.nbytes
  close()
  if len(shards) == 1:
    shards[0][0].rename(folder / f"{stem}.safetensors")
    return
  where = {}
  for number, (path, keys) in enumerate(shards, start=1):
    name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
    path.rename(folder / name)
    where |= dict.fromkeys(keys, name)
  write_json(
    folder / f"{stem}.safetensors.index.json",
    {"metadata": {"total_size": total}, "weight_map": where},
  )


def _find(
  folder: epath.Path, stem: str
) -> tuple[list[str], Mapping[str, str] | None]:
  """The names of the weight files, and the index where there is one."""
  # Some Stable Diffusion mirrors have the half-precision variant alone.
  for variant in ("", ".fp16"):
    if (folder / f"{stem}{variant}.safetensors").exists():
      return [f"{stem}{variant}.safetensors"], None
    path = folder / f"{stem}.safetensors.index{variant}.json"
    if path.exists():
      break
  else:
    raise _no_weights(folder, stem)
  index = read_json(path).get("weight_map")
  if not isinstance(index, dict) or not index:
    raise WeightsError(f"{path} has no weight_map; fetch it again.")
  names = sorted({str(name) for name in index.values()})
  for name in names:
    if os.path.basename(name) != name or not name.endswith(".safetensors"):
      raise WeightsError(
        f"{path} names {name!r}, which is no safetensors file of its folder; "
        "fetch it again."
      )
    if not (folder / name).exists():
      raise WeightsError(
        f"{folder} lacks {name!r}, which its index names; fetch it again."
      )
  return names, index


def _no_weights(folder: epath.Path, stem: str) -> WeightsError:
  try:
    names = sorted(path.name for path in folder.iterdir())
  except OSError as error:
    return WeightsError(
      f"{folder} is no folder that can be read ({reason(error)}); fetch the "
      "checkpoint whole."
    )
  pickles = [name for name in names if name.endswith(_PICKLES)]
  if pickles:
    return _pickle(folder / pickles[0])
  return WeightsError(
    f"{folder} holds no {stem}.safetensors and no index of one; fetch the "
    "checkpoint's safetensors files."
  )


def _open(path: epath.Path):
  try:
    return safetensors.safe_open(path, framework="np")
  except (safetensors.SafetensorError, OSError) as error:
    start = _read_bytes(path, len(_LFS))
    if start == _LFS:
      raise _pointer(path) from error
    if start.startswith(_PICKLE_STARTS):
      raise _pickle(path) from error
    raise WeightsError(
      f"{path} is no whole safetensors file ({reason(error)}); fetch it again."
    ) from error


def _pointer(path: epath.Path) -> WeightsError:
  return WeightsError(
    f"{path} is a pointer of git-lfs and not the file itself; run `git lfs "
    "pull` in its folder."
  )


def _pickle(path: epath.Path) -> WeightsError:
  return WeightsError(
    f"{path} holds weights in a format that can run code when opened and is "
    "not read here; convert it with `from_pretrained(DIR).save_pretrained(OUT)`"
    " of transformers or diffusers (which writes safetensors) on a machine you "
    "can spare."
  )


def _constant(name: str) -> float:
  """Infinity is a limit that schedulers write; NaN is never meant."""
  if name == "NaN":
    raise ValueError("NaN is no number")
  return float(name)


def _opened(path: epath.Path):
  try:
    return path.open("rb")
  except FileNotFoundError:
    raise WeightsError(
      f"There is no {path.name} in {path.parent}; fetch the checkpoint whole."
    ) from None
  except OSError as error:
    raise WeightsError(
      f"{path} cannot be read ({reason(error)}); see to it that it is a file "
      "and that you may read it."
    ) from error


def _read_bytes(path: epath.Path, size: int = -1) -> bytes:
  with _opened(path) as file:
    return file.read(size)
