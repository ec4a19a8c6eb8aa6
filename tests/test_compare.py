"""Runs side by side: their transcripts read again, scored, and refused."""

import dataclasses
import json

import numpy as np
import pytest

from photochat_jax import compare, generate, inputs, record, said
from photochat_jax import config as config_lib
from photochat_jax.data import dialogue as dialogue_lib
from photochat_jax.data import schema, synthetic
from photochat_jax.transcript import Prompt, Transcript

RUN = dataclasses.replace(
  config_lib.RunConfig(),
  data=config_lib.DataConfig(num_train=1, num_dev=1, num_test=6, image_size=32),
)


def scene_of(dialogue, photo):
  return dialogue.facts["photos"][photo.id]["attributes"]


def evaluate(workdir, say, run=RUN):
  """Writes what an evaluation writes, of a model that says `say`."""
  record.write(run, workdir)
  dialogues, _ = inputs.read_split(run, workdir, "test")
  kept = Transcript(workdir / "eval", {"made": "by hand"})
  for number, dialogue in enumerate(dialogues):
    asked = [
      Prompt(number, spoken.speaker, spoken.start)
      for spoken in dialogue_lib.merge_turns(dialogue.turns)
      if spoken.speaker == 0
    ] + [
      Prompt(number, dialogue.turns[q["turn"]].speaker, q["turn"])
      for q in dialogue.facts["questions"]
    ]
    for prompt in asked:
      reply, photo = say(dialogue, prompt)
      kept.add_replies({prompt: reply})
      if photo is not None:
        kept.add_photos({prompt: photo})
  kept.finish()
  metrics = {
    "split": "test", "counts": {"dialogues": len(dialogues)},
    "data": schema.digest(dialogues), "config": run.as_dict(), "seed": 0,
    "git_commit": None, "step": 3, "weights": "ab", "devices": "1 x cpu",
    "perplexity": 2.5, "sizes": {"perplexity": 10, "fid": 0}, "fid": None,
  }  # fmt: skip
  (workdir / "eval" / "metrics.json").write_text(json.dumps(metrics))
  return dialogues


def perfect(dialogue, prompt):
  """Says what the data say, and draws the very scene."""
  spoken = dialogue_lib.merge_turns(dialogue.turns[prompt.upto :])[0]
  photos = [p for p in spoken.parts if isinstance(p, schema.Photo)]
  words = " ".join(p for p in spoken.parts if isinstance(p, str))
  if not photos:
    return generate.Reply((5,), words, None, True, 0.1), None
  before = spoken.parts[: spoken.parts.index(photos[0])]
  reply = generate.Reply(
    (3, 5, 4), " ".join(before), photos[0].caption, False, 0.9
  )
  scene = scene_of(dialogue, photos[0])
  return reply, synthetic.draw(scene, 32, np.random.default_rng(0))


def mute(dialogue, prompt):
  return generate.Reply((), "", None, True), None


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  for name, say in (("perfect", perfect), ("mute", mute)):
    evaluate(folder / name, say)
  return {name: folder / name for name in ("perfect", "mute")}


def test_what_was_said_is_read_again(workdirs):
  dialogues, runs = compare.read(workdirs)
  assert list(runs) == ["perfect", "mute"] and len(dialogues) == 6
  for run in runs.values():
    merged = [
      s for d in dialogues for s in dialogue_lib.merge_turns(d.turns)
      if s.speaker == 0
    ]  # fmt: skip
    assert [t.spoken for t in run.said.turns] == merged
  turn = next(t for t in runs["perfect"].said.turns if t.gold)
  assert turn.reply.tokens == (3, 5, 4) and turn.reply.photo_score == 0.9
  np.testing.assert_array_equal(
    turn.drawn,
    synthetic.draw(turn.scene, 32, np.random.default_rng(0)),
  )
  assert turn.seen == turn.scene


def test_scores_by_hand(workdirs):
  dialogues, runs = compare.read(workdirs)
  cases, scores = compare.cases(dialogues, runs)
  assert list(scores) == [
    "photo", "told", "answers", "caption", "sharing", "words",
  ]  # fmt: skip
  shared = [
    any(t.photo and t.speaker == 0 for t in d.turns) for d in dialogues
  ]
  asked = [
    any(q["kind"] == "unsaid" for q in d.facts["questions"]) for d in dialogues
  ]
  assert 0 < sum(shared) < 6 and 0 < sum(asked)
  by_title = {case.example.title: case.scores for case in cases}
  for dialogue, shares, asks in zip(dialogues, shared, asked, strict=True):
    found = by_title[f"Dialogue {dialogue.id}"]
    assert found["sharing"]["perfect"] == 1.0
    for name in ("photo", "told", "caption"):
      assert found[name] == {
        "perfect": pytest.approx(1.0) if shares else None,
        "mute": 0.0 if shares else None,
      }
    assert found["answers"] == {
      "perfect": 1.0 if asks else None,
      "mute": 0.0 if asks else None,
    }
    turns = [
      t for t in runs["mute"].said.turns
      if dialogues[t.number] is dialogue
    ]  # fmt: skip
    silent = np.mean([t.gold is None for t in turns])
    assert found["sharing"]["mute"] == pytest.approx(silent)
  # Worst first; where no photo is due there is no score.
  known = [case.scores["photo"]["mute"] for case in cases]
  assert known == sorted(known, key=lambda score: score is None)
  assert len(compare.cases(dialogues, runs, 2)[0]) == 2


def test_the_page_shows_every_run(workdirs):
  dialogues, runs = compare.read(workdirs)
  table = compare.figures_table(runs)
  assert table.heads == ["", "perfect", "mute"]
  assert table.rows == [["perplexity", "2.500", "2.500"]]
  page = compare.page("Two runs", [table], dialogues, runs)
  assert page.count("data-scores=") == 6 and "6 of 6" in page
  photos = sum(t.photo is not None for d in dialogues for t in d.turns)
  drawn = sum(t.drawn is not None for t in runs["perfect"].said.turns)
  assert page.count("data:image/png;base64,") == photos + drawn
  assert "weights ab" in page


def test_runs_that_cannot_be_compared(workdirs, tmp_path):
  with pytest.raises(ValueError, match="evaluate the run first"):
    compare.read({"a": tmp_path / "nothing"})
  other = RUN.with_data(told_share=0.9)
  evaluate(tmp_path / "other", mute, other)
  with pytest.raises(ValueError, match="other was not evaluated on the dial"):
    compare.read({**workdirs, "other": tmp_path / "other"})


def test_data_without_scenes_have_fewer_scores(workdirs):
  dialogues, runs = compare.read(workdirs)
  bare = [dataclasses.replace(d, facts=None) for d in dialogues]
  runs = {
    name: run._replace(
      said=said.Said(
        [dataclasses.replace(t, scene=None, seen=None) for t in run.said.turns],
        [],
      )
    )
    for name, run in runs.items()
  }
  _, scores = compare.cases(bare, runs)
  assert list(scores) == ["caption", "sharing", "words"]
