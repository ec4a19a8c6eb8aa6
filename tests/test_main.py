"""The command line: what is wrong is told in one sentence."""

import json
import subprocess
import sys
import types

import jax.numpy as jnp
import pytest
from absl import flags

from photochat_jax import config as config_lib
from photochat_jax import main, record, sharding
from photochat_jax.checkpoints import manager

CONFIG = """
from photochat_jax import config

def get_config(arg=""):
  if arg not in ("", "small"):
    raise ValueError(f"The argument is {arg!r}; it must be 'small'.")
  return config.default()
"""


@pytest.fixture
def config_file(tmp_path):
  file = tmp_path / "some_config.py"
  file.write_text(CONFIG)
  return file


@pytest.fixture
def call(monkeypatch, capsys):
  """Runs the command line in this process: arguments -> (code, error)."""

  def run(*arguments):
    argv = ["photochat_jax", *arguments]
    # config_flags looks for the changed fields in the process's arguments.
    monkeypatch.setattr(sys, "argv", argv)
    code = 0
    try:
      main.main(main._parse(argv))
    except SystemExit as stop:
      code = stop.code
    return code, capsys.readouterr().err

  yield run
  for name in list(flags.FLAGS):
    if name.startswith("config."):
      delattr(flags.FLAGS, name)
  for name in ("config", "workdir", "mode"):
    flags.FLAGS[name].unparse()
    flags.FLAGS[name].value = flags.FLAGS[name].default
  flags.FLAGS.unparse_flags()


