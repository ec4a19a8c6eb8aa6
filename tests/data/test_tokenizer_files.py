"""Tokenizers of real kinds: their folders, roles and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photochat_jax.data.tokenizers import (
  load_clip_tokenizer,
  load_llm_tokenizer,
)

pytest.importorskip("transformers")
hf_tokenizers = pytest.importorskip("hf_tokenizers")


@pytest.fixture(scope="module", params=["llama3", "smollm2"])
def folder(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  getattr(hf_tokenizers, request.param)().save_pretrained(folder)
  return folder


def content(folder):
  return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def write(folder, content, **settings):
  """A new folder with a tokenizer.json and a config."""
  (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
  if settings:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return folder


def named(tokenizer, role):
  """What a role is called, by trying the names there are."""
  names = "<s> </s> <unk> <|begin_of_text|> <|end_of_text|> <|eot_id|>".split()
  names += "<|im_start|> <|im_end|> <|endoftext|> <pad>".split()
  names += ["<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"]
  number = getattr(tokenizer, role)
  return [name for name in names if tokenizer.control_id(name) == number]


def test_byte_level_texts(folder):
  tokenizer = load_llm_tokenizer(folder)

  @settings(deadline=None)
  @given(st.text(st.characters(codec="utf-8")))
  def check(text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.encode(text, "text") == tokenizer.encode(text, "control")

  check()
  ids = tokenizer.encode("a dog, a cat\n\nyes")
  starts = [t for t in ids if tokenizer.starts_word(t)]
  assert len(starts) >= 4
  assert not tokenizer.starts_word(ids[0])
  assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.img_id]) == (
    "a dog, a cat\n\nyes"
  )


@pytest.mark.parametrize("style", ["old", "always", "first"])
def test_what_a_text_follows(tmp_path, style):
  hf_tokenizers.llama2(style).save_pretrained(tmp_path)
  tokenizer = load_llm_tokenizer(tmp_path)

  def written(text, after=None):
    return b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, after)))

  assert written("cat") == b" cat"
  assert written("cat", "text") == b"cat"
  assert written(" cat", "text") == b" cat"
  assert written("cat", "control") == (b"cat" if style == "first" else b" cat")


def test_roles_of_a_file_alone(folder):
  tokenizer = load_llm_tokenizer(folder / "tokenizer.json")
  expected = {
    "<|eot_id|>": ("<|begin_of_text|>", "<|finetune_right_pad_id|>"),
    "<|im_end|>": ("<|im_start|>", "<|endoftext|>"),
  }
  (end,) = named(tokenizer, "eos_id")
  (bos,), (pad,) = named(tokenizer, "bos_id"), named(tokenizer, "pad_id")
  assert (bos, pad) == expected[end]


def test_the_folder_names_the_roles(tmp_path, folder):
  """A string or an AddedToken as a dict, in either of two files."""
  both = content(folder)
  names = {token["content"] for token in both["added_tokens"]}
  (base,) = names & {"<|end_of_text|>", "<|endoftext|>"}
  plain = load_llm_tokenizer(write(tmp_path, both))
  write(tmp_path, both, eos_token={"content": base, "special": True})
  told = load_llm_tokenizer(tmp_path)
  assert named(told, "eos_id") == [base]
  assert told.pad_id != told.eos_id
  assert told.digest != plain.digest  # An index of texts depends on it.
  write(tmp_path, both, eos_token=None, bos_token=None)
  assert load_llm_tokenizer(tmp_path).digest == plain.digest
  (tmp_path / "special_tokens_map.json").write_text(
    json.dumps({"eos_token": base, "pad_token": base})
  )
  told = load_llm_tokenizer(tmp_path)
  assert named(told, "eos_id") == [base]
  assert told.pad_id != told.eos_id


def test_one_token_for_everything(tmp_path):
  """As GPT-2's: it opens, ends and pads."""
  hf_tokenizers.smollm2().save_pretrained(tmp_path)
  only = content(tmp_path)
  only["added_tokens"] = only["added_tokens"][:1]
  for piece in ("<|im_start|>", "<|im_end|>", "<repo_name>"):
    only["model"]["vocab"][f"spare{piece}"] = only["model"]["vocab"].pop(piece)
  write(tmp_path, only, eos_token="<|endoftext|>")
  tokenizer = load_llm_tokenizer(tmp_path)
  assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.pad_id == 0


