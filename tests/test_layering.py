"""Imports flow one way, and training loads no second framework."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "photochat_jax"

FOLDERS = ("ops.", "models.", "diffusion.", "data.", "metrics.", "checkpoints.")
SHARED = (
  *FOLDERS,
  "config",
  "config_check",
  "state",
  "sharding",
  "losses",
  "progress",
  "runtime.",
)

# (modules, what of ours they may import); the first row that fits a module
# counts. A name ending in '.' stands for a whole folder.
LAYERS = (
  ("ops.", ("ops.",)),
  ("models.photochat", ("models.", "ops.", "diffusion.")),
  ("models.", ("models.", "ops.")),
  # Beside each other.
  ("diffusion.", ("diffusion.", "ops.")),
  ("data.", ("data.", "ops.")),
  ("metrics.", ("metrics.", "ops.")),
  ("checkpoints.", ("checkpoints.", "models.", "diffusion.", "ops.")),
  # What every run is made of.
  ("decoding_options", ()),
  ("config_check", ("diffusion.", "ops.", "decoding_options")),
  ("config", ("models.", "diffusion.", "config_check")),
  ("state", ("ops.",)),
  ("optim", ("ops.", "config")),
  ("sharding", ("ops.", "config")),
  ("losses", ("ops.", "models.", "diffusion.", "config")),
  ("progress", ("ops.",)),
  # What a process does around the step; it counts FLOPs by models' settings.
  ("runtime.", ("runtime.", "models.", "config")),
  ("record", ("config", "checkpoints.")),
  ("inputs", SHARED),
  ("convert", (*SHARED, "inputs", "record")),
  ("export", (*SHARED, "inputs", "record")),
  # From text and photos to text and photos.
  ("decoding", ("ops.", "models.", "diffusion.", "config")),
  ("beam", ("models.", "decoding")),
  ("writing", ("models.", "decoding", "decoding_options", "beam")),
  (
    "generate",
    (*SHARED, "decoding", "decoding_options", "writing", "inputs"),
  ),
  ("transcript", ("runtime.", "generate")),
  (
    "chat",
    (*SHARED, "generate", "captioners", "record", "decoding_options"),
  ),
  ("said", ("data.", "metrics.", "generate", "chat", "transcript")),
  (
    "answering",
    (
      "data.",
      "runtime.",
      "generate",
      "said",
      "decoding_options",
      "transcript",
    ),
  ),
  ("judges", ("models.", "data.", "checkpoints.")),
  ("scores", ("metrics.", "data.", "judges")),
  (
    "assess",
    (
      *SHARED,
      "generate",
      "inputs",
      "chat",
      "objective",
      "judges",
      "scores",
      "answering",
      "said",
      "decoding_options",
      "transcript",
    ),
  ),
  ("showcase", (*SHARED, "generate", "inputs", "chat")),
  (
    "evaluate",
    (
      *SHARED,
      "inputs",
      "generate",
      "chat",
      "assess",
      "judges",
      "showcase",
      "record",
      "transcript",
    ),
  ),
  (
    "compare",
    (
      *SHARED,
      "said",
      "inputs",
      "record",
      "scores",
      "showcase",
      "transcript",
    ),
  ),
  # Training, which needs no data and no tokenizer inside the step.
  ("captions", ("ops.", "models.", "config")),
  ("objective", ("models.", "config", "losses", "captions")),
  (
    "train_step",
    ("ops.", "models.", "config", "state", "optim", "captions", "objective"),
  ),
  ("samples", (*SHARED, "generate")),
  ("initial", (*SHARED, "optim", "inputs", "record")),
  ("validation", (*SHARED, "captions", "objective", "initial")),
  ("latents", SHARED),
  (
    "trainer",
    (
      *SHARED,
      "optim",
      "captions",
      "objective",
      "train_step",
      "validation",
      "latents",
      "samples",
      "initial",
      "feed",
    ),
  ),
  ("train", (*SHARED, "inputs", "initial", "feed", "trainer")),
  # What tools/ start.
  ("encoders", ("ops.", "models.", "data.", "config")),
  ("precompute", (*SHARED, "record", "encoders")),
  (
    "captioners",
    (
      *SHARED,
      "decoding",
      "decoding_options",
      "writing",
      "generate",
      "record",
    ),
  ),
  ("caption_blip2", ("captioners", "decoding_options", *FOLDERS)),
  ("caption", ("data.", "captioners")),
  ("inspection.", ("inspection.", "data.")),
  ("inspect_data", ("inspection.", "data.")),
  ("feed", (*SHARED, "inputs", "encoders")),
  # What the compiler says of the step, without the devices.
  (
    "compiled.",
    (
      *SHARED,
      "compiled.",
      "optim",
      "captions",
      "train_step",
      "inputs",
      "initial",
    ),
  ),
  ("reproduce", ()),
  ("probe", (*SHARED, "captions", "losses", "objective")),
  ("ablation.", ("ablation.", "config", "metrics.")),
  ("main", ("",)),
)


def imports(source: str, module: str) -> set[str]:
  """The modules of the package that a source imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parents = f"photochat_jax.{module}".split(".")[: -node.level]
        base = ".".join([*parents, base]).rstrip(".")
      for alias in node.names:
        file = PACKAGE.parent / f"{base}.{alias.name}".replace(".", "/")
        is_module = base == "photochat_jax" or (
          file.is_dir() or file.with_suffix(".py").exists()
        )
        found.add(f"{base}.{alias.name}" if is_module else base)
  prefix = "photochat_jax."
  return {name.removeprefix(prefix) for name in found if prefix in name + "."}


