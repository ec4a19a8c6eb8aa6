"""The statistics of a data set: against other ways to count, and by hand."""

import collections
import io
import json
import pathlib
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
import rich.console
from PIL import Image

from photochat_jax import inspect_data
from photochat_jax.data import index, photochat, records, synthetic, tokenizers
from photochat_jax.data.pipeline import Pipeline
from photochat_jax.data.schema import Dialogue, Turn
from photochat_jax.data.spec import DataSpec
from photochat_jax.inspection import counts as counts_lib
from photochat_jax.inspection import table, tables

ROOT = pathlib.Path(__file__).parents[1]
SAMPLE = pathlib.Path(__file__).parent / "data" / "photochat_sample"
SPLITS = ("train", "dev", "test")


def spec(**changes):
  fields = {
    "batch_size": 1, "length": 1024, "photos_in": 4, "photos_out": 4,
    "num_visual_tokens": 4, "vision_size": 1, "photo_size": 1,
  }  # fmt: skip
  return DataSpec(**fields | changes)


@pytest.fixture(scope="module")
def tools():
  return tokenizers.load_llm_tokenizer(), tokenizers.load_clip_tokenizer()


@pytest.fixture(scope="module")
def real(tools):
  return inspect_data.inspect("photochat", SAMPLE, *tools, spec())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  return synthetic.generate(0, 30, 5, 5, tmp_path_factory.mktemp("set"))


def published(split):
  (file,) = (SAMPLE / split).glob("*.json")
  return json.loads(file.read_text())


def turn(message="hi", share_photo=False, user_id=0, **own):
  return {
    "message": message, "share_photo": share_photo, "user_id": user_id, **own,
  }  # fmt: skip


def write(folder, records, split="train"):
  (folder / split).mkdir(parents=True, exist_ok=True)
  records = [{"dialogue_id": i, **r} for i, r in enumerate(records)]
  (folder / split / "0.json").write_text(json.dumps(records))


@pytest.mark.parametrize("split", SPLITS)
def test_counts_of_the_published_files(real, split):
  found = real.report["splits"][split]
  dialogues = [record["dialogue"] for record in published(split)]
  words = [[len(t["message"].split()) for t in d] for d in dialogues]
  place = [[t["share_photo"] for t in d].index(True) for d in dialogues]
  assert found["dialogues"] == len(dialogues)
  assert found["turns"]["sum"] == sum(map(len, dialogues))
  assert found["turns"]["median"] == statistics.median(map(len, dialogues))
  assert found["turns"]["max"] == max(map(len, dialogues))
  assert found["words"]["sum"] == sum(map(sum, words))
  with_words = [n for some in words for n in some if n]
  assert found["words_per_turn"]["count"] == len(with_words)
  photos = found["photos"]
  assert photos["turn"]["mean"] == pytest.approx(statistics.mean(place))
  assert photos["place"]["mean"] == pytest.approx(
    statistics.mean(
      p / (len(d) - 1) for p, d in zip(place, dialogues, strict=True)
    )
  )
  assert photos["per_dialogue"] == {1: len(dialogues)}
  assert photos["by_speaker"] == {"0": len(dialogues), "1": 0}
  assert (found["photos_asked"], found["photos_found"]) == (len(dialogues), 0)


def test_labels_of_the_published_files(real):
  counts = collections.Counter()
  for record in published("train"):
    listed = record["photo_description"].split("Objects in the photo: ")[1]
    counts.update({name.strip() for name in listed.split(",")})
  found = real.report["splits"]["train"]["labels"]
  assert found["counts"] == dict(counts)
  assert found["per_photo"]["sum"] == counts.total()


def test_tokens_of_the_published_files(real, tools):
  texts = [[t["message"] for t in r["dialogue"]] for r in published("dev")]
  for name, tokenizer in zip(("llm", "clip"), tools, strict=True):
    found = real.report["splits"]["dev"]["tokens"][name]
    sizes = [[len(tokenizer.encode(t)) for t in some] for some in texts]
    assert found["dialogue"]["sum"] == found["turn"]["sum"]
    assert found["dialogue"]["max"] == max(map(sum, sizes))
    assert found["turn"]["count"] == sum(1 for s in sizes for n in s if n)


