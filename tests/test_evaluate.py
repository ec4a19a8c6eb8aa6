"""The evaluation of a perfect, a mute and a random model, and its files."""

import collections
import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_agent

from photochat_jax import (
  answering,
  assess,
  evaluate,
  generate,
  inputs,
  reproduce,
  said,
  showcase,
  transcript,
)
from photochat_jax import config as config_lib
from photochat_jax.checkpoints import manager
from photochat_jax.data import dialogue as dialogue_lib
from photochat_jax.data import photochat, schema, synthetic
from photochat_jax.decoding_options import Options
from photochat_jax.metrics import report, text
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.state import TrainState

# The figures that others read by name.
SHARES = {
  "photo_precision", "photo_recall", "photo_f1", "photo_average_precision",
  "pixel_accuracy",
}  # fmt: skip
WORDS = {
  "bleu_1", "bleu_2", "released_bleu_1", "released_bleu_2", "rouge_l",
}  # fmt: skip
CAPTIONS = {f"caption_{name}" for name in WORDS}
DISTINCT = {"distinct_1", "distinct_2"}
JUDGED = {
  "clip_score", "clip_photo_similarity", "mm_relevance", "fid",
  "inception_score",
}  # fmt: skip
NAMES = SHARES | WORDS | CAPTIONS | DISTINCT | JUDGED | {
  "perplexity", "attribute_accuracy",
}  # fmt: skip
ATTRIBUTES = {
  "mean", "captioned", "told",
  "shape", "ground", "position", "size", "colour", "wall",
}  # fmt: skip


@pytest.fixture(scope="module")
def run():
  slots = 32
  return dataclasses.replace(
    config_lib.RunConfig(),
    data=config_lib.DataConfig(
      num_train=1, num_dev=1, num_test=12, length=192, image_size=32,
      template="bare", system_prompt="",
    ),
    model=dataclasses.replace(
      toy_agent.config(768, 768, slots), bridge=config_lib.RunConfig().bridge
    ),
    eval=config_lib.EvalConfig(
      batch_size=16, max_new_tokens=8, sampler_steps=2, max_dialogues=0
    ),
    compilation_cache="off",
  )  # fmt: skip


@pytest.fixture(scope="module")
def dialogues(run, tmp_path_factory):
  return inputs.read_split(run, tmp_path_factory.mktemp("data"), "test")[0]


@pytest.fixture(scope="module")
def generator(run):
  model = PhotoChat(run.model)
  return generate.Generator(
    model,
    toy_agent.random_params(model),
    *inputs.load_tokenizers(run),
    inputs.data_spec(run, 16, augment=False),
    run.eval,
  )


def gold_reply(dialogue, prompt):
  """What the data say from a turn on, as a reply."""
  spoken = dialogue_lib.merge_turns(dialogue.turns[prompt.upto :])[0]
  assert spoken.speaker == prompt.side
  words, caption = [], None
  for part in spoken.parts:
    if isinstance(part, schema.Photo):
      caption = dialogue.facts["photos"][part.id]["full_caption"]
      break
    words.append(part)
  shares = caption is not None
  return generate.Reply((), " ".join(words), caption, not shares, float(shares))


@pytest.fixture
def perfect(monkeypatch, generator, dialogues):
  """A model that says and draws what the data do."""

  def respond(generator, dialogues, prompts, counts, options, kept):
    kept.add_replies({p: gold_reply(dialogues[p.number], p) for p in prompts})

  scenes = [
    facts["attributes"]
    for dialogue in dialogues
    for facts in dialogue.facts["photos"].values()
  ]

  def draw(self, captions, seeds):
    # A caption names all but the wall.
    assert len(captions) == len(seeds)
    found = []
    for caption in captions:
      words = set(caption.replace(",", "").split())
      scene = next(
        scene
        for scene in scenes
        if {v for k, v in scene.items() if k != "wall"} <= words
      )
      found.append(synthetic.draw({**scene, "wall": "grey"}, 32))
    return np.stack(found)

  monkeypatch.setattr(answering, "respond", respond)
  monkeypatch.setattr(generate.Generator, "draw", draw)
  monkeypatch.setattr(
    assess, "text_loss", lambda *_: text.TokenLoss(math.log(2), 1)
  )
  return generator