def wrong_arrows(module: str, source: str) -> list[str]:
  """The imports of a module which point upwards or sideways."""
  for names, allowed in LAYERS:
    if module == names or (names.endswith(".") and module.startswith(names)):
      return [
        f"{module} -> {name}"
        for name in sorted(imports(source, module))
        if not any(
          name == other
          or (other.endswith(".") and f"{name}.".startswith(other))
          or other == ""
          for other in allowed
        )
      ]
  return [f"{module} is in no layer; give it a row in {__file__}"]


def modules() -> list[tuple[str, pathlib.Path]]:
  found = []
  for file in sorted(PACKAGE.rglob("*.py")):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    if parts[-1] != "__init__":
      found.append((".".join(parts), file))
  return found


def test_no_import_points_the_wrong_way():
  found = []
  for module, file in modules():
    found += wrong_arrows(module, file.read_text("utf-8"))
  assert found == []


def test_packages_import_nothing():
  for file in PACKAGE.rglob("__init__.py"):
    assert imports(file.read_text("utf-8"), "x") == set(), file


@pytest.mark.parametrize(
  "module, source, wrong",
  [
    ("ops.rope", "from photochat_jax.models import llama", "models.llama"),
    ("ops.rope", "def f():\n  import photochat_jax.config", "config"),
    ("models.vit", "from photochat_jax.diffusion import schedule", "diffusion"),
    ("models.vit", "from ..data import images", "data.images"),
    ("data.images", "from photochat_jax.metrics import text", "metrics.text"),
    ("metrics.text", "from photochat_jax import train", "train"),
    ("diffusion.samplers", "from photochat_jax.models import unet", "unet"),
    ("checkpoints.manager", "from photochat_jax.state import x", "state"),
    ("chat", "from photochat_jax.evaluate import evaluate", "evaluate"),
    ("evaluate", "from photochat_jax.train import train", "train"),
    ("newcomer", "import jax", "no layer"),
  ],
)
def test_a_wrong_arrow_is_found(module, source, wrong):
  (found,) = wrong_arrows(module, source)
  assert wrong in found


@pytest.mark.parametrize(
  "module, source",
  [
    ("models.photochat", "from photochat_jax.diffusion import schedule"),
    ("models.vit", "from photochat_jax.ops.attention import attention"),
    ("data.pipeline", "from photochat_jax.data import images"),
    ("trainer", "from photochat_jax.train_step import make_train_step"),
    ("ops.rope", "import jax, numpy"),
  ],
)
def test_a_right_arrow_is_let_through(module, source):
  assert wrong_arrows(module, source) == []


PROGRAM = """
import sys
from photochat_jax import losses, optim, sharding, state, train_step
from photochat_jax.diffusion import samplers, schedule
from photochat_jax.models import photochat
from photochat_jax.ops import attention, gumbel, norms, partition, rope
heavy = ("tensorflow", "torch", "transformers", "tokenizers", "diffusers")
print([name for name in heavy if name in sys.modules])
"""


def test_models_and_the_train_step_load_no_second_framework():
  program = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    capture_output=True,
    text=True,
    check=False,
    cwd=PACKAGE.parent,
  )
  assert program.stdout.strip() == "[]", program.stdout + program.stderr