def test_captions_by_source(real):
  assert real.report["caption_source"] == "labels"
  found = real.report["splits"]["test"]["captions"]
  assert "written" not in found
  assert (found["given"]["with"], found["given"]["without"]) == (0, 16)
  assert (found["labels"]["with"], found["description"]["with"]) == (16, 16)
  words = [len(r["photo_description"].split()) for r in published("test")]
  assert found["description"]["words"]["max"] == max(words)


def test_each_side_is_what_training_indexes(made, tools):
  layout = spec(length=70, caption_tokens=8)
  found = inspect_data.inspect("photochat", made, *tools, layout)
  for split in SPLITS:
    dialogues, _ = photochat.read_split(made, split)
    counts = index.build_index(dialogues, layout, *tools).counts
    sides = found.report["splits"][split]["sides"].values()

    def total(name, of=sides):
      return sum(side[name] for side in of)

    for ours, theirs in (
      ("examples", "examples"),
      ("photos_in", "photos_in"),
      ("photos_out", "photos_out"),
      ("photos_out_missing", "photos_out_missing"),
      ("captions_cut", "captions_cut"),
      ("turns_cut", "turns_cut"),
      ("examples_cut", "examples_cut"),
    ):
      assert total(ours) == counts[theirs], ours
    assert sum(side["tokens"]["sum"] for side in sides) == counts["tokens"]
    kinds = sum(
      (collections.Counter(side["tokens_of"]) for side in sides),
      collections.Counter(),
    )
    assert kinds["text"] + kinds["caption"] == counts["loss_tokens"]
    assert kinds["slot"] == 4 * counts["photos_in"]
    assert kinds.total() == counts["tokens"]
  train = found.report["splits"]["train"]["sides"]
  assert sum(s["turns_cut"] for s in train.values()) > 0
  assert sum(s["captions_cut"] for s in train.values()) > 0


def test_sides_left_out_by_reason(tmp_path, tools):
  told = {"photo_id": "a", "photo_description": ""}
  write(tmp_path, [
    {"dialogue": [turn(), turn("", True), turn("nice", user_id=1)], **told},
    {"dialogue": [turn("oh"), turn("", True, photo_caption="a cat")], **told},
  ])  # fmt: skip
  found = inspect_data.inspect("photochat", tmp_path, *tools, spec())
  sides = found.report["splits"]["train"]["sides"]
  assert sides["0"]["left_out"] == {"no_caption": 1}
  assert sides["1"]["left_out"] == {"missing_photo": 1}
  assert (sides["0"]["examples"], sides["1"]["examples"]) == (1, 0)
  assert sides["0"]["photos_out_missing"] == 1
  assert found.report["splits"]["train"]["rows"]["rows"] == 1


def test_rows_are_filled_as_in_training(made, tools):
  layout = spec(length=256)
  found = inspect_data.inspect("photochat", made, *tools, layout, seed=3)
  dialogues, _ = photochat.read_split(made, "train")
  described = Pipeline(
    dialogues, "dialogues", layout, *tools, seed=3, stage=0
  ).describe()
  rows = found.report["splits"]["train"]["rows"]
  assert rows["rows"] == described["batches_per_epoch"]
  for name in ("row_fill", "photos_in_fill", "photos_out_fill"):
    assert rows[name] == pytest.approx(described[name])
  for row in found.rows:
    sizes = [sum(n for _, n in segment.runs) for segment in row]
    assert 0 < sum(sizes) <= 256 and len(row) >= 1
  plan = Pipeline(dialogues, "dialogues", layout, *tools, seed=3, stage=0)
  first = plan.batch(0)
  assert len(found.rows[0]) == first["segments"].max()
  kinds = [k for s in found.rows[0] for k, n in s.runs for _ in range(n)]
  names = np.asarray(["none", "text", "caption"])[first["loss_kind"][0]]
  names[first["visual_index"][0] >= 0] = "slot"
  assert kinds == names[: len(kinds)].tolist()