def own_photos(dialogues):
  """First photo of every merged turn of user 0, by hand."""
  return [
    turn.photo
    for dialogue in dialogues
    for turn in dialogue.turns
    if turn.photo and turn.speaker == 0
  ]


def test_a_perfect_model_is_perfect(perfect, dialogues):
  found = assess.assess(perfect, dialogues)
  metrics, sizes = found.figures.metrics, found.figures.sizes
  assert set(metrics) == set(found.figures.chance) == set(sizes) == NAMES
  assert set(found.figures.reasons) == JUDGED
  for name, reason in found.figures.reasons.items():
    assert "not computed: needs " in reason and metrics[name] is None
  for name in SHARES:
    assert found.figures.metrics[name] == 1.0, name
  for name in WORDS:
    assert found.figures.metrics[name] == pytest.approx(100), name
  # It names more of each photo than the data's captions do.
  assert 20 < metrics["caption_bleu_1"] < 100
  assert sizes["caption_bleu_1"] == len(own_photos(dialogues))
  assert 0 < metrics["distinct_1"] < metrics["distinct_2"] < 100
  (threshold, counts), (zero, all_yes) = found.thresholds
  assert (threshold, zero) == (1.0, 0.0)
  assert counts.f1 == 1.0 and all_yes.true_no == all_yes.false_no == 0
  assert found.figures.metrics["perplexity"] == pytest.approx(2)
  accuracy = found.figures.metrics["attribute_accuracy"]
  assert set(accuracy) == ATTRIBUTES
  walls = [
    facts["attributes"]["wall"] == "grey"
    for dialogue in dialogues
    for turn in dialogue.turns
    if turn.photo and turn.speaker == 0
    for facts in [dialogue.facts["photos"][turn.photo.id]]
  ]
  assert accuracy.pop("wall") == pytest.approx(np.mean(walls))
  assert set(accuracy.values()) == {1.0}


def test_chance_and_counts(perfect, dialogues):
  found = assess.assess(perfect, dialogues)
  turns = photos = 0
  for dialogue in dialogues:
    before = None
    for turn in dialogue.turns:
      turns += turn.speaker == 0 and before != 0
      before = turn.speaker
  photos = len(own_photos(dialogues))
  questions = [
    question
    for dialogue in dialogues
    for question in dialogue.facts["questions"]
    if question["attribute"] == "wall"
  ]
  assert 0 < photos < turns and len(questions) > 3
  assert any(not d.facts["photos"] for d in dialogues)  # Photo-less ones too.
  assert found.counts["model_turns"] == turns
  assert found.counts["photo_turns"] == photos
  assert found.counts["questions"] == len(questions)
  for name in ("photo_precision", "photo_recall", "photo_f1"):
    assert found.figures.chance[name] == pytest.approx(photos / turns)
  assert found.figures.chance["pixel_accuracy"] == pytest.approx(1 / 5)
  assert found.figures.chance["perplexity"] == 768
  assert found.figures.chance["attribute_accuracy"] == pytest.approx({
    "mean": (1 / 4 + 1 / 4 + 1 / 3 + 1 / 2) / 4,
    "captioned": (1 / 4 + 1 / 4 + 1 / 3 + 1 / 2) / 4,
    "told": 1 / 6,
    "shape": 1 / 4, "ground": 1 / 4, "position": 1 / 3, "size": 1 / 2,
    "colour": 1 / 6, "wall": 1 / 5,
  })  # fmt: skip


