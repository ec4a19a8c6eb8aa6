"""Settings: made once, changed as people expect, refused with a sentence."""

import dataclasses
import json
import pathlib

import pytest

from photochat_jax import config as config_lib
from photochat_jax import config_check
from photochat_jax.data import records, sources
from photochat_jax.models.llama import LlamaConfig
from photochat_jax.models.unet import UNetConfig


def test_the_defaults_build_the_default_run():
  assert config_lib.build(config_lib.default()) == config_lib.RunConfig()
  assert config_lib.build({}) == config_lib.RunConfig()


def test_a_run_goes_through_json_and_back():
  config = config_lib.default()
  config.model.language.rope_scaling = (
    ("factor", 8.0),
    ("rope_type", "linear"),
  )
  config.stages.joint.losses.photo = ((0, 0.0), (50, 2.0))
  run = config_lib.build(config)
  assert config_lib.build(json.loads(json.dumps(run.as_dict()))) == run
  assert run.model.language.rope_scaling[0] == ("factor", 8.0)
  assert run.stages[-1].losses.photo == ((0, 0.0), (50, 2.0))


def test_a_run_is_frozen_and_can_be_a_static_argument():
  run = config_lib.RunConfig()
  assert hash(run) == hash(config_lib.build(config_lib.default()))
  with pytest.raises(dataclasses.FrozenInstanceError):
    run.seed = 3


def test_changes_arrive_where_they_belong():
  config = config_lib.default()
  config.optim.learning_rate = 3  # A whole number for a fraction.
  config.bridge.draw = "gumbel"
  config.model.unet = config_lib.section(UNetConfig.tiny(sample_size=16))
  config.stages.joint.steps = 7
  config.stages.joint.losses.text = 2
  run = config_lib.build(config)
  assert run.optim.learning_rate == 3.0
  assert type(run.optim.learning_rate) is float
  assert run.bridge.draw == run.model.bridge.draw == "gumbel"
  assert run.model.unet.sample_size == 16
  assert run.stages[2].steps == 7 and run.stages[2].losses.text == 2.0


def test_stages_run_in_the_order_given_and_may_be_added():
  config = config_lib.default()
  config.stages.talk = config_lib.section(
    config_lib.StageConfig(losses=config_lib.StageLosses(text=1.0))
  )
  config.stage_order = ("talk", "generator")
  run = config_lib.build(config)
  assert [stage.name for stage in run.stages] == ["talk", "generator"]
  assert run.stages[0].losses.text == 1.0
  assert run.stages[1] == config_lib.RunConfig().stages[1]


def test_a_real_size_is_one_line():
  config = config_lib.default()
  config.model.language = config_lib.section(LlamaConfig.llama2_7b())
  run = config_lib.build(config)
  assert run.model.language == LlamaConfig.llama2_7b()


def test_every_field_has_one_comment():
  source = pathlib.Path(config_lib.__file__).read_text("utf-8").splitlines()
  sections = [
    value
    for value in vars(config_lib).values()
    if dataclasses.is_dataclass(value)
    and value.__module__ == config_lib.__name__
  ]
  assert config_lib.RunConfig in sections
  bare = []
  for section in sections:
    for field in dataclasses.fields(section):
      rows = [
        number
        for number, line in enumerate(source)
        if line.startswith(f"  {field.name}: ")
      ]
      if not any(
        "  # " in source[row] or source[row - 1].startswith("  # ")
        for row in rows
      ):
        bare.append(f"{section.__name__}.{field.name}")
  # The sections themselves are told by their docstrings.
  parts = ("model", "loss", "optim", "ema", "mesh", "checkpoint", "log", "eval")
  parts += ("data", "pretrained", "stages", "health")
  told = {f"RunConfig.{name}" for name in parts}
  assert set(bare) <= told


