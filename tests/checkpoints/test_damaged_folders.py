"""A folder that cannot be used says so in one sentence which says what to do.

Each case copies three sound folders, as transformers and diffusers write them,
and damages one thing: here whole folders, JSON files and the tokenizer. Fields
are in `test_damaged_configs.py`, tensors in `test_damaged_weights.py`.
"""

import json
import os
import shutil

import hf_folders
import pytest

from photochat_jax.checkpoints import pretrained
from photochat_jax.checkpoints.files import WeightsError

huggingface_hub = pytest.importorskip("huggingface_hub")
complaint = hf_folders.complaint


def test_the_sound_folders_are_read(sound):
  sizes = pretrained.read_sizes(hf_folders.folders(sound))
  assert sizes["language"].num_hidden_layers == 2
  assert sizes["sampler"] == "pndm"


# --------------------------------------------------------------------- folders


def test_a_folder_that_is_not_there(tmp_path):
  assert "no folder" in complaint(tmp_path, "llm")


def test_a_file_for_a_folder(tmp_path):
  (tmp_path / "llm").write_text("model")
  assert "holds config.json" in complaint(tmp_path, "llm")


@pytest.mark.parametrize("name", ["./here", "../there", "a/b/c", "a b/c", ""])
def test_what_looks_like_a_folder_is_not_asked_of_a_hub(name, monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError("asked")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
  folders = pretrained.Folders(llm=name)
  if not name:
    assert pretrained.read_sizes(folders) == {}
    return
  with pytest.raises(WeightsError, match="There is no folder .* hub id such"):
    pretrained.read_sizes(folders)


def test_a_hub_id_that_is_nowhere_without_a_network(monkeypatch, tmp_path):
  constants = huggingface_hub.constants
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  with pytest.raises(WeightsError, match="owner/name .* check the name") as e:
    pretrained.read_sizes(pretrained.Folders(llm="owner/name"))
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("reason", ["", "One line.\n\nAnother" + 300 * " word"])
def test_whatever_a_hub_says_becomes_a_sentence(monkeypatch, reason):
  def fail(*args, **kwargs):
    raise RuntimeError(reason)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
  with pytest.raises(WeightsError, match="could not be had") as error:
    pretrained.read_sizes(pretrained.Folders(llm="owner/name"))
  assert "\n" not in str(error.value) and len(str(error.value)) < 400
  assert "One line. Another" in str(error.value) or not reason


# ------------------------------------------------------------- files, whichever

TOKENIZER = "diffusion/tokenizer"
JSON = (
  *hf_folders.CONFIGS,
  f"{TOKENIZER}/vocab.json",
  f"{TOKENIZER}/tokenizer_config.json",
)
# What is in the file: what is said.
CONTENTS = {
  "nothing": (b"", "is not JSON"),
  "prose": (b"<!doctype html>", "is not JSON"),
  "half of it": (b'{"model_type": "lla', "is not JSON"),
  "another encoding": (b'{"model_type": "\xe9"}', "is not JSON"),
  "a list": (b"[1, 2]", "must hold a JSON object, not a list"),
  "null": (b"null", "must hold a JSON object"),
  "a number of 5000 digits": (b'{"a": %s}' % (b"9" * 5000), "is not JSON"),
  "NaN": (b'{"rms_norm_eps": NaN}', "NaN is no number"),
  "lists 100 000 deep": (b"[" * 100_000, "is not JSON"),
  "objects 100 000 deep": (b'{"a":' * 100_000, "is not JSON"),
  "a pointer of git-lfs": (hf_folders.LFS, "git lfs pull"),
  "an empty object": (b"{}", ""),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("file", JSON)
def test_a_file_with_something_else_in_it(root, file, content):
  data, said = CONTENTS[content]
  (root / file).write_bytes(data)
  name, *_ = file.split("/")
  if content == "an empty object" and "tokenizer_config" in file:
    pretrained.read_sizes(hf_folders.folders(root, name))
    return
  message = complaint(root, name)
  assert said in message
  assert str((root / file).parent) in message


@pytest.mark.parametrize("file", hf_folders.CONFIGS)
def test_a_file_that_is_missing(root, file):
  (root / file).unlink()
  name, *_ = file.split("/")
  message = complaint(root, name)
  assert f"There is no {(root / file).name}" in message
  assert "fetch" in message


def test_a_folder_where_a_file_should_be(root):
  (root / "llm/config.json").unlink()
  (root / "llm/config.json").mkdir()
  assert "cannot be read" in complaint(root, "llm")


@pytest.mark.skipif(
  not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads it all"
)
def test_a_file_that_may_not_be_read(root):
  (root / "llm/config.json").chmod(0)
  assert "you may read it" in complaint(root, "llm")



# ------------------------------------------------------------------- tokenizers

# What is wrong: (file, fields, what is said).
TOKENS = {
  "a pad token that is none of its own": (
    "tokenizer_config.json",
    {"pad_token": "<pad>"},
    "has no pad_token '<pad>'",
  ),
  "a pad token in a list": (
    "tokenizer_config.json",
    {"pad_token": ["<pad>"]},
    "has no pad_token ['<pad>']",
  ),
  "no end of text": (
    "vocab.json",
    {"<|endoftext|>": ...},
    "has no eos_token '<|endoftext|>'",
  ),
  "ids in words": (
    "vocab.json",
    {"<|endoftext|>": "515"},
    "the id '515'",
  ),
  "a negative id": ("vocab.json", {"<|startoftext|>": -1}, "the id -1"),
  "an id the text encoder lacks": (
    "vocab.json",
    {"<|endoftext|>": 600},
    "the id 600, and the text_encoder beside it has 600 tokens",
  ),
}


@pytest.mark.parametrize("case", TOKENS)
def test_a_tokenizer_that_cannot_be_used(root, case):
  file, changes, said = TOKENS[case]
  # Both say which tokens they are; transformers asks the second one last.
  (root / TOKENIZER / "special_tokens_map.json").unlink()
  hf_folders.edit(root / TOKENIZER / file, **changes)
  message = complaint(root, "diffusion")
  assert said in message
  assert str(root / TOKENIZER) in message


def test_a_tokenizer_that_is_missing(root):
  shutil.rmtree(root / TOKENIZER)
  assert "There is no tokenizer.json" in complaint(root, "diffusion")


@pytest.mark.parametrize(
  "content",
  [
    {},
    {"model": None},
    {"model": {"vocab": [["a", -1.5]]}},  # Of a Unigram model.
    {"model": {"vocab": {"a": 1}}, "added_tokens": [{"id": 3}]},
    {"model": {"vocab": {"a": 1}}, "added_tokens": 3},
    {"model": {"vocab": {"a": 1}}, "added_tokens": None},
  ],
)
def test_a_tokenizer_json_of_another_kind(root, content):
  (root / TOKENIZER / "vocab.json").unlink()
  (root / TOKENIZER / "tokenizer.json").write_text(json.dumps(content))
  message = complaint(root, "diffusion")
  assert "is not that of a CLIP tokenizer" in message or "has no" in message
