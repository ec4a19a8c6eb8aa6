"""A whole run at the smallest size: shipped tokenizers, a handful of photos."""

import dataclasses

import toy_agent

from photochat_jax import config as config_lib
from photochat_jax.config import StageConfig, StageLosses
from photochat_jax.data import photochat, synthetic

EYES = "(vision_model|qformer|language_projection)/.*"


def stages(steps=2):
  """Every kind of stage, `steps` updates each."""
  return (
    StageConfig(
      name="autoencoder",
      steps=steps,
      data="photos",
      batch_size=2,
      trainable=("vae/.*",),
      losses=StageLosses(autoencoder=1.0),
    ),
    StageConfig(
      name="generator",
      steps=steps,
      data="captions",
      batch_size=2,
      trainable=("(unet|text_model)/.*",),
      losses=StageLosses(photo=1.0),
    ),
    StageConfig(
      name="joint",
      steps=steps,
      data="dialogues",
      batch_size=2,
      trainable=("(language_model|unet)/.*", EYES),
      losses=StageLosses(text=1.0, caption=1.0, photo=1.0),
    ),
  )


def run_config(bridge=None, steps=2, data=None, **changes):
  """A checked `RunConfig`.

  Args:
    bridge: changes of the bridge.
    steps: updates of each stage.
    data: changes of the data.
    **changes: of the run's other fields.
  """
  model = toy_agent.config(768, 768, 24)
  model = dataclasses.replace(
    model,
    bridge=dataclasses.replace(
      model.bridge, **{"max_tokens": 16, **(bridge or {})}
    ),
  )
  run = config_lib.RunConfig(
    model=model,
    stages=stages(steps),
    compilation_cache="off",
    data=dataclasses.replace(
      config_lib.DataConfig(),
      **{
        "num_train": 12,
        "num_dev": 2,
        "num_test": 4,
        "length": 128,
        "photos_in": 4,
        "photos_out": 2,
        "flip": False,
        "system_prompt": "",
        **(data or {}),
      },
    ),
    log=config_lib.LogConfig(every_steps=1, sample_every=0, num_samples=2),
    eval=config_lib.EvalConfig(
      max_dialogues=4, batch_size=4, max_new_tokens=8, sampler_steps=2
    ),
  )
  return config_lib.build(dataclasses.replace(run, **changes).as_dict())


def train_dialogues(folder, count=12):
  """A few synthetic dialogues with photos, written to a folder."""
  path = synthetic.generate(0, count, 2, 2, folder, 8, 0.25)
  return photochat.read_split(path, "train", "given")[0]