@pytest.mark.parametrize(
  "fields, sentence",
  [
    ({"optm": {}}, "config has no field 'optm'; did you mean 'optim'"),
    ({"optim": {"learn_rate": 1.0}}, "did you mean 'learning_rate'"),
    ({"stages": {"joint": {"stps": 1}}}, "stages.joint has no field 'stps'"),
    ({"bridge": {"drow": "gold"}}, "config.bridge has no field 'drow'"),
    ({"model": {"unet": {"depth": 1}}}, "config.model.unet has no field"),
    ({"stages": {"a": {}}, "stage_order": ("b",)}, "no field 'b'"),
    ({"seed": "one"}, "config.seed must be of type int"),
    ({"eval": 3}, "config.eval is a section"),
    ({"data": {"source": "web"}}, "must be one of synthetic, photochat"),
    ({"eval": {"sampler": "heun"}}, "config.eval.sampler must be one of ddpm"),
    ({"eval": {"sampler": "lcm", "sampler_steps": 60}}, "eval.sampler: "),
    ({"pretrained": {"run": "a", "llm": "b"}}, "give it alone"),
    ({"data": {"source": "photochat"}}, "--config.data.path=DIR"),
    ({"data": {"source": "dialogcc"}}, "'dialogcc', which needs --config.data"),
    ({"data": {"caption_source": "none"}}, "labels, description, written"),
    ({"data": {"max_broken": 1.5}}, "max_broken is a share, from 0 to 1"),
    ({"data": {"mix": (("web", "d", 1.0),)}}, "holds (source, path, weight)"),
    ({"data": {"mix": (("photochat", "d"),)}}, "not ('photochat', 'd')"),
    ({"data": {"mix": (("photochat", "d", 0.0),)}}, "a weight above 0"),
    ({"data": {"mix": (("photochat", "", 1),)}}, "a weight above 0"),
    ({"data": {"mix": ("photochat", "d", 1.0)}}, "a weight above 0"),
    ({"data": {"moments": "m", "crop": True}}, "config.data.crop must be"),
    ({"data": {"moments": "m"}}, "stages.autoencoder trains the autoencoder"),
    (
      {
        "data": {"moments": "m"},
        "stages": {"new": {"losses": {"photo": 1.0}}},
        "stage_order": ("new",),
      },
      "stages.new trains the autoencoder",
    ),
    ({"bridge": {"matrix": "dense"}}, "bridge.matrix is 'dense'"),
    ({"bridge": {"max_tokens": 256}}, "must be less than config.data.length"),
    (
      {"model": {"text": {"hidden_size": 32}}},
      "unet.cross_attention_dim is 64 and must equal config.model.text",
    ),
    (
      {"model": {"vision": {"hidden_size": 48}}},
      "qformer.encoder_hidden_size is 96 and must equal config.model.vision",
    ),
    (
      {"model": {"perceiver": "cnn"}},
      "model.perceiver must be one of qformer, linear, caption, not 'cnn'",
    ),
    (
      {"model": {"vae": {"tile_size": 40}}},
      "config.model.vae: tile_size 40 must be a multiple of 16",
    ),
    ({"log": {"every_steps": 0}}, "log.every_steps must be at least 1"),
    ({"eval": {"method": "best"}}, "config.eval.method is 'best'; it must be"),
    ({"eval": {"top_p": 1.5}}, "config.eval.top_p is 1.5; it must be"),
    ({"eval": {"speakers": "all"}}, "eval.speakers must be one of model, both"),
    ({"data": {"train_share": 0.0}}, "data.train_share is a share, above 0"),
    ({"stages": {"joint": {"data": "videos"}}}, "joint.data must be one of"),
    ({"stages": {"joint": {"batch_size": 0}}}, "batch_size >= 1"),
    ({"stages": {"new": {}}}, "stages.new.losses are all 0"),
    (
      {"stages": {"new": {"data": "photos", "losses": {"text": 1.0}}}},
      "stages.new.losses.text needs data=dialogues",
    ),
    (
      {"stages": {"joint": {"losses": {"photo": "much"}}}},
      "losses.photo must be of type float",
    ),
  ],
)
def test_what_cannot_be_used_is_told_in_one_sentence(fields, sentence):
  with pytest.raises(config_lib.ConfigError) as caught:
    config_lib.build(fields)
  message = str(caught.value)
  assert sentence in message
  assert "\n" not in message and message.endswith((".", "?"))


def test_data_sets_are_those_that_can_be_read():
  names = config_check._CHOICES["data.source"]
  assert names == ("synthetic", *sources.READERS)
  kinds = config_check._CHOICES["data.caption_source"]
  assert kinds == records.CAPTION_SOURCES
  assert config_lib.DataConfig().max_broken == records.MAX_BROKEN


def test_a_mixture_and_moments_are_built_as_they_are_given():
  config = config_lib.default()
  config.data.mix = (("dialogcc", "data/dialogcc", 0.5),)
  config.data.moments = "moments"
  config.stage_order = ("generator", "joint")
  run = config_lib.build(config)
  assert run.data.mix == (("dialogcc", "data/dialogcc", 0.5),)
  # As it comes out of a workdir's config.json.
  again = config_lib.build(json.loads(json.dumps(run.as_dict())))
  assert again == run


def test_without_a_qformer_its_numbers_do_not_matter():
  model = {"perceiver": "linear", "vision": {"hidden_size": 48}}
  run = config_lib.build({"model": model})
  # 32 x 32 pixels in patches of 8 x 8.
  assert run.model.num_visual_tokens == 16
  assert config_lib.RunConfig().model.num_visual_tokens == 4


def test_a_model_that_reads_captions_has_no_eyes_to_train():
  eyes = "(vision_model|qformer|language_projection)/.*"
  stages = {
    "joint": {
      "data": "dialogues",
      "losses": {"text": 1.0},
      "trainable": (eyes, ".*", "unet/.*", "(qformer|unet)/.*", "unets/.*"),
    }
  }

  def trainable(perceiver):
    model = {"perceiver": perceiver}
    run = config_lib.build({"model": model, "stages": stages})
    return run.stages[0].trainable

  assert trainable("qformer") == stages["joint"]["trainable"]
  assert trainable("caption") == stages["joint"]["trainable"][1:]
  assert trainable("linear") == trainable("qformer")
  stages["joint"]["data"] = "descriptions"
  with pytest.raises(config_lib.ConfigError, match="does not see: leave it"):
    trainable("caption")


def test_check_path_knows_the_settings_of_any_stage():
  config_lib.check_path("optim.learning_rate")
  config_lib.check_path("stages.mine.losses.text")
  config_lib.check_path("stage_order")
  for path in ("optim.lr", "stages.mine.lr", "optim.eps.more", "optimm"):
    with pytest.raises(config_lib.ConfigError):
      config_lib.check_path(path)
