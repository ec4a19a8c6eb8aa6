"""The main job on a laptop: every real module at toy size, on a CPU.

python -m photochat_jax.main --config=configs/tiny.py --workdir=runs/tiny

Synthetic photo dialogues are written to WORKDIR/data, the parts are trained
apart and then jointly, and a table and a report are made of dialogues whose
scenes were never seen in training: about ten minutes and 4.1 GB on two cores.
The README has the figures to expect.

On a folder in PhotoChat's layout instead:

python -m photochat_jax.main --config=configs/tiny.py:photochat \
  --config.data.path=DIR --workdir=runs/photochat
"""

import ml_collections

from photochat_jax.config import StageConfig, StageLosses, default, section
from photochat_jax.diffusion.schedule import ScheduleConfig
from photochat_jax.models.clip_text import CLIPTextConfig
from photochat_jax.models.llama import LlamaConfig
from photochat_jax.models.unet import UNetConfig
from photochat_jax.models.vae import VAEConfig
from photochat_jax.models.vit import ViTConfig


def get_config(source: str = "synthetic") -> ml_collections.ConfigDict:
  """Returns the settings.

  Args:
    source: "synthetic" or "photochat".
  """
  if source not in ("synthetic", "photochat"):
    raise ValueError(
      f"configs/tiny.py takes 'synthetic' or 'photochat', not {source!r}."
    )
  config = default()
  data = config.data
  data.source = source
  data.length = 256
  data.photos_in = 6
  data.photos_out = 3
  data.flip = False  # Captions say left and right.
  data.system_prompt = ""
  data.num_train = 3000
  data.num_dev = 100
  data.num_test = 160

  model = config.model
  # Photos of 32 x 32 are four patches to the ViT, four tokens to the Llama.
  model.vision = section(ViTConfig.tiny(patch_size=16))
  model.language = section(LlamaConfig.tiny(vocab_size=768))
  model.text = section(
    CLIPTextConfig.tiny(
      vocab_size=768,
      max_position_embeddings=24,
      bos_token_id=766,
      eos_token_id=767,
      pad_token_id=767,
    )
  )
  # Photos of 32 x 32 become latents of 4 x 4 x 16.
  model.vae = section(
    VAEConfig.tiny(block_out_channels=(8, 24, 48, 64), latent_channels=16)
  )
  model.unet = section(
    UNetConfig.tiny(
      sample_size=4,
      in_channels=16,
      out_channels=16,
      block_out_channels=(64, 96),
    )
  )
  model.schedule = section(
    ScheduleConfig(
      prediction_type="v_prediction", timestep_spacing="trailing"
    )
  )
  config.bridge.max_tokens = 16
  if source == "photochat":
    # Real talk is longer, and its captions are Open Images labels.
    data.length = 512
    data.caption_source = "labels"
    model.text.max_position_embeddings = 77
    config.bridge.max_tokens = 64

  eyes = "(vision_model|qformer|language_projection)/.*"
  config.optim.learning_rate = 2e-3
  config.optim.lr_multipliers = (
    (eyes, 0.45),
    ("(unet|text_model)/.*", 0.4),
    (".*", 1.0),
  )
  config.optim.warmup_steps = 50
  config.optim.final_scale = 0.05
  config.ema.decay = 0.99
  config.ema.parts = ("unet", "text_model")
  config.loss.kl = 1e-4
  # Where the object stands is decided in the noise, which min-SNR plays down.
  config.loss.min_snr_gamma = 0.0

  config.stages = ml_collections.ConfigDict(
    {
      "autoencoder": section(
        StageConfig(
          steps=600,
          data="photos",
          batch_size=32,
          trainable=("vae/.*",),
          learning_rate=4e-3,
          losses=StageLosses(autoencoder=1.0),
        )
      ),
      "generator": section(
        StageConfig(
          steps=900,
          data="captions",
          batch_size=48,
          trainable=("(unet|text_model)/.*",),
          learning_rate=2.5e-3,
          losses=StageLosses(photo=1.0),
        )
      ),
      "perceiver": section(
        StageConfig(
          steps=250,
          data="descriptions",
          batch_size=8,
          trainable=("language_model/.*", eyes),
          losses=StageLosses(text=1.0),
        )
      ),
      "dialogue": section(
        StageConfig(
          steps=650,
          data="dialogues",
          batch_size=8,
          trainable=("language_model/.*", eyes),
          losses=StageLosses(text=1.0, caption=2.0),
        )
      ),
      "joint": section(
        StageConfig(
          steps=300,
          data="dialogues",
          batch_size=8,
          trainable=("(language_model|unet)/.*", eyes),
          learning_rate=7e-4,
          losses=StageLosses(text=1.0, caption=1.0, photo=4.0),
        )
      ),
    }
  )
  config.stage_order = (
    "autoencoder",
    "generator",
    "perceiver",
    "dialogue",
    "joint",
  )

  config.checkpoint.every_steps = 1000
  config.log.sample_every = 0  # A sheet at the end of each stage only.
  config.log.num_samples = 8
  config.eval.max_dialogues = 160
  config.eval.batch_size = 64
  config.eval.max_new_tokens = 40
  config.eval.guidance = 2.0
  config.lock()
  return config
