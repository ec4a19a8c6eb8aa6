"""Sound folders in all their variety: what is read, and as what.

Every value is compared with the original's own state dict by the names that
the tables give; that the numbers then mean the same is `tests/parity`.
"""

import dataclasses
import fnmatch
import shutil

import hf_folders
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from photochat_jax.checkpoints import files, pretrained
from photochat_jax.models.lora import LoRAConfig
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.ops import partition

huggingface_hub = pytest.importorskip("huggingface_hub")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("shapes_once")

PARTS = {
  "llm": {"language_model"},
  "blip2": {"vision_model", "qformer"},
  "diffusion": {"text_model", "unet", "vae"},
}
SIZES = {
  "llm": {"language"},
  "blip2": {"vision", "qformer"},
  "diffusion": {"text", "unet", "vae", "schedule", "sampler"},
}
POSITIONS = "vision_model/position_embedding"


def flat(params):
  return partition.flatten(params)


def assert_same(got, want):
  got, want = flat(got), flat(want)
  assert got.keys() == want.keys()
  for path, array in want.items():
    assert got[path].dtype == array.dtype, path
    np.testing.assert_array_equal(got[path], array, err_msg=path)


@pytest.mark.parametrize(
  "names",
  [
    [],
    ["llm"],
    ["blip2"],
    ["diffusion"],
    ["llm", "diffusion"],
    ["llm", "blip2", "diffusion"],
  ],
)
def test_any_of_the_three_may_be_left_out(sound, names):
  folders = pretrained.Folders(**{name: str(sound / name) for name in names})
  sizes = pretrained.read_sizes(folders)
  assert set(sizes) == set().union(*(SIZES[name] for name in names))
  params = pretrained.read_params(hf_folders.config(sizes), folders)
  assert set(params) == set().union(*(PARTS[name] for name in names))
  hashes = pretrained.read_hashes(folders)
  assert len(hashes) == sum({"diffusion": 3}.get(name, 1) for name in names)


def test_every_number_of_the_folders_is_read_once(sound):
  """The multiset of values is that of the files, less what is not ours."""
  params = hf_folders.read(sound)
  for name, paths, ignored in (
    ("llm", ["language_model"], ()),
    (
      "blip2",
      ["vision_model", "qformer"],
      ("language_", "qformer.encoder.layer.0.output.", "embeddings."),
    ),
    ("diffusion/text_encoder", ["text_model"], ()),
    ("diffusion/unet", ["unet"], ()),
    ("diffusion/vae", ["vae"], ()),
  ):
    (file,) = (sound / name).glob("*.safetensors")
    stored = safetensors.numpy.load_file(file)
    kept = [
      value.ravel()
      for key, value in stored.items()
      if not key.startswith(ignored)
    ]
    found = [x.ravel() for path in paths for x in flat(params[path]).values()]
    found = np.concatenate(found)
    padding = found == 0  # Rows of the padded vocabulary.
    assert padding.sum() == (2 * 28 * 16 if name == "llm" else 0)
    np.testing.assert_array_equal(
      np.sort(found[~padding]), np.sort(np.concatenate(kept)), err_msg=name
    )


def test_the_sizes_are_the_files(sound):
  sizes = pretrained.read_sizes(hf_folders.folders(sound))
  for part, numbers in (
    ("language", hf_folders.LLAMA),
    ("vision", hf_folders.VISION),
    ("text", hf_folders.TEXT),
  ):
    found = dataclasses.asdict(sizes[part])
    assert {name: found[name] for name in numbers} == numbers
  assert sizes["qformer"].hidden_size == hf_folders.QFORMER["hidden_size"]
  assert sizes["qformer"].num_query_tokens == 3
  assert sizes["unet"].block_out_channels == (8, 16)
  assert sizes["unet"].attention == (True, False)
  assert sizes["vae"].factor == 2