def test_a_photo_not_shared_is_wrong(perfect, dialogues, monkeypatch):
  def mute(generator, dialogues, prompts, counts, options, kept):
    silence = generate.Reply((), "cream or pink", None, True)
    kept.add_replies(dict.fromkeys(prompts, silence))

  monkeypatch.setattr(answering, "respond", mute)
  monkeypatch.setattr(
    generate.Generator,
    "draw",
    lambda self, captions, seeds: np.zeros((0, 8, 8, 3), np.uint8),
  )
  metrics = assess.assess(perfect, dialogues).figures.metrics
  assert metrics["photo_recall"] == metrics["photo_f1"] == 0
  assert metrics["pixel_accuracy"] == 0  # It names two walls.
  assert set(metrics["attribute_accuracy"].values()) == {0.0}


def test_one_wrong_detail_is_one_wrong_attribute(
  perfect, dialogues, monkeypatch
):
  right = generate.Generator.draw
  other = {"red": "blue"}

  def draw(self, captions, seeds):
    photos = right(self, captions, seeds)
    for i, photo in enumerate(photos):
      scene = synthetic.measure(photo)
      scene["colour"] = other.get(scene["colour"], "red")
      photos[i] = synthetic.draw(scene, 32)
    return photos

  monkeypatch.setattr(generate.Generator, "draw", draw)
  figures = assess.assess(perfect, dialogues).figures
  accuracy = figures.metrics["attribute_accuracy"]
  assert accuracy["colour"] == accuracy["told"] == 0
  assert accuracy["mean"] == accuracy["captioned"] == 1


def test_perplexity_is_that_of_a_plain_sum(generator, dialogues):
  model, params, spec = generator.model, generator.params, generator.spec
  nats = tokens = 0
  for dialogue in dialogues[:4]:
    example = dialogue_lib.encode_example(
      dialogue.turns, 0, generator.tokenizer, spec
    )
    row = dialogue_lib.left_pad(
      [example], spec.length, generator.tokenizer, spec, generator.see
    )
    hidden, _ = jax.jit(model.converse)(
      params,
      row["tokens"],
      row["positions"],
      row["segments"],
      model.perceive(params, row["photos_in"]),
      row["visual_index"],
    )
    scores = np.asarray(model.logits(params, hidden)[0], np.float64)
    count = len(example.tokens)
    scores = scores[-count:]
    for place in range(1, count):
      if example.loss_kind[place] == dialogue_lib.TEXT:
        line = scores[place - 1]
        nats += np.log(np.sum(np.exp(line))) - line[example.tokens[place]]
        tokens += 1
  found = assess.text_loss(generator, dialogues[:4])
  assert found.tokens == tokens > 20
  assert found.nats == pytest.approx(nats, rel=1e-4)
  # In one batch or in many, trained on all text or not: the same.
  settings = dataclasses.replace(generator.settings, batch_size=3)
  other = generate.Generator(
    model,
    params,
    generator.tokenizer,
    None,
    dataclasses.replace(spec, text_on="all"),
    settings,
  )
  assert assess.text_loss(other, dialogues[:4]).nats == pytest.approx(
    found.nats, rel=1e-5
  )


def test_prompts_are_answered_whatever_their_order(generator, dialogues):
  prompts = [
    transcript.Prompt(n, 0, spoken.start)
    for n, dialogue in enumerate(dialogues[:5])
    for spoken in dialogue_lib.merge_turns(dialogue.turns)
    if spoken.speaker == 0
  ]
  counts = collections.Counter()
  replies = answering.respond(generator, dialogues, prompts, counts)
  assert set(replies) == set(prompts)
  again = answering.respond(generator, dialogues, prompts[::-1], counts)
  assert again == replies
  for prompt in prompts[-2:]:
    alone = generator.respond([
      dialogue_lib.encode_context(
        dialogues[prompt.number].turns, 0, generator.tokenizer,
        generator.spec, upto=prompt.upto,
      )
    ])  # fmt: skip
    assert alone == [replies[prompt]]
  assert not +counts


def real_dialogues(run):
  sample = __file__.rpartition("/")[0] + "/data/photochat_sample"
  found, _ = photochat.read_split(sample, run.eval.split, "labels")
  return found[:4]


