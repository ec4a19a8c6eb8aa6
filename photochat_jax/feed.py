"""What training reads: the sets it mixes, their photos, and what is missing.

Every process reads the train splits and makes the rows of each batch that its
devices hold. The first one tells what was found, and writes

  WORKDIR/data.json         coverage of each set's splits, photos that splits
                            share, and of each stage what is packed, cut and
                            left out
  WORKDIR/quarantine.jsonl  records and photos that cannot be used, and why
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from photochat_jax import encoders, inputs, sharding
from photochat_jax.config import ConfigError, RunConfig
from photochat_jax.data import loading, moments, pipeline, schema, sources
from photochat_jax.data.quarantine import Quarantine, Row
from photochat_jax.runtime import cluster

# Rows that hold less of their tokens are worth a remark, where there are so
# many batches that the last ones do not matter.
_FULL, _MANY = 0.9, 10


@dataclasses.dataclass(frozen=True)
class DataSet:
  """A data set that is trained on.

  Attributes:
    name: in counts and reports.
    source: a name of `data.sources.READERS`.
    path: its folder.
    weight: its rows to one of the main set's.
    dialogues: of the train split.
    coverage: of the train split.
  """

  name: str
  source: str
  path: epath.PathLike
  weight: float
  dialogues: list[schema.Dialogue]
  coverage: schema.Coverage


class Feed:
  """The data of a training run.

  Attributes:
    sets: the main set, then those that are mixed in.
    photos: the file of every photo that has one, by id.
    quarantine: what cannot be used.
  """

  def __init__(
    self,
    run: RunConfig,
    workdir: epath.PathLike,
    llm_tokenizer: Any,
    clip_tokenizer: Any,
  ):
    """Reads the train splits.

    Raises:
      ValueError: a set has none, or nothing usable in it.
    """
    self._run, self._workdir = run, epath.Path(workdir)
    self._tokenizers = llm_tokenizer, clip_tokenizer
    self._first = cluster.is_first()
    self._mesh = sharding.make_mesh(
      run.mesh.data, run.mesh.fsdp, run.mesh.tensor
    )
    self._cache = loading.PhotoCache()
    self._moments: loading.Moments | None = None
    self._stages: dict[str, Mapping[str, float]] = {}
    self.quarantine = Quarantine(
      self._workdir / "quarantine.jsonl" if self._first else None
    )
    self.sets: list[DataSet] = []
    main = (*inputs.main_folder(run, workdir), 1.0)
    for number, (source, path, weight) in enumerate((main, *run.data.mix)):
      read = inputs.read_set(run, source, path, "train", self.quarantine)
      if not number:
        count = max(round(run.data.train_share * len(read[0])), 1)
        read = read[0][:count], read[1]
      name = source if number else run.data.source
      if name in {data.name for data in self.sets}:
        name = f"{name}_{number}"
      self.sets.append(DataSet(name, source, path, float(weight), *read))
    self.photos = {
      turn.photo.id: turn.photo.path
      for data in self.sets
      for dialogue in data.dialogues
      for turn in dialogue.turns
      if turn.photo is not None and turn.photo.path is not None
    }
    self._splits = self._read_splits() if self._first else []

  def _read_splits(self) -> list[dict[str, Any]]:
    """Of each set, its splits' coverage and the photos that they share."""
    found = []
    for data in self.sets:
      dialogues = {"train": data.dialogues}
      coverage: dict[str, Any] = {"train": _counts(data.coverage)}
      for split in sources.list_splits(data.source, data.path):
        if split == "train":
          continue
        try:
          dialogues[split], covered = inputs.read_set(
            self._run, data.source, data.path, split, self.quarantine
          )
          coverage[split] = _counts(covered)
        except ValueError as error:  # Not what is trained on.
          coverage[split] = {"error": str(error)}
      shared: dict[str, int] = {}
      for splits in schema.shared_photos(dialogues).values():
        name = "+".join(splits)
        shared[name] = shared.get(name, 0) + 1
      found.append(
        {
          "name": data.name,
          "path": str(data.path),
          "weight": data.weight,
          "splits": coverage,
          "photos_of_several_splits": shared,
        }
      )
    return found

  def open_moments(self, params: Any) -> None:
    """Opens the precomputed moments, where the run uses any.

    Args:
      params: the parameters, whose autoencoder must have made them.

    Raises:
      ValueError: they were made by other weights, or more than
        `data.max_broken` of the photos have none.
    """
    folder, limit = self._run.data.moments, self._run.data.max_broken
    if not folder:
      return
    store = moments.open_store(folder, *encoders.identity(self._run, params))
    found = loading.Moments(store, self.photos)
    lacking = len(found.missing) + len(found.changed)
    if lacking > limit * len(self.photos):
      raise ConfigError(
        f"{lacking} of {len(self.photos)} photos have no moments in {folder}, "
        f"or have other files now; more than max_broken={limit:g} allows: run "
        "tools/precompute.py once more."
      )
    self._moments = found

  def batches(
    self, kind: str, batch_size: int, stage: str, **changes
  ) -> pipeline.Pipeline:
    """Batches of a kind, of which this process makes its share.

    Args:
      kind: one of `data.spec.KINDS`.
      batch_size: rows of the global batch.
      stage: seeds them.
      **changes: of the spec.

    Raises:
      ValueError: the rows cannot be divided over the devices.
    """
    rows = sharding.rows_here(self._mesh, batch_size)
    return self._batches(kind, batch_size, stage, rows, **changes)

  def _batches(
    self,
    kind: str,
    batch_size: int,
    stage: str,
    rows: Sequence[int] | None,
    **changes,
  ) -> pipeline.Pipeline:
    main, *mix = self.sets
    return pipeline.Pipeline(
      main.dialogues,
      kind,
      inputs.data_spec(self._run, batch_size, **changes),
      *self._tokenizers,
      self._run.seed,
      stage,
      rows,
      photo_cache=self._cache,
      mix=[pipeline.Part(d.name, d.weight, d.dialogues) for d in mix],
      moments=self._moments,
      name=main.name,
    )

  def dev_batches(
    self, kind: str, batch_size: int, stage: str
  ) -> pipeline.Pipeline:
    """Batches of the main set's dev split, photos as they are.

    Raises:
      ValueError: there is none, or nothing usable in it.
    """
    main = self.sets[0]
    dialogues, _ = inputs.read_set(self._run, main.source, main.path, "dev")
    changes = {"augment": False, "crop": False, "moments": ()}
    return pipeline.Pipeline(
      dialogues,
      kind,
      inputs.data_spec(self._run, batch_size, drop_remainder=False, **changes),
      *self._tokenizers,
      self._run.seed,
      f"{stage}/dev",
      sharding.rows_here(self._mesh, batch_size),
      photo_cache=self._cache,
    )

  def plain_batches(
    self, kind: str, batch_size: int, stage: str
  ) -> pipeline.Pipeline:
    """Photos as they are, to measure or to look at.

    They are few: every process makes whole batches.
    """
    changes = {"augment": False, "crop": False, "moments": ()}
    return self._batches(kind, batch_size, stage, None, **changes)

  def coverage(self) -> list[str]:
    """What was found, to be told when training begins."""
    lines = []
    for data, found in zip(self.sets, self._splits, strict=False):
      lines.append(f"{data.name}: {data.coverage}")
      for split, counts in found["splits"].items():
        if split != "train":
          lines.append(f"{data.name}: {split}: {say(counts)}")
      for splits, count in found["photos_of_several_splits"].items():
        lines.append(f"{data.name}: {count} photos are shared by {splits}")
    if self._moments:
      made = len(self.photos) - len(self._moments.missing)
      lines.append(
        f"{made} of {len(self.photos)} photos have moments, "
        f"{len(self._moments.changed)} of them of another file"
      )
    return lines

  def describe(self, stage: str, data: pipeline.Pipeline) -> list[str]:
    """What a stage trains on, for people; `data.json` gets it too."""
    counts = data.describe()
    self._stages[stage] = counts
    self._write()
    lines = [f"Stage {stage}: {say(counts)}"]
    is_long = counts.get("batches_per_epoch", _MANY) >= _MANY
    if data.kind == "dialogues" and is_long and counts["row_fill"] < _FULL:
      lines.append(
        f"Stage {stage}: {1 - counts['row_fill']:.0%} of its tokens are "
        f"padding. {_remedy(counts)}"
      )
    return lines

  def take_broken(self, data: pipeline.Pipeline) -> str:
    """Puts photos that could not be used into quarantine, and counts them.

    Each process has met those of its own rows: all must ask.
    """
    broken: dict[str, str] = {}
    for met in cluster.texts_of_all(json.dumps(data.broken_photos)):
      broken |= json.loads(met)
    if not broken:
      return ""
    self.quarantine.add(
      Row(str(self.photos[name]), f"photo {name}", "it is no photo", why, "")
      for name, why in broken.items()
    )
    return f"{len(broken)} photos could not be used, see quarantine.jsonl"

  def _write(self) -> None:
    """Writes `data.json`; stages that a run before this one has done stay."""
    if not self._first:
      return
    path = self._workdir / "data.json"
    done: dict[str, Any] = {}
    if path.exists():
      with contextlib.suppress(ValueError, TypeError, KeyError):
        done = dict(json.loads(path.read_text())["stages"])
    report = {"sets": self._splits, "stages": done | self._stages}
    if self._moments:
      report["moments"] = {
        "photos": len(self.photos),
        "missing": len(self._moments.missing),
        "changed": len(self._moments.changed),
      }
    self._workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def say(counts: Mapping[str, Any]) -> str:
  """Counts as a line of text."""
  return ", ".join(
    f"{value:.2f} {name}" if isinstance(value, float) else f"{value} {name}"
    for name, value in counts.items()
    if not isinstance(value, dict)
  ).replace("_", " ")


def _counts(coverage: schema.Coverage) -> dict[str, Any]:
  """A coverage without the names in it."""
  return {
    "dialogues": coverage.dialogues,
    "records_left_out": len(coverage.broken),
    "photos_asked": coverage.photos_asked,
    "photos_found": coverage.photos_found,
    "captions_missing": coverage.captions_missing,
    "reasons": dict(coverage.reasons),
  }


def _remedy(counts: Mapping[str, float]) -> str:
  """Which limit of a row is met before its tokens are used up."""
  name = max(("photos_in", "photos_out"), key=lambda n: counts[f"{n}_fill"])
  if counts[f"{name}_fill"] > counts["row_fill"] - 0.1:
    return f"Its rows are full of photos before: raise data.{name}."
  return "Its dialogues are long for a row: raise data.length."