def test_without_a_q_former_the_eyes_alone_are_read(sound):
  folders = hf_folders.folders(sound, "blip2")
  sizes = pretrained.read_sizes(folders)
  config = hf_folders.config(sizes, perceiver="linear")
  params = pretrained.read_params(config, folders)
  assert set(params) == {"vision_model"}
  whole = pretrained.read_params(hf_folders.config(sizes), folders)
  assert_same(params["vision_model"], whole["vision_model"])


@pytest.mark.parametrize("side", [12, 20, 32])
def test_positions_for_another_image_size_are_the_originals(sound, side):
  folders = hf_folders.folders(sound, "blip2")
  sizes = pretrained.read_sizes(folders)
  vision = dataclasses.replace(sizes["vision"], image_size=side)
  config = hf_folders.config(sizes, vision=vision)
  placed = {}
  params = pretrained.read_params(
    config, folders, place=lambda path, x: placed.setdefault(path, x)
  )
  found = params["vision_model"]["position_embedding"]
  assert placed[POSITIONS] is found
  eyes = transformers.Blip2ForConditionalGeneration.from_pretrained(
    sound / "blip2"
  ).vision_model
  with torch.no_grad():
    tokens = torch.zeros(1, 1 + (side // 4) ** 2, 12)
    want = eyes.embeddings.interpolate_pos_encoding(tokens, side, side)
  assert found.shape == want.shape and found.dtype == np.float32
  np.testing.assert_allclose(found, want.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fresh", [(100, 101), (98, 99), (3, 102), ()])
def test_new_tokens_begin_as_the_mean_of_the_others(sound, fresh):
  """Beyond the file's 100 rows as among them; padding is zero."""
  folders = hf_folders.folders(sound, "llm")
  sizes = pretrained.read_sizes(folders)
  language = dataclasses.replace(sizes["language"], vocab_size=103)
  config = hf_folders.config(sizes, language=language)
  found = pretrained.read_params(config, folders, fresh)["language_model"]
  stored = safetensors.numpy.load_file(sound / "llm/model.safetensors")
  new = sorted({*fresh, 100, 101, 102})
  old = [row for row in range(100) if row not in new]
  for rows, key in (
    (found["embed_tokens"]["embedding"], "model.embed_tokens.weight"),
    (found["lm_head"]["kernel"].T, "lm_head.weight"),
  ):
    assert rows.shape == (128, 16)
    np.testing.assert_array_equal(rows[old], stored[key][old])
    mean = stored[key][old].astype(np.float64).mean(0)
    np.testing.assert_allclose(
      rows[new], np.broadcast_to(mean, (len(new), 16)), rtol=1e-5, atol=1e-8
    )
    assert not rows[103:].any()


def test_shards_give_what_one_file_gives(sound, root):
  model = transformers.LlamaForCausalLM.from_pretrained(sound / "llm")
  shutil.rmtree(root / "llm")
  model.save_pretrained(root / "llm", max_shard_size="9KB")
  assert len(list((root / "llm").glob("*.safetensors"))) > 2
  assert_same(hf_folders.read(root, "llm"), hf_folders.read(sound, "llm"))


def test_the_half_precision_variant_alone_is_read(sound, root):
  (root / "llm/pytorch_model.bin").write_bytes(b"not looked at")
  folder = root / "diffusion/unet"
  stem = "diffusion_pytorch_model"
  (folder / f"{stem}.safetensors").rename(folder / f"{stem}.fp16.safetensors")
  assert_same(hf_folders.read(root), hf_folders.read(sound))


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
def test_the_dtype_is_the_files_or_the_one_asked_for(sound, root, stored):
  tensors = safetensors.numpy.load_file(sound / "llm/model.safetensors")
  safetensors.numpy.save_file(
    {key: value.astype(stored) for key, value in tensors.items()},
    root / "llm/model.safetensors",
  )
  want = {
    path: leaf.astype(stored)
    for path, leaf in flat(hf_folders.read(sound, "llm")).items()
  }
  assert_same(hf_folders.read(root, "llm"), partition.unflatten(want))
  folders = hf_folders.folders(root, "llm")
  config = hf_folders.config(pretrained.read_sizes(folders))
  found = pretrained.read_params(config, folders, dtype=ml_dtypes.bfloat16)
  want = {
    path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in want.items()
  }
  assert_same(found, partition.unflatten(want))


def test_each_parameter_is_placed_once_under_its_path(sound):
  folders = hf_folders.folders(sound)
  config = hf_folders.config(pretrained.read_sizes(folders))
  placed = []

  def place(path, array):
    placed.append(path)
    return path, array.shape

  params = pretrained.read_params(config, folders, place=place)
  init = PhotoChat(config).init
  abstract = flat(jax.eval_shape(init, jax.random.key(0)))
  wanted = {
    path: leaf.shape
    for path, leaf in abstract.items()
    if not path.startswith("language_projection/")
  }
  assert len(placed) == len(set(placed))
  assert set(placed) == set(wanted)

  def check(tree, prefix=""):
    for name, value in tree.items():
      if isinstance(value, dict):
        check(value, f"{prefix}{name}/")
      else:
        assert value == (f"{prefix}{name}", wanted[f"{prefix}{name}"])

  check(params)


def test_a_model_with_lora_reads_the_kernels_below_it(sound):
  folders = hf_folders.folders(sound, "llm")
  sizes = pretrained.read_sizes(folders)
  config = hf_folders.config(sizes, lora=LoRAConfig(rank=2))
  found = pretrained.read_params(config, folders)
  assert_same(found, hf_folders.read(sound, "llm"))


# ------------------------------------------------------------------------- ids


@pytest.mark.parametrize("pad,number", [("<|endoftext|>", 515), ("!", 0)])
@pytest.mark.parametrize("form", ["as published", "tokenizer.json"])
def test_the_ids_are_those_of_the_tokenizer(root, pad, number, form):
  """Stable Diffusion 1.x pads with EOS, 2.x with `!`, the id 0."""
  folder = root / "diffusion/tokenizer"
  shutil.rmtree(folder)
  hf_folders.write_tokenizer(folder, pad)
  original = transformers.CLIPTokenizer.from_pretrained(folder)
  if form == "tokenizer.json":  # As transformers 5 saves it.
    shutil.rmtree(folder)
    original.save_pretrained(folder)
    assert not (folder / "vocab.json").exists()
  text = pretrained.read_sizes(hf_folders.folders(root, "diffusion"))["text"]
  assert text.pad_token_id == original.pad_token_id == number
  assert text.bos_token_id == original.bos_token_id == 514
  assert text.eos_token_id == original.eos_token_id == 515


# -------------------------------------------------------- as the originals do


def test_the_q_former_reads_what_the_eyes_give_whatever_it_says(sound, root):
  path = root / "blip2/config.json"
  hf_folders.edit(path, qformer_config={"encoder_hidden_size": 1408})
  original = transformers.Blip2Config.from_pretrained(root / "blip2")
  sizes = pretrained.read_sizes(hf_folders.folders(root, "blip2"))
  width = sizes["qformer"].encoder_hidden_size
  assert width == original.qformer_config.encoder_hidden_size == 12
  assert_same(hf_folders.read(root, "blip2"), hf_folders.read(sound, "blip2"))


@pytest.mark.parametrize("given", [None, 64])
def test_the_rope_of_llama_3_starts_from_the_originals_length(root, given):
  rope = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
  }
  if given:
    rope["original_max_position_embeddings"] = given
  path = root / "llm/config.json"
  hf_folders.edit(path, rope_parameters=..., max_position_embeddings=256)
  hf_folders.edit(path, rope_parameters=rope)
  original = transformers.AutoConfig.from_pretrained(root / "llm")
  sizes = pretrained.read_sizes(hf_folders.folders(root, "llm"))
  found = dict(sizes["language"].rope_scaling)
  wanted = dict(original.rope_parameters)
  assert sizes["language"].rope_theta == wanted.pop("rope_theta")
  assert found == wanted
  assert found["original_max_position_embeddings"] == (given or 256)


def test_fields_that_no_one_knows_are_no_matter(sound, root):
  """Configs carry a lot which is only for training or for other libraries."""
  for file in hf_folders.CONFIGS[:5]:
    hf_folders.edit(root / file, transformers_version="9", initializer_range=1)
  assert_same(hf_folders.read(root), hf_folders.read(sound))


# ------------------------------------------------------------------------- hub


@pytest.fixture
def offline(monkeypatch, tmp_path):
  """An empty cache of a hub, and no network."""
  constants = huggingface_hub.constants
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


def cache(folder, source, name):
  """Lays a folder out as the hub's client does, with links to blobs."""
  commit = "0123456789abcdef0123456789abcdef01234567"
  place = folder / f"models--{name.replace('/', '--')}"
  snapshot = place / "snapshots" / commit
  (place / "refs").mkdir(parents=True)
  (place / "refs/main").write_text(commit)
  (place / "blobs").mkdir()
  for number, file in enumerate(sorted(source.rglob("*"))):
    if file.is_file():
      blob = place / "blobs" / str(number)
      shutil.copyfile(file, blob)
      link = snapshot / file.relative_to(source)
      link.parent.mkdir(parents=True, exist_ok=True)
      link.symlink_to(blob)
  return snapshot


def test_a_hub_id_is_found_in_the_local_cache(offline, sound):
  names = {
    "llm": "meta-llama/Llama-2-7b-hf",
    "blip2": "Salesforce/blip2-opt-2.7b",
    "diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5",
  }
  for part, name in names.items():
    cache(offline, sound / part, name)
  folders = pretrained.Folders(**names)
  sizes = pretrained.read_sizes(folders)
  assert sizes == pretrained.read_sizes(hf_folders.folders(sound))
  params = pretrained.read_params(hf_folders.config(sizes), folders)
  assert_same(params, hf_folders.read(sound))


def test_a_link_to_nothing_in_the_cache_is_named(offline, sound):
  snapshot = cache(offline, sound / "llm", "owner/llama")
  (snapshot / "model.safetensors").resolve().unlink()
  folders = pretrained.Folders(llm="owner/llama")
  sizes = pretrained.read_sizes(folders)
  with pytest.raises(files.WeightsError, match="holds no model.safetensors"):
    pretrained.read_params(hf_folders.config(sizes), folders)


def test_what_is_asked_of_the_hub_is_what_is_read(monkeypatch, sound):
  """Beside its parts a Stable Diffusion has single files of all of it."""
  asked = {}

  def download(name, allow_patterns):
    asked[name] = allow_patterns
    return str(sound / name.removeprefix("owner/"))

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  folders = pretrained.Folders(
    **{name: f"owner/{name}" for name in ("llm", "blip2", "diffusion")}
  )
  pretrained.read_sizes(folders)

  def wanted(name, file):
    patterns = asked[f"owner/{name}"]
    return any(fnmatch.fnmatch(file, pattern) for pattern in patterns)

  for name in ("llm", "blip2", "diffusion"):
    for file in (sound / name).rglob("*"):
      if file.is_file():
        assert wanted(name, file.relative_to(sound / name).as_posix()), file
  assert wanted("llm", "model-00001-of-00002.safetensors")
  assert wanted("llm", "tokenizer.json")
  for name, file in (
    ("llm", "pytorch_model.bin"),
    ("llm", "original/consolidated.00.pth"),
    ("diffusion", "v1-5-pruned.safetensors"),
    ("diffusion", "safety_checker/model.safetensors"),
    ("diffusion", "unet/diffusion_pytorch_model.bin"),
  ):
    assert not wanted(name, file), file