def test_data_without_facts_lack_figures_and_say_why(run, generator):
  found = assess.assess(generator, real_dialogues(run))
  for name in ("pixel_accuracy", "attribute_accuracy"):
    assert found.figures.metrics[name] is found.figures.chance[name] is None
    assert found.figures.reasons[name]
  assert found.counts["photo_turns"] == 4  # One in each of the four.
  assert found.figures.metrics["perplexity"] > 1
  json.dumps(found.figures.metrics, allow_nan=False)
  rows = {row.name: row for row in evaluate.rows_of(found.figures)}
  assert report.number(rows["pixel_accuracy"].value) == "–"
  assert rows["pixel_accuracy"].note


def test_a_broken_photo_is_a_missing_one(generator, dialogues, tmp_path):
  broken = tmp_path / "broken.jpg"
  broken.write_text("<html>")
  dialogue = next(d for d in dialogues if own_photos([d]))
  turns = tuple(
    dataclasses.replace(t, photo=dataclasses.replace(t.photo, path=broken))
    if t.photo
    else t
    for t in dialogue.turns
  )
  count = sum(t.photo is not None for t in turns)
  found = assess.assess(generator, [dataclasses.replace(dialogue, turns=turns)])
  assert found.counts["photos_unreadable"] == count
  assert found.figures.metrics["pixel_accuracy"] is None  # Nothing was in view.
  shown = showcase.example(found.dialogues[0], 0, {"": found}, 32)
  assert len(shown.bubbles) == len(dialogue_lib.merge_turns(turns))


@pytest.fixture(scope="module")
def workdir(run, tmp_path_factory):
  """A run with a checkpoint of random parameters."""
  workdir = tmp_path_factory.mktemp("run")
  params = jax.tree.map(
    jnp.asarray, toy_agent.random_params(PhotoChat(run.model))
  )
  state = TrainState(
    step=jnp.int32(7),
    params=params,
    opt_state=(),
    ema={p: jax.tree.map(lambda x: x / 2, params[p]) for p in run.ema.parts},
    latent_scale=jnp.float32(0.5),
  )
  with manager.Checkpoints(workdir, model=run.as_dict()["model"]) as saved:
    saved.save(7, state, {})
  return workdir


def test_the_whole_job(run, workdir, dialogues, capsys):
  started = 1.0  # Long ago: seconds count the whole job.
  metrics = evaluate.evaluate(run, workdir, started)
  written = json.loads((workdir / "eval" / "metrics.json").read_text())
  assert json.loads(json.dumps(metrics)) == written
  assert set(written) == NAMES | {
    "seconds", "chance", "reasons", "counts", "split", "step", "config",
    "seed", "versions", "git_commit", "sizes", "thresholds",
    "weights", "data", "captions_read", "devices",
  }  # fmt: skip
  assert set(written["attribute_accuracy"]) == ATTRIBUTES
  assert set(written["chance"]) == NAMES
  assert set(written["chance"]["attribute_accuracy"]) == ATTRIBUTES
  assert written["seconds"] > 1e9
  assert (written["split"], written["step"], written["seed"]) == ("test", 7, 0)
  assert written["config"]["data"]["num_test"] == 12
  assert written["versions"]["jax"] == jax.__version__
  assert [p.name for p in workdir.rglob("metrics.json")] == ["metrics.json"]
  # Measured again it is the same, in a folder of its own.
  again = evaluate.evaluate(run, workdir, folder="again")
  assert reproduce.figures(written, json.loads(json.dumps(again)), 0.0) == []
  assert reproduce.making(written, json.loads(json.dumps(again))) == []
  assert (workdir / "again" / "report.html").exists()
  # Another photo is other data.
  other = dataclasses.replace(dialogues[0], id="other")
  assert schema.digest([other]) != schema.digest(dialogues[:1])
  shown = capsys.readouterr().out
  for name in (*NAMES - {"attribute_accuracy"}, "attribute_accuracy/told"):
    assert name in shown
  page = (workdir / "eval" / "report.html").read_text()
  assert page.count("<section>") == 12
  photos = sum(t.photo is not None for d in dialogues for t in d.turns)
  assert page.count("data:image/png;base64,") >= photos > 5