@pytest.fixture
def seen(monkeypatch):
  """Puts functions that note their arguments in the place of the modes."""
  calls = []
  for name in ("train", "evaluate", "chat"):
    module = types.ModuleType(f"photochat_jax.{name}")
    setattr(
      module,
      name,
      lambda *args, name=name: calls.append((name, *args[:2])),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
  return calls


def assert_sentence(answer, *parts):
  code, error = answer
  assert code == 2
  assert error.startswith("photochat_jax: ") and error.count("\n") == 1
  for part in parts:
    assert part in error


def test_an_unknown_field_names_the_nearest(call, config_file, tmp_path):
  answer = call(
    f"--config={config_file}",
    f"--workdir={tmp_path}",
    "--config.optim.learning_rat=1e-4",
  )
  assert_sentence(answer, "'learning_rat'", "did you mean 'learning_rate'?")


def test_a_field_of_the_wrong_type(call, config_file, tmp_path):
  answer = call(f"--config={config_file}", "--config.optim.eps=small")
  assert_sentence(answer, "--config.optim.eps=small")


def test_values_that_do_not_fit_together(call, config_file, tmp_path):
  answer = call(
    f"--config={config_file}",
    f"--workdir={tmp_path}",
    "--config.data.source=photochat",
  )
  assert_sentence(answer, "--config.data.path=DIR")


def test_no_workdir(call, config_file):
  assert_sentence(call(f"--config={config_file}"), "--workdir=DIR")


def test_no_config(call, tmp_path):
  assert_sentence(call(f"--workdir={tmp_path}"), "--config=FILE")


def test_a_field_without_a_config(call, tmp_path):
  answer = call(f"--workdir={tmp_path}", "--config.seed=3")
  assert_sentence(answer, "--config.seed needs a --config=FILE")


def test_a_config_file_that_is_not_there(call, tmp_path):
  answer = call(f"--config={tmp_path}/nothing.py", f"--workdir={tmp_path}")
  assert_sentence(answer, "nothing.py")


def test_a_config_argument_it_does_not_know(call, config_file, tmp_path):
  answer = call(f"--config={config_file}:large", f"--workdir={tmp_path}")
  assert_sentence(answer, "it must be 'small'")


def test_a_mode_there_is_not(call, config_file):
  answer = call(f"--config={config_file}", "--mode=tran")
  assert_sentence(answer, "--mode=tran", "train|evaluate|chat")


def test_an_unknown_flag_and_a_stray_word(call, config_file):
  assert_sentence(call("--wrokdir=x"), "wrokdir", "workdir")
  assert_sentence(call(f"--config={config_file}", "x"), "'x' is not a flag")


@pytest.mark.parametrize("mode", ["chat", "evaluate"])
def test_a_workdir_without_a_run(call, tmp_path, mode):
  answer = call(f"--workdir={tmp_path}", f"--mode={mode}")
  assert_sentence(answer, "config.json is not there")


def test_a_record_that_is_broken(call, tmp_path):
  (tmp_path / "config.json").write_text('{"config": ')
  answer = call(f"--workdir={tmp_path}", "--mode=chat")
  assert_sentence(answer, "config.json cannot be read")


def test_a_checkpoint_of_another_config(call, seen, config_file, tmp_path):
  run = config_lib.RunConfig()
  model = run.as_dict()["model"]
  model["unet"]["layers_per_block"] = 2
  with manager.Checkpoints(tmp_path, model=model) as checkpoints:
    checkpoints.save(1, {"params": {"kernel": jnp.ones(2)}}, {})
  answer = call(f"--config={config_file}", f"--workdir={tmp_path}")
  assert_sentence(
    answer, "another config", "model.unet.layers_per_block is 2 there and 1"
  )
  assert seen == []
  # The record of the run it belongs to is not written over.
  assert not (tmp_path / "config.json").exists()


def test_changed_fields_arrive_and_are_recorded(
  call, seen, config_file, tmp_path
):
  code, error = call(
    f"--config={config_file}:small",
    f"--workdir={tmp_path}/run",
    "--config.stages.joint.steps=300",
    "--config.optim.learning_rate=1e-4",
    "--config.stage_order=('joint',)",
    "--config.stages.joint.losses.photo=((0, 0.0), (9, 1.0))",
  )
  assert (code, error) == (0, "")
  assert [name for name, _, _ in seen] == ["train", "evaluate"]
  for _, run, workdir in seen:
    assert workdir == f"{tmp_path}/run"
    assert [stage.name for stage in run.stages] == ["joint"]
    assert run.stages[0].steps == 300 and run.optim.learning_rate == 1e-4
    assert run.stages[0].losses.photo == ((0, 0.0), (9, 1.0))
  assert record.read(f"{tmp_path}/run") == seen[0][1]
  written = json.loads((tmp_path / "run" / "config.json").read_text())
  assert written["versions"]["jax"] and "git_commit" in written


@pytest.mark.parametrize("mode", ["chat", "evaluate"])
def test_other_modes_read_the_record(call, seen, tmp_path, mode):
  run = config_lib.build({"seed": 5})
  record.write(run, tmp_path)
  assert call(f"--workdir={tmp_path}", f"--mode={mode}") == (0, "")
  assert seen == [(mode, run, str(tmp_path))]


def test_what_the_package_raises_later_is_a_sentence_too(
  call, seen, config_file, tmp_path, monkeypatch
):
  module = sys.modules["photochat_jax.chat"]
  monkeypatch.setattr(module, "chat", lambda *_: sharding.make_mesh(5))
  answer = call(
    f"--config={config_file}", f"--workdir={tmp_path}", "--mode=chat"
  )
  assert_sentence(answer, "The mesh data=5")


def test_errors_of_others_keep_their_traceback(
  call, seen, config_file, tmp_path, monkeypatch
):
  module = sys.modules["photochat_jax.chat"]
  monkeypatch.setattr(module, "chat", lambda *_: json.loads("{"))
  with pytest.raises(ValueError, match="property name"):
    call(f"--config={config_file}", f"--workdir={tmp_path}", "--mode=chat")


def test_the_module_runs_as_a_program(tmp_path):
  program = subprocess.run(
    [sys.executable, "-m", "photochat_jax.main", f"--workdir={tmp_path}"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert_sentence((program.returncode, program.stderr), "--config=FILE")
