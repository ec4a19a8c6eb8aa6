"""Lines of tokens, and captions in both vocabularies."""

import pathlib

import pytest

from photochat_jax.data import dialogue, tokenizers, vocabulary
from photochat_jax.data.schema import Photo, Turn
from photochat_jax.data.spec import DataSpec
from photochat_jax.inspection import layout


@pytest.fixture(scope="module")
def tools():
  spec = DataSpec(
    batch_size=1, length=512, photos_in=4, photos_out=4, num_visual_tokens=3,
    vision_size=1, photo_size=1, system_prompt="You chat.",
  )  # fmt: skip
  return (
    tokenizers.load_llm_tokenizer(), tokenizers.load_clip_tokenizer(), spec
  )  # fmt: skip


PHOTO = Photo("p", "Cat", "a cat", pathlib.Path("somewhere.jpg"))
TURNS = (
  Turn(1, "hi"),
  Turn(1, "", PHOTO),
  Turn(0, "see"),
  Turn(0, "", PHOTO),
  Turn(1, "oh"),
  Turn(0, "ok"),
)


def test_lines_by_hand(tools):
  llm, clip, spec = tools
  side = layout.lay_out(TURNS, 0, llm, clip, spec)
  lines = [
    (line.own, [(t.text, t.kind) for t in line.tokens]) for line in side.lines
  ]
  assert [own for own, _ in lines] == [False, True, False, True]
  given, wrote, again, answer = (tokens for _, tokens in lines)
  assert given[0] == ("<s>", "none") and given[-1][0].endswith("[/INST]")
  assert [kind for _, kind in given].count("slot") == 3
  assert {kind for _, kind in given} == {"none", "slot"}
  # The docstring of data/dialogue.py draws it.
  assert [kind for _, kind in wrote][-4:] == ["slot"] * 3 + ["text"]
  words = [text for text, kind in wrote if kind == "caption"]
  assert words[0] == "[img]" and words[-1] == "[/img]"
  assert "".join(words[1:-1]).replace("␣", " ").strip() == "a cat"
  assert wrote[-1] == answer[-1] == ("</s>", "text")
  assert {kind for _, kind in again} == {"none"}


@pytest.mark.parametrize("template", ["llama2", "bare", "zephyr"])
@pytest.mark.parametrize("text_on", ["model", "all"])
def test_tokens_are_those_of_the_example(tools, template, text_on):
  llm, clip, _ = tools
  spec = DataSpec(1, 512, 4, 4, 3, 1, 1, template=template, text_on=text_on)
  for speaker in (0, 1):
    example = dialogue.encode_example(TURNS, speaker, llm, spec)
    side = layout.lay_out(TURNS, speaker, llm, clip, spec)
    tokens = side.tokens
    assert [t.position for t in tokens] == list(range(len(example.tokens)))
    assert [t.id for t in tokens] == example.tokens.tolist()
    for token, kind, visual in zip(
      tokens, example.loss_kind, example.visual_index, strict=True
    ):
      assert (token.kind == "slot") == (visual >= 0)
      if visual >= 0:
        assert token.note == f"visual token {visual % 3} of photo p"
      else:
        assert token.kind == ("none", "text", "caption")[kind]
      assert token.control == (llm.token_bytes(token.id) == b"")
    assert len(side.lines) > 2


def test_a_side_that_is_left_out_says_why(tools):
  llm, clip, spec = tools
  turns = [Turn(0, "", Photo("p", "", "a cat")), Turn(1, "oh")]
  side = layout.lay_out(turns, 1, llm, clip, spec)
  assert side.left_out.startswith("missing_photo: ") and not side.lines


@pytest.mark.parametrize(
  "caption",
  [
    "a cat under a tree",
    "Zoë's naïve café, 𝔘𝔫𝔦 e\u0301 🙂👩‍👩‍👧",
    "  two  spaces\tand tabs ",
    "antidisestablishmentarianism!!!",
    "x" * 200,
  ],
)
def test_groups_are_a_partition_of_both_vocabularies(tools, caption):
  llm, clip, spec = tools
  turns = [Turn(1, "hi"), Turn(0, "", Photo("p", "", caption))]
  (found,) = layout.lay_out(turns, 0, llm, clip, spec).captions
  ids = llm.encode(caption.strip())
  assert found.cut == (len(ids) > 96)
  slots, share, _ = vocabulary.align(llm, clip, ids[:96])
  tokens = [token for group in found.groups for token in group.tokens]
  pieces = [piece for group in found.groups for piece in group.pieces]
  assert sorted(t.position for t in tokens) == list(
    range(tokens[0].position, tokens[0].position + len(tokens))
  )
  assert sorted(t.id for t in tokens) == sorted(ids[:96])
  used = int((share.sum(axis=1) > 0).sum())
  assert found.used == used + 2 and found.slots == 77
  assert [p.id for p in pieces] == slots[1 : used + 1].tolist()
  for group in found.groups:
    for piece in group.pieces:
      assert sum(piece.shares) == pytest.approx(1, abs=1e-5)
      assert len(piece.shares) == len(group.tokens)
  # A group's tokens and pieces write the same, but for case and white space.
  if caption.isascii() and not found.cut and used < 75:
    for group in found.groups:
      wrote = b"".join(llm.token_bytes(t.id) for t in group.tokens)
      reads = b"".join(clip.token_bytes(p.id) for p in group.pieces)
      assert wrote.lower().replace(b" ", b"").replace(b"\t", b"") == reads


def test_what_steers_is_shown_as_its_number(tools):
  llm, clip, _ = tools
  assert layout.printable("a\x1b\u202e\u200db é🙂") == (
    "a⟨1B⟩⟨202E⟩⟨200D⟩b é🙂"
  )
  spelt = [layout.spell(llm, i) for i in llm.encode("a\n\u202eb")]
  text = "".join(spelt)
  assert "↵" in text and text.isprintable()
  assert layout.spell(llm, llm.img_id) == "[img]"
  assert layout.spell(llm, llm.bos_id) == "<s>"
  assert layout.spell(clip, clip.eos_id) == "<|endoftext|>"
  assert all(
    layout.spell(t, i).isprintable()
    for t in (llm, clip)
    for i in range(t.vocab_size)
  )
