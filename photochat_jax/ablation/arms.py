"""The arms: what each changes of a config, and from which stage on.

Arms of a seed share the runs of the stages before, so they start from the same
weights, and all have the same budget of updates.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Arm(NamedTuple):
  """One way to train.

  Attributes:
    name: short.
    what: for the table.
    changes: fields of the config -> their value, as on the command line.
    since: the first stage that it trains for itself.
    captioned: whether it reads captions of the photos it is shown; they are
      written by what was trained before `since`.
  """

  name: str
  what: str
  changes: Mapping[str, str]
  since: str = "joint"
  captioned: bool = False


_SAMPLED = {"bridge.draw": "gumbel"}
_PHOTO = "stages.joint.losses.photo"
_TRAINABLE = "stages.joint.trainable"
_EYES = "(vision_model|qformer|language_projection)/.*"
_APART = {"bridge.matrix": "none"}
# Parts trained apart: what is shown is captioned for the language model, and
# the generator draws from the caption it writes.
_PIPELINE = {**_APART, "model.perceiver": "caption"}

ARMS = {
  arm.name: arm
  for arm in (
    Arm("aligned", "end to end, aligned", {}),
    Arm(
      "rloo",
      "end to end, RLOO",
      {**_SAMPLED, "bridge.estimator": "rloo", "bridge.matrix": "none"},
    ),
    Arm("all_pairs", "released matrix", {"bridge.matrix": "all_pairs"}),
    Arm("static", "static matrix", {"bridge.matrix": "static"}),
    Arm("none", "both parts trained, no gradient between", _APART),
    Arm("no_photo_loss", "text alone", {_PHOTO: "0.0"}),
    Arm(
      "pipeline",
      "captioner, text model, generator as it was",
      {**_PIPELINE, _PHOTO: "0.0"},
      since="dialogue",
      captioned=True,
    ),
    Arm(
      "pipeline_trained",
      "captioner, text model, generator trained on",
      _PIPELINE,
      since="dialogue",
      captioned=True,
    ),
    Arm(
      "divter",
      "the pipeline with a tenth of the dialogues, as Divter's",
      {**_PIPELINE, _PHOTO: "0.0", "data.train_share": "0.1"},
      since="dialogue",
      captioned=True,
    ),
    Arm(
      "linear",
      "aligned, no Q-Former",
      {"model.perceiver": "linear"},
      since="autoencoder",
    ),
    Arm(
      "frozen",
      "aligned, language model frozen",
      {_TRAINABLE: f"('unet/.*', '{_EYES}')"},
    ),
    Arm(
      "lora",
      "aligned, language model by LoRA",
      {
        "model.lora.rank": "8",
        _TRAINABLE: f"('(language_model/.*/lora_(a|b)|unet/.*)', '{_EYES}')",
      },
    ),
    Arm("aligned_gumbel", "aligned, sampled captions", dict(_SAMPLED)),
    Arm("aligned_argmax", "aligned, likeliest", {"bridge.draw": "argmax"}),
    Arm("reinmax", "aligned, ReinMax", {"bridge.estimator": "reinmax"}),
    Arm(
      "reinmax_gumbel",
      "aligned, ReinMax, sampled captions",
      {**_SAMPLED, "bridge.estimator": "reinmax"},
    ),
    *(
      Arm(f"{name}_x{factor}", f"{what}, photo weight {weight}", changes)
      for factor, weight in (("0.25", "1.0"), ("2.5", "10.0"))
      for name, what, changes in (
        ("aligned", "aligned", {_PHOTO: weight}),
        (
          "rloo",
          "RLOO",
          {
            **_SAMPLED,
            "bridge.estimator": "rloo",
            "bridge.matrix": "none",
            _PHOTO: weight,
          },
        ),
      )
    ),
  )
}

CORE = ("aligned", "rloo", "all_pairs", "static", "none", "pipeline_trained")


def choose(names: Sequence[str]) -> list[Arm]:
  """Arms by name; `core` and `all` stand for several.

  Raises:
    ValueError: there is no such arm.
  """
  groups = {"core": CORE, "all": tuple(ARMS)}
  wanted = [arm for name in names for arm in groups.get(name, (name,))]
  unknown = [name for name in wanted if name not in ARMS]
  if unknown:
    raise ValueError(
      f"There is no arm {unknown[0]!r}; choose core, all, or of "
      f"{', '.join(ARMS)}."
    )
  return [ARMS[name] for name in dict.fromkeys(wanted)]