def test_no_example_at_all(tmp_path, tools):
  write(tmp_path, [{"dialogue": [turn("", True), turn("oh", user_id=1)],
                    "photo_id": "a"}])  # fmt: skip
  found = inspect_data.inspect("photochat", tmp_path, *tools, spec())
  rows = found.report["splits"]["train"]["rows"]
  assert (rows["rows"], rows["row_fill"], found.rows) == (0, None, ())
  assert tables.tables(found.report)


def test_broken_records_are_counted_and_bear_nothing(tmp_path, tools):
  good = {"dialogue": [turn(), turn("yes", user_id=1)]}
  write(tmp_path, [good, {}, {"dialogue": [turn(user_id=7)]}, {}])
  write(tmp_path, [good], "dev")
  (tmp_path / "dev" / "1.json").write_text("{not json")
  found = inspect_data.inspect("photochat", tmp_path, *tools, spec())
  train = found.report["splits"]["train"]
  assert train["records_left_out"] == 3
  assert train["reasons"] == {
    "dialogue is not a list of turns": 2, "user_id is not 0 or 1": 1,
  }  # fmt: skip
  assert train["left_out"][0].startswith("0.json record 1: dialogue is not")
  assert "1.json" in found.report["splits_not_read"]["dev"]
  told = [row for t in tables.tables(found.report) for row in t.rows]
  assert ("train", "user_id is not 0 or 1", "1") in told


def test_the_fullest_source_of_captions_is_taken(tmp_path, tools):
  write(tmp_path, [
    {"dialogue": [turn(), turn("", True, 0, photo_id=str(i), **given)]}
    for i, given in enumerate([{}, {"photo_caption": "one"}, {}])
  ])  # fmt: skip

  def inspect(**options):
    return inspect_data.inspect(
      "photochat", tmp_path, *tools, spec(), **options
    )

  assert inspect().report["caption_source"] == "given"
  with pytest.raises(ValueError, match="tools/caption_photos.py"):
    inspect(caption_source="written")
  rows = [{"photo_id": str(i), "caption": f"cat {i}"} for i in range(2)]
  lines = [json.dumps(row) for row in rows] + ["half a r"]
  (tmp_path / records.CAPTION_FILE).write_text("\n".join(lines))
  found = inspect()
  assert found.report["caption_source"] == "written"
  captions = found.report["splits"]["train"]["captions"]
  assert captions["written"]["with"] == 2
  assert captions["written"]["words"]["mean"] == 2
  assert sum(found.report["written_captions_left_out"].values()) == 1
  assert inspect(caption_source="given").report["caption_source"] == "given"
  shown = {s.dialogue.id: s.dialogue.turns[1].photo for s in found.shown}
  assert [shown[str(i)].caption for i in range(3)] == ["cat 0", "cat 1", None]


def test_photos_of_several_splits(tmp_path, tools):
  for split, ids in (("train", "aab"), ("dev", "bc"), ("test", "bd")):
    write(tmp_path, [
      {"dialogue": [turn(), turn("", True)], "photo_id": i} for i in ids
    ], split)  # fmt: skip
  (tmp_path / "photos").mkdir()
  Image.new("RGB", (4, 4)).save(tmp_path / "photos" / "a.png")
  report = inspect_data.inspect("photochat", tmp_path, *tools, spec()).report
  assert report["shared_photos"]["by_splits"] == {"train+dev+test": 1}
  train = report["splits"]["train"]
  assert train["photos"]["shared"] == 3 and train["photos_asked"] == 2
  assert train["photos_found"] == 1 and train["missing"] == ["b"]
  assert [report["splits"][s]["photos_in_other_splits"] for s in SPLITS] == (
    [1, 1, 1]
  )


