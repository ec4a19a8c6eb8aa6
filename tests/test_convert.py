"""From Hugging Face folders to a workdir that works, and back to folders."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import hf_folders
import jax
import numpy as np
import pytest

from photochat_jax import config as config_lib
from photochat_jax import (
  convert,
  export,
  initial,
  inputs,
  record,
  sharding,
)
from photochat_jax.checkpoints import files, manager, pretrained
from photochat_jax.compiled.step import abstract_step
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.ops import partition

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

ROOT = pathlib.Path(__file__).parents[1]
ASSETS = ROOT / "photochat_jax" / "data" / "assets"


def photochat_config():
  """The module configs/photochat.py."""
  path = ROOT / "configs" / "photochat.py"
  spec = importlib.util.spec_from_file_location("photochat_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("folders")
  content = json.loads((ASSETS / "llm_tokenizer.json").read_text())
  size = len(content["model"]["vocab"])
  hf_folders.write(root, size)
  shutil.copyfile(ASSETS / "llm_tokenizer.json", root / "llm/tokenizer.json")
  return root


def settings(folders, extra=""):
  names = ",".join(
    f"{name}={folders / name}" for name in ("llm", "blip2", "diffusion")
  )
  config = photochat_config().get_config(names + extra)
  with config.unlocked():
    config.model.lora.rank = 3
    for name in ("vision", "qformer", "language", "text", "unet", "vae"):
      config.model[name].dtype = "float32"
    config.data.length = 128
    config.eval.batch_size = 2
    config.eval.max_new_tokens = 6
    config.eval.sampler_steps = 2
  return config_lib.build(config)


@pytest.fixture(scope="module")
def converted(folders, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("converted") / "run"
  lines = convert.convert(settings(folders), workdir)
  return workdir, lines


def tensors(folder, stem=files.MODEL):
  return {k: np.asarray(v) for k, v in files.Tensors(folder, stem).items()}


def test_what_was_read_is_counted_and_every_array_and_source_has_a_digest(
  folders, converted
):
  workdir, lines = converted
  llm = sum(v.size for v in tensors(folders / "llm").values())
  # Ours is grown from 766 to 768 rows in both tables of 16 columns.
  assert f"language_model: read {llm + 2 * 2 * 16:,} parameters" in lines
  names = list(tensors(folders / "blip2"))
  own = sum(name.startswith("language_model.") for name in names)
  assert f"blip2: ignored language_model ({own} tensors)" in lines
  assert "blip2: ignored language_projection (2 tensors)" in lines
  assert "language_projection: new, random" in lines
  run = record.read(workdir)
  with manager.Checkpoints(workdir, model=run.as_dict()["model"]) as saved:
    meta = saved.read_meta()
    assert set(saved.dtypes()) <= set(meta["digests"])
  unet = meta["sources"]["diffusion/unet"]
  path = folders / "diffusion/unet/diffusion_pytorch_model.safetensors"
  assert unet[path.name] == files.sha256(path)


def test_a_workdir_that_was_moved_keeps_its_tokenizers(converted, tmp_path):
  workdir, _ = converted
  moved = tmp_path / "moved"
  shutil.copytree(workdir, moved)
  run = record.read(moved)
  assert run.data.llm_tokenizer == str(moved / "tokenizers" / "llm")
  llm, clip = inputs.load_tokenizers(run)
  assert llm.vocab_size == 768 and clip.max_length == 12


def test_a_second_conversion_into_the_same_folder_is_refused(
  folders, converted
):
  with pytest.raises(files.WeightsError, match="already holds checkpoints"):
    convert.convert(settings(folders), converted[0])


def test_what_is_exported_is_bytes_equal_and_opens(
  folders, converted, tmp_path
):
  workdir, _ = converted
  export.export(workdir, tmp_path, vocab_size=766)
  for name, stem in (
    ("llm", files.MODEL),
    ("diffusion/unet", files.DIFFUSION),
    ("diffusion/vae", files.DIFFUSION),
  ):
    before, after = (
      tensors(root / name, stem) for root in (folders, tmp_path)
    )
    assert before.keys() == after.keys()
    for key, values in before.items():
      assert values.tobytes() == after[key].tobytes(), key
  model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llm")
  assert model.config.vocab_size == 766
  eyes, info = transformers.Blip2ForConditionalGeneration.from_pretrained(
    tmp_path / "blip2", output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  before = tensors(folders / "blip2")["query_tokens"]
  np.testing.assert_array_equal(eyes.query_tokens.detach().numpy(), before)
  pipe = diffusers.StableDiffusionPipeline.from_pretrained(
    tmp_path / "diffusion"
  )
  assert isinstance(pipe.scheduler, diffusers.PNDMScheduler)
  ids = pipe.tokenizer("a dog", padding="max_length").input_ids
  _, clip = inputs.load_tokenizers(record.read(workdir))
  assert ids == clip.encode_padded("a dog").tolist()


def test_the_photo_marks_are_tokens_of_the_exported_tokenizer(
  converted, tmp_path
):
  workdir, _ = converted
  export.export(workdir, tmp_path, parts=("llm",))
  model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llm")
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(tmp_path / "llm" / "tokenizer.json")
  )
  assert model.config.vocab_size == 768
  assert tokenizer.convert_tokens_to_ids(["[img]", "[/img]"]) == [766, 767]
  embedding = model.model.embed_tokens.weight.detach().numpy()
  mean = embedding[:766].mean(0)
  np.testing.assert_allclose(embedding[766:], [mean, mean], atol=1e-6)


# peft uses what transformers is about to rename.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_can_be_kept_and_comes_out_as_it_went_in(folders, tmp_path):
  peft = pytest.importorskip("peft")
  model = transformers.LlamaForCausalLM.from_pretrained(folders / "llm")
  targets = ["q_proj", "o_proj"]
  model = peft.get_peft_model(
    model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets)
  )
  with torch.no_grad():
    for name, value in model.named_parameters():
      if "lora_B" in name:
        value.normal_(std=0.3)
  model.save_pretrained(tmp_path / "adapter")
  convert.convert(
    settings(folders),
    tmp_path / "run",
    llm_lora=tmp_path / "adapter",
    merge=False,
  )
  assert record.read(tmp_path / "run").model.lora.rank == 3
  export.export(
    tmp_path / "run", tmp_path / "out", parts=("llm",), with_adapters=True
  )
  before, after = (
    tensors(folder, "adapter_model")
    for folder in (tmp_path / "adapter", tmp_path / "out" / "adapters" / "llm")
  )
  assert before.keys() <= after.keys()  # The grown tables are in it too.
  for key, values in before.items():
    np.testing.assert_array_equal(values, after[key], err_msg=key)
  export.export(tmp_path / "run", tmp_path / "merged", ("llm",), vocab_size=766)
  merged = tensors(tmp_path / "merged" / "llm")
  want = model.merge_and_unload().state_dict()
  for target in targets:
    key = f"model.layers.1.self_attn.{target}.weight"
    np.testing.assert_allclose(merged[key], want[key].numpy(), atol=1e-6)


WITHOUT_OTHERS = """
import runpy, sys
others = ("torch", "transformers", "diffusers", "tensorflow", "peft")
sys.modules.update(dict.fromkeys(others))  # None: importing them fails.
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def call_tool(name, *arguments):
  """Runs a tool where no second framework can be imported."""
  command = [sys.executable, "-c", WITHOUT_OTHERS, f"tools/{name}.py"]
  return subprocess.run(
    [*command, *arguments],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_tools_need_no_torch_and_say_what_they_did(folders, tmp_path):
  names = [f"--{n}={folders / n}" for n in ("llm", "blip2", "diffusion")]
  done = call_tool("convert_hf", *names, f"--out={tmp_path / 'run'}")
  assert done.returncode == 0, done.stderr
  assert "blip2: ignored language_model (20 tensors)" in done.stdout
  where = f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"
  done = call_tool("export_hf", *where, "--parts=llm", "--dtype=bfloat16")
  assert done.returncode == 0, done.stderr
  values = tensors(tmp_path / "out" / "llm").values()
  assert {str(v.dtype) for v in values} == {"bfloat16"}
  done = call_tool("export_hf", *where, "--parts=llm")
  assert done.returncode == 1
  assert done.stderr.startswith("export_hf: ") and done.stderr.count("\n") == 1


def test_a_part_that_does_not_exist_is_named(converted, tmp_path):
  with pytest.raises(files.WeightsError, match="no part 'unet'"):
    export.export(converted[0], tmp_path, parts=("unet",))


@pytest.mark.parametrize("source", ["folders", "run"])
def test_training_starts_from_the_weights_where_the_mesh_wants_them(
  source, folders, converted
):
  run = settings(folders)
  if source == "run":
    run = dataclasses.replace(
      run, pretrained=config_lib.PretrainedConfig(run=str(converted[0]))
    )
  model = PhotoChat(run.model)
  mesh = sharding.make_mesh(1, -1, 1)
  leg = initial.Leg(0, run.stages[0], 0, 5)
  llm, _ = inputs.load_tokenizers(run)
  with jax.set_mesh(mesh):
    state = initial.init_state(run, model, mesh, leg, llm)
    abstract = initial.abstract_state(run, model, mesh, leg)
  for (path, leaf), want in zip(
    partition.flatten(state).items(), jax.tree.leaves(abstract), strict=True
  ):
    assert leaf.dtype == want.dtype and leaf.sharding == want.sharding, path
  kernel = tensors(folders / "diffusion/unet", files.DIFFUSION)
  np.testing.assert_array_equal(
    state.params["unet"]["conv_in"]["kernel"],
    kernel["conv_in.weight"].transpose(2, 3, 1, 0),
  )
  projection = state.params["language_projection"]["kernel"]
  assert np.std(projection) > 0
  lora = state.params["language_model"]["layers"]["self_attn"]["q_proj"]
  assert lora["lora_a"].shape == (2, 16, 3)
  assert float(state.latent_scale) == np.float32(0.18215)


def test_weights_of_another_model_name_what_does_not_fit(folders, converted):
  run = settings(folders)
  unet = dataclasses.replace(run.model.unet, block_out_channels=(8, 8))
  run = dataclasses.replace(
    run,
    model=dataclasses.replace(run.model, unet=unet),
    pretrained=config_lib.PretrainedConfig(run=str(converted[0])),
  )
  mesh = sharding.make_mesh()
  leg = initial.Leg(0, run.stages[0], 0, 5)
  with pytest.raises(config_lib.ConfigError, match="unet/down_blocks_1"):
    initial.init_state(run, PhotoChat(run.model), mesh, leg)


def test_the_paper_config_without_weights_has_the_published_sizes():
  run = config_lib.build(photochat_config().get_config("generator=sd15"))
  params = jax.eval_shape(PhotoChat(run.model).init, jax.random.key(0))

  def count(part):
    return sum(leaf.size for leaf in jax.tree.leaves(params[part]))

  assert count("unet") == 859_520_964
  assert count("vae") == 83_653_863
  assert count("text_model") == 123_060_480
  # 6,738,415,616, two rows padded to 128 more in two tables, and LoRA.
  lora = 32 * 3 * 32 * (4096 + 4096) + 32 * 3
  assert count("language_model") == 6_738_415_616 + 2 * 128 * 4096 + lora


def trace_paper_step(argument):
  """The paper's step, traced without weights, data or tokenizer."""
  run = config_lib.build(photochat_config().get_config(argument))
  step = abstract_step(run, sharding.make_mesh())
  return step.function.trace(*step.arguments), step.state


@pytest.mark.parametrize("argument", ["", "generator=sd15,perceiver=linear"])
def test_the_paper_step_needs_no_weights_and_no_tokenizer(argument):
  traced, state = trace_paper_step(argument)
  after, metrics = traced.out_info
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert {"loss", "photo"} <= set(metrics)
  trained = set(partition.flatten(state.opt_state))
  assert any("q_proj/lora_a" in path for path in trained)
  assert not any("vae" in path or "q_proj/kernel" in path for path in trained)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("sice=1", "takes llm, blip2"),
    ("size=7b", "size is '7b'"),
    ("run=a,llm=b", "whole model"),
  ],
)
def test_a_wrong_argument_of_the_paper_config_is_a_sentence(argument, message):
  with pytest.raises(ValueError, match=message):
    photochat_config().get_config(argument)


def test_folders_may_be_left_out(folders):
  sizes = pretrained.read_sizes(
    pretrained.Folders(diffusion=str(folders / "diffusion"))
  )
  assert set(sizes) == {"text", "unet", "vae", "schedule", "sampler"}
  assert sizes["sampler"] == "pndm"
