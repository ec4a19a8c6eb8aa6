"""The arms: what each changes of a config's joint stage, and why.

All start from the same weights, those at the end of the stages before, and
have the same budget of updates.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Arm(NamedTuple):
  """One way to train the joint stage.

  Attributes:
    name: short.
    what: for the table.
    changes: fields of the config -> their value, as on the command line.
  """

  name: str
  what: str
  changes: Mapping[str, str]


_SAMPLED = {"bridge.draw": "gumbel"}
_PHOTO = "stages.joint.losses.photo"

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
    Arm(
      "none",
      "both parts trained, no gradient between",
      {"bridge.matrix": "none"},
    ),
    Arm("no_photo_loss", "text alone", {_PHOTO: "0.0"}),
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

CORE = ("aligned", "rloo", "all_pairs", "static", "none", "no_photo_loss")


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