def test_photo_marks_added_as_plain_tokens_are_control_tokens(tmp_path, folder):
  marked = content(folder)
  size = max(t["id"] for t in marked["added_tokens"])
  size = max(size, *marked["model"]["vocab"].values()) + 1
  token = {**marked["added_tokens"][0], "special": False, "normalized": False}
  marked["added_tokens"] += [
    {**token, "id": size + i, "content": name}
    for i, name in enumerate(("[/img]", "[img]", "  two  "))
  ]
  tokenizer = load_llm_tokenizer(write(tmp_path, marked))
  assert (tokenizer.img_id, tokenizer.end_img_id) == (size + 1, size)
  assert tokenizer.vocab_size == size + 3
  assert not {size, size + 1} & set(tokenizer.encode("[img] a [/img]"))
  # Other added tokens are text, as they are written.
  assert size + 2 in tokenizer.encode("a  two  b")
  assert tokenizer.token_bytes(size + 2) == b"  two  "


def test_what_is_refused(tmp_path, folder):
  sound = content(folder)
  write(tmp_path, sound, eos_token="<|gone|>")
  with pytest.raises(ValueError, match=r"no eos_token, which is '<\|gone\|>'"):
    load_llm_tokenizer(tmp_path)
  for text in ("[1]", "{"):
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer_config.json holds no JSON"):
      load_llm_tokenizer(tmp_path)
  (tmp_path / "tokenizer_config.json").unlink()

  def refuse(match, **changes):
    write(tmp_path, {**sound, **changes})
    with pytest.raises(ValueError, match=match):
      load_llm_tokenizer(tmp_path)

  model = sound["model"]
  refuse("not a tokenizer.json that tokenizers", normalizer={"type": "No"})
  refuse("neither byte_fallback nor a ByteLevel", pre_tokenizer=None)
  refuse("at words' ends", model={**model, "end_of_word_suffix": "</w>"})
  vocabulary = dict(model["vocab"])
  vocabulary["spare"] = vocabulary.pop("Ġ")
  refuse("it lacks 'Ġ'", model={**model, "vocab": vocabulary, "merges": []})


def test_a_file_whose_text_gives_control_ids_is_refused(tmp_path):
  hf_tokenizers.llama2().save_pretrained(tmp_path)
  merged = content(tmp_path)
  merged["model"]["vocab"]["</"] = len(merged["model"]["vocab"])
  merged["model"]["vocab"]["s>"] = len(merged["model"]["vocab"])
  merged["model"]["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"]]
  with pytest.raises(ValueError, match="turns '</s>', typed as text"):
    load_llm_tokenizer(write(tmp_path, merged))


def test_clips_older_folders(tmp_path):
  model = json.loads(hf_tokenizers.clip().backend_tokenizer.to_str())["model"]
  (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
  with pytest.raises(ValueError, match="There is no tokenizer at"):
    load_clip_tokenizer(tmp_path)
  merges = [" ".join(merge) for merge in model["merges"]]
  (tmp_path / "merges.txt").write_text("\r\n".join(["#version: 0.2", *merges]))
  tokenizer = load_clip_tokenizer(tmp_path)
  assert tokenizer.pad_id == tokenizer.eos_id
  (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "!"}')
  padded = load_clip_tokenizer(tmp_path)
  assert padded.pad_id == model["vocab"]["!"] != tokenizer.pad_id
  assert load_clip_tokenizer(tmp_path, pad_id=5).pad_id == 5
  assert padded.token_bytes(padded.pad_id) == b"!"
  (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
  with pytest.raises(ValueError, match="is no vocabulary: fetch both again"):
    load_clip_tokenizer(tmp_path)
