"""The tokenizers against transformers, and against hostile text."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from photochat_jax.data import synthetic
from photochat_jax.data.tokenizers import (
  load_clip_tokenizer,
  load_llm_tokenizer,
)

SAMPLE = pathlib.Path(__file__).parent / "photochat_sample"
ASSETS = pathlib.Path(synthetic.__file__).parent / "assets"
CONTROL = (
  "<s>",
  "</s>",
  "<unk>",
  "[img]",
  "[/img]",
  "<|startoftext|>",
  "<|endoftext|>",
  "<0x0A>",
  "[INST]",
  "▁",
  "</w>",
)
LLM = load_llm_tokenizer()
CLIP = load_clip_tokenizer()

# Text with controls in its midst; Llama writes U+2581 and space alike.
hostile = st.lists(
  st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="▁")),
    st.sampled_from([c for c in CONTROL if c != "▁"]),
    st.sampled_from(["😀", "中文", "İ", "ﬁ", "don't", "  ", "\n", "e\u0301"]),
  )
).map("".join)


def lines() -> list[str]:
  """Real and synthetic messages and captions."""
  found = []
  for path in sorted(SAMPLE.glob("*/*.json")):
    for record in json.loads(path.read_text(encoding="utf-8")):
      found += [turn["message"] for turn in record["dialogue"]]
  for record in synthetic.make_records(3, "test", 100):
    found += [turn["message"] for turn in record["dialogue"]]
    found += [p["full_caption"] for p in record["synthetic"]["photos"].values()]
  return [line for line in found if line]


def asset(name):
  return json.loads((ASSETS / f"{name}_tokenizer.json").read_text("utf-8"))


def write(tmp_path, content):
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(content), encoding="utf-8")
  return path


@given(hostile)
def test_llm_round_trip(text):
  assert LLM.decode(LLM.encode(text)) == text


@given(hostile.filter(bool))
def test_llm_bytes_are_the_text(text):
  written = b"".join(map(LLM.token_bytes, LLM.encode(text)))
  assert written == b" " + text.encode()


@given(hostile)
def test_text_gives_no_control_id(text):
  llm_control = {LLM.bos_id, LLM.eos_id, LLM.pad_id, LLM.img_id, LLM.end_img_id}
  assert not llm_control & set(LLM.encode(text))
  assert not {CLIP.bos_id, CLIP.eos_id} & set(CLIP.encode(text))


@pytest.mark.parametrize("text", CONTROL)
def test_spelt_controls_are_text(text):
  for ids, tokenizer in ((LLM.encode(text), LLM), (CLIP.encode(text), CLIP)):
    assert ids
    assert all(tokenizer.token_bytes(i) for i in ids)


def test_lone_surrogate_is_replaced():
  assert LLM.decode(LLM.encode("a\ud83d")) == "a?"
  assert CLIP.encode("a\ud83d") == CLIP.encode("a?")


@given(hostile)
def test_clip_bytes_are_the_normalised_text(text):
  # Our own reading of CLIP's rule: NFC, lower case, white space dropped.
  normal = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
  ).normalize_str(text)
  written = b"".join(map(CLIP.token_bytes, CLIP.encode(text))).decode()

  # Python counts four ASCII separators as white space, Rust does not.
  def squeeze(t):
    return "".join(c for c in t if not c.isspace())

  assert squeeze(written) == squeeze(normal)


def test_llm_equals_transformers():
  transformers = pytest.importorskip("transformers")
  model = asset("llm")["model"]
  theirs = transformers.LlamaTokenizer(
    vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]]
  )
  texts = lines()
  assert len(texts) > 1000
  for text in texts:
    assert LLM.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert LLM.decode(LLM.encode(text)) == text


def test_clip_equals_transformers():
  transformers = pytest.importorskip("transformers")
  model = asset("clip")["model"]
  theirs = transformers.CLIPTokenizer(
    vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]]
  )
  assert theirs.bos_token_id == CLIP.bos_id
  for text in lines():
    ids = theirs.encode(
      text, padding="max_length", max_length=77, truncation=True
    )
    np.testing.assert_array_equal(CLIP.encode_padded(text), ids)


def test_grown_by_photo_marks():
  size = max(asset("llm")["model"]["vocab"].values()) + 1
  assert (LLM.img_id, LLM.end_img_id) == (size, size + 1)
  assert LLM.vocab_size == size + 2
  assert LLM.pad_id == 0
  assert LLM.decode([LLM.bos_id, *LLM.encode("a b"), LLM.img_id]) == "a b"


def test_photo_marks_in_the_file_are_kept(tmp_path):
  content = asset("llm")
  content["added_tokens"] += [
    {
      "id": 766 + i,
      "content": name,
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      "normalized": False,
      "special": True,
    }
    for i, name in enumerate(("[/img]", "[img]", "<pad>"))
  ]
  tokenizer = load_llm_tokenizer(write(tmp_path, content))
  assert (tokenizer.img_id, tokenizer.end_img_id) == (767, 766)
  assert tokenizer.pad_id == 768
  assert tokenizer.vocab_size == 769
  assert max(tokenizer.encode("[img]<pad>")) < 766


def test_folder_and_digest(tmp_path):
  path = write(tmp_path, asset("llm"))
  assert load_llm_tokenizer(tmp_path).digest == load_llm_tokenizer(path).digest
  path.write_text(json.dumps(asset("llm"), indent=1), encoding="utf-8")
  assert load_llm_tokenizer(path).digest != LLM.digest
  assert len(LLM.digest) == 64


def test_clip_padding():
  tokenizer = load_clip_tokenizer(max_length=8, pad_id=0)
  pieces = tokenizer.encode("a big")
  assert len(pieces) == 2
  np.testing.assert_array_equal(
    tokenizer.encode_padded("a big"),
    [tokenizer.bos_id, *pieces, tokenizer.eos_id, 0, 0, 0, 0],
  )
  long = tokenizer.encode_padded("a " * 50)
  assert long.dtype == np.int32
  assert long[0] == tokenizer.bos_id
  assert long[-1] == tokenizer.eos_id
  assert list(long[1:-1]) == tokenizer.encode("a") * 6


def test_words():
  ids = LLM.encode("nice ball, left")
  assert [LLM.starts_word(i) for i in ids] == [True, True, False, True]
  assert not LLM.starts_word(LLM.eos_id)
  pieces = CLIP.encode("a purple ball")
  assert CLIP.decode(pieces) == "a purple ball"
  assert sum(map(CLIP.ends_word, pieces)) == 3
  assert not CLIP.ends_word(CLIP.eos_id)


def test_vocabularies_suit_the_talk_and_disagree():
  values = [v for vs in synthetic.ATTRIBUTES.values() for v in vs] + ["nice"]
  assert all(len(LLM.encode(value)) == 1 for value in values)
  colours = {len(CLIP.encode(c)) for c in synthetic.ATTRIBUTES["colour"]}
  assert len(colours) > 1
  for record in synthetic.make_records(0, "dev", 30):
    for photo in record["synthetic"]["photos"].values():
      assert len(LLM.encode(photo["full_caption"])) <= 14


@pytest.mark.parametrize("text", ["", "[]", '{"model": 3}', "no json"])
def test_no_tokenizer_file(tmp_path, text):
  path = tmp_path / "tokenizer.json"
  path.write_text(text)
  for load in (load_llm_tokenizer, load_clip_tokenizer):
    with pytest.raises(ValueError, match="not a tokenizer.json"):
      load(path)


def test_wrong_kind_says_so(tmp_path):
  with pytest.raises(ValueError, match="not in the format of CLIP's"):
    load_clip_tokenizer(ASSETS / "llm_tokenizer.json")
  with pytest.raises(ValueError, match="not in the format of Llama 2's"):
    load_llm_tokenizer(ASSETS / "clip_tokenizer.json")
  with pytest.raises(ValueError, match="There is no tokenizer at"):
    load_llm_tokenizer(tmp_path)
  content = asset("llm")
  content["model"]["byte_fallback"] = False
  with pytest.raises(ValueError, match="byte_fallback"):
    load_llm_tokenizer(write(tmp_path, content))


@pytest.mark.parametrize("token", [-1, 768])
def test_id_outside_the_vocabulary(token):
  with pytest.raises(ValueError, match="outside the vocabulary"):
    LLM.token_bytes(token)
  with pytest.raises(ValueError, match="outside the vocabulary"):
    CLIP.decode([token])
