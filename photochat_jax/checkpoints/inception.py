"""The Inception v3 of FID: pytorch-fid's weights and ours."""

from photochat_jax.checkpoints import tables

_STATISTICS = {
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}


def _norm_key(path: str) -> str:
  *modules, leaf = path.split("/")
  return ".".join([*modules, _STATISTICS[leaf]])


def _conv_key(path: str) -> str:
  return ".".join([*path.split("/")[:-1], "weight"])


def table() -> tables.Table:
  """The table of `models.inception.Inception`."""
  return tables.Table(
    name="Inception",
    rows=(
      tables.Row("fc", "fc.weight", tables.DENSE),
      tables.Row(r".+/conv/kernel", _conv_key, tables.CONV),
      tables.Row(rf".+/bn/({'|'.join(_STATISTICS)})", _norm_key),
    ),
    ignored=(
      r".+\.num_batches_tracked",
      r"fc\.bias",  # Inception Score is without it.
      r"AuxLogits\..+",  # Of the training.
    ),
  )