def test_stopped_anywhere_it_goes_on(run, workdir, monkeypatch):
  calls = collections.Counter()
  left = [math.inf]

  def counted(name):
    real = getattr(generate.Generator, name)

    def call(self, *args, **kwargs):
      if calls.total() == left[0]:
        raise KeyboardInterrupt
      calls[name] += 1
      found = real(self, *args, **kwargs)
      if name == "respond":  # It knows nothing, so it never shares a photo.
        return [reply._replace(caption=f"a {reply.text}") for reply in found]
      return found

    monkeypatch.setattr(generate.Generator, name, call)

  counted("respond")
  counted("draw")
  # Two rows a batch: several of each.
  run = dataclasses.replace(
    run, eval=dataclasses.replace(run.eval, batch_size=2, max_dialogues=5)
  )
  straight = evaluate.evaluate(run, workdir, folder="straight")
  all_calls, part = calls.copy(), workdir / "stopped" / "turns.jsonl.part"
  assert min(all_calls.values()) > 1
  # While it writes, and then, when it has gone on, while it draws.
  for stop in (3, all_calls["respond"] - 3 + 1):
    calls.clear()
    left[0] = stop
    with pytest.raises(KeyboardInterrupt):
      evaluate.evaluate(run, workdir, folder="stopped")
    # Killed in the middle of a line.
    part.write_text(part.read_text() + '{"number": 0, "si')
  calls.clear()
  left[0] = math.inf
  resumed = evaluate.evaluate(run, workdir, folder="stopped")
  assert calls == {"draw": all_calls["draw"] - 1}  # Nothing twice.
  assert not part.exists()
  assert reproduce.figures(straight, resumed, 0.0) == []
  written = [
    transcript.read(workdir / name) for name in ("stopped", "straight")
  ]
  assert written[0].replies == written[1].replies
  assert len(written[0].replies) > 8 and written[0].photos
  assert written[0].photos.keys() == written[1].photos.keys()
  for prompt, photo in written[0].photos.items():
    np.testing.assert_array_equal(photo, written[1].photos[prompt])
  # Of other settings nothing is taken.
  calls.clear()
  part.write_text((workdir / "straight" / "turns.jsonl").read_text())
  other = dataclasses.replace(run.eval, max_new_tokens=7)
  evaluate.evaluate(
    dataclasses.replace(run, eval=other), workdir, folder="stopped"
  )
  assert calls["respond"] == all_calls["respond"]
  # Photos of before are gone, those of now are there.
  kept = transcript.read(workdir / "stopped")
  names = {p.name for p in (workdir / "stopped" / "photos").iterdir()}
  assert names == {transcript.photo_name(p)[7:] for p in kept.photos}
  with pytest.raises(ValueError, match="evaluate the run first"):
    transcript.read(workdir / "nowhere")


def test_what_is_sampled_depends_on_the_dialogue_alone(generator, dialogues):
  options = Options("nucleus", top_p=1.0, temperature=3.0)

  def sampled(dialogues):
    prompts = list(said.model_turns(dialogues, (0,)))
    kept = transcript.Transcript()
    replies = answering.respond(
      generator, dialogues, prompts, collections.Counter(), options, kept
    )
    turns = [
      said.ModelTurn(
        p, None, "gold", replies[p]._replace(caption="a star")
      )
      for p in prompts
    ]
    answering.draw(generator, dialogues, turns, 5, kept)
    return {
      (dialogues[p.number].id, p.upto): (replies[p].tokens, kept.photos[p])
      for p in prompts
    }

  one, two = sampled(dialogues[:4]), sampled(dialogues[3:0:-1])
  assert set(two) < set(one)
  for name, (tokens, photo) in two.items():
    assert one[name][0] == tokens
    # In another place of a batch: the same but for rounding.
    np.testing.assert_allclose(
      one[name][1].astype(int), photo.astype(int), atol=1
    )
  assert len({photo.tobytes() for _, photo in one.values()}) == len(one)
  assert len({tokens for tokens, _ in one.values()}) > len(one) / 2