def test_dialogues_are_drawn_by_seed_and_more_begin_with_the_same(tools):
  def shown(**options):
    return inspect_data.inspect(
      "photochat", SAMPLE, *tools, spec(), **options
    ).report["shown"]

  few, more = shown(dialogues=5), shown(dialogues=12)
  assert (len(few), len(more), more[:5]) == (5, 12, few)
  assert shown(dialogues=5, seed=1) != few
  assert len({split for split, _ in more}) > 1
  assert len(shown(dialogues=500)) == 72


def test_a_dialogue_of_one_speaker(tools):
  split = counts_lib.Split(
    [Dialogue("0", "train", (Turn(1, "hi"),))], *tools, spec()
  )
  assert list(split.report(0)["sides"]) == ["1"]


def test_tables_fit_a_terminal_and_obey_nothing(tmp_path, tools):
  nasty = "[bold]x[/nope], \x1b[2J\x07evil, \u202eabc"
  write(tmp_path, [{
    "dialogue": [turn("[/img] \x1b[31m"), turn("", True)],
    "photo_id": "a", "photo_description": f"Objects in the photo: {nasty}",
  }])  # fmt: skip
  stream = io.StringIO()
  console = rich.console.Console(file=stream, width=80, force_terminal=False)
  inspect_data.inspect_data(
    "photochat", tmp_path, *tools, spec(), out=tmp_path / "out", console=console
  )
  text = stream.getvalue()
  assert "[bold]x[/nope]" in text and "⟨1B⟩[2J⟨7⟩evil" in text
  assert "⟨202E⟩abc" in text
  assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)
  drawn = [line for line in text.splitlines() if line[:1] in "│┃└┏"]
  assert len(drawn) > 50 and max(map(len, drawn)) <= 80
  report = json.loads((tmp_path / "out" / "inspect.json").read_text())
  assert report["splits"]["train"]["labels"]["counts"]["[bold]x[/nope]"] == 1


def test_numbers_in_tables_are_whole_on_eighty_columns(tools):
  stream = io.StringIO()
  console = rich.console.Console(file=stream, width=80)
  found = inspect_data.inspect("photochat", SAMPLE, *tools, spec())
  for one in tables.tables(found.report):
    console.print(table.to_rich(one))
  lines = [re.split("[│┃]", line) for line in stream.getvalue().splitlines()]
  cells = {cell.strip() for line in lines for cell in line}
  assert {"dialogues", "550", "3,271", "left out: missing_photo"} <= cells


def test_a_folder_that_cannot_be_written(tmp_path, tools):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="choose another folder"):
    inspect_data.inspect_data(
      "photochat", SAMPLE, *tools, spec(), out=tmp_path / "file"
    )


def command(*flags):
  return subprocess.run(
    [sys.executable, str(ROOT / "tools" / "inspect_data.py"), *flags],
    capture_output=True, text=True, check=False, cwd=ROOT,
    env={"PYTHONPATH": str(ROOT), "PATH": "", "COLUMNS": "80"},
  )  # fmt: skip


def test_the_command(tmp_path):
  done = command(
    "--dataset=photochat", f"--path={SAMPLE}", f"--out={tmp_path}",
    "--template=bare", "--dialogues=3", "--system_prompt=",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "What training sees as speaker 1" in done.stdout
  report = json.loads((tmp_path / "inspect.json").read_text())
  assert report["layout"]["template"] == "bare"
  assert len(report["shown"]) == 3
  assert (tmp_path / "inspect.html").stat().st_size > 10_000


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (["--path=/nowhere"], "There is no train split"),
    (["--path=.", "--llm_tokenizer=/nowhere"], "There is no tokenizer"),
    (["--path=.", "--template=llama3"], "data.template"),
  ],
)
def test_the_command_says_what_is_wrong(tmp_path, flags, said):
  done = command(*flags, f"--out={tmp_path}")
  assert done.returncode == 1 and said in done.stderr
  assert done.stderr.startswith("inspect_data: ")
  assert "Traceback" not in done.stderr