def test_the_model_may_say_both_sides(generator, dialogues):
  alone = [
    assess.text_loss(generator, dialogues[:3], (side,)) for side in (0, 1)
  ]
  both = assess.text_loss(generator, dialogues[:3], (0, 1))
  assert both.tokens == sum(loss.tokens for loss in alone)
  assert both.nats == pytest.approx(sum(loss.nats for loss in alone))
  settings = dataclasses.replace(generator.settings, speakers="both")
  other = generate.Generator(
    generator.model, generator.params, generator.tokenizer,
    generator._clip_tokenizer, generator.spec, settings,
  )  # fmt: skip
  found = assess.assess(other, dialogues[:3])
  merged = [s for d in dialogues[:3] for s in dialogue_lib.merge_turns(d.turns)]
  assert [t.spoken.speaker for t in found.turns] == [s.speaker for s in merged]
  assert {t.spoken.speaker for t in found.turns} == {0, 1}
  assert found.counts["model_turns"] == len(merged)
  assert found.counts["photo_turns"] == sum(
    any(isinstance(p, schema.Photo) for p in s.parts) for s in merged
  )
  assert found.counts["text_tokens"] == both.tokens


def test_averaged_weights_and_latent_scale_are_used(run, workdir):
  generator, step = generate.open_generator(run, workdir, batch_size=3)
  assert step == 7 and generator.settings.batch_size == 3
  params = toy_agent.random_params(PhotoChat(run.model))
  halved = {p: jax.tree.map(lambda x: x / 2, params[p]) for p in run.ema.parts}
  other = generate.Generator(
    generator.model, params, *inputs.load_tokenizers(run), generator.spec,
    generator.settings, latent_scale=np.float32(0.5), ema=halved,
  )  # fmt: skip
  np.testing.assert_array_equal(
    generator.draw(["a"], [1]), other.draw(["a"], [1])
  )


def test_mistakes_are_told_in_a_sentence(run, workdir, tmp_path):
  with pytest.raises(manager.CheckpointError, match="no checkpoint"):
    evaluate.evaluate(run, tmp_path)
  other = dataclasses.replace(
    run.model, language=toy_agent.config(768).language
  )
  other = dataclasses.replace(
    other, language=dataclasses.replace(other.language, num_hidden_layers=1)
  )
  with pytest.raises(manager.CheckpointError, match="num_hidden_layers"):
    evaluate.evaluate(dataclasses.replace(run, model=other), workdir)
  (tmp_path / "set" / "train").mkdir(parents=True)
  data = dataclasses.replace(
    run.data, source="photochat", path=str(tmp_path / "set")
  )
  with pytest.raises(config_lib.ConfigError, match="config.eval.split"):
    evaluate.evaluate(dataclasses.replace(run, data=data), workdir)


@pytest.mark.parametrize("nats", [1e9, math.nan])
def test_a_hopeless_perplexity_is_still_json(
  perfect, dialogues, monkeypatch, nats
):
  monkeypatch.setattr(assess, "text_loss", lambda *_: text.TokenLoss(nats, 1))
  found = assess.assess(perfect, dialogues[:2])
  assert found.figures.metrics["perplexity"] is None
  assert "diverged" in found.figures.reasons["perplexity"]
  json.dumps(found.figures.metrics, allow_nan=False)


def test_photo_of_a_turn_without_one_in_the_data_is_not_measured():
  turn = types.SimpleNamespace(
    gold=None, reply=generate.Reply((), "", "a b", False)
  )
  asked = []
  drawer = types.SimpleNamespace(
    settings=types.SimpleNamespace(batch_size=1),
    draw=lambda captions, seeds: asked.extend(captions) or [],
  )
  answering.draw(drawer, [], [turn], 0, transcript.Transcript())
  assert asked == []
