"""Conversations with a scripted model, and one with a real tiny one."""

import json
import types

import numpy as np
import pytest
import toy_agent
from PIL import Image

from photochat_jax import chat, generate
from photochat_jax import config as config_lib
from photochat_jax.data import images, photochat
from photochat_jax.data.photochat import Turn
from photochat_jax.decoding_options import Options
from photochat_jax.models.photochat import PhotoChat


class Scripted:
  """Stands in for a `Generator`: says its lines, keeps what it was shown."""

  def __init__(self, *lines):
    self.tokenizer = toy_agent.WordTokenizer()
    self.spec = toy_agent.spec(PhotoChat(toy_agent.config()))
    self.lines = list(lines)
    self.contexts, self.seeds, self.drawn = [], [], []

  def see(self, photo):
    return images.load_vision(photo.path, self.spec.vision_size)

  def respond(self, contexts, options):
    (context,) = contexts
    self.contexts.append(context)
    self.seeds.append(options.seed)
    text, caption = self.lines.pop(0)
    return [generate.Reply((), text, caption, caption is None)]

  def draw(self, captions, seeds):
    self.drawn += zip(captions, seeds, strict=True)
    shade = 40 * len(self.drawn)
    return np.full((len(captions), 8, 8, 3), shade, np.uint8)


@pytest.fixture
def red(tmp_path):
  path = tmp_path / "in" / "red one.png"
  path.parent.mkdir()
  Image.new("RGB", (12, 9), (200, 10, 10)).save(path)
  return path


def test_text_is_answered_with_text(tmp_path):
  model = Scripted(("b c", None))
  talk = chat.Conversation(model, tmp_path / "chat")
  talk.add_user("  a ")
  assert talk.reply() == (Turn(chat.MODEL, "b c"),)
  assert talk.turns == [Turn(chat.USER, "a"), Turn(chat.MODEL, "b c")]
  # <s> a </s>: the model's turn begins.
  assert model.contexts[0].tokens.tolist() == [1, 5, 2]
  assert not (tmp_path / "chat").exists()


def test_the_model_sees_its_own_photo_before_it_goes_on(tmp_path):
  model = Scripted(("a", "b c"), ("d", None))
  talk = chat.Conversation(model, tmp_path / "chat", seed=3)
  talk.add_user("h")
  first, photo, last = talk.reply()
  assert (first.text, photo.text, last.text) == ("a", "", "d")
  assert photo.photo.caption == "b c"
  assert photo.photo.path == tmp_path / "chat" / "0001.png"
  pixels = np.asarray(Image.open(photo.photo.path))
  np.testing.assert_array_equal(pixels, np.full((8, 8, 3), 40))
  # <s> h </s> a [img] b c [/img] and two visual slots (padding ids).
  again = model.contexts[1]
  assert again.tokens.tolist() == [1, 12, 2, 5, 3, 6, 7, 4, 0, 0]
  assert again.visual_index.tolist() == [-1] * 8 + [0, 1]
  assert again.photos == (photo.photo,)


def test_drawings_never_overwrite_one_another(tmp_path):
  (tmp_path / "0007.png").write_bytes(b"mine")
  (tmp_path / "notes.png").write_bytes(b"mine")
  model = Scripted(("", "a"), ("", "b"), ("", None))
  talk = chat.Conversation(model, tmp_path)
  talk.add_user("h")
  names = [turn.photo.path.name for turn in talk.reply()]
  assert names == ["0008.png", "0009.png"]
  assert (tmp_path / "0007.png").read_bytes() == b"mine"
  # Equal captions would still be two different photos.
  assert model.drawn[0][1] != model.drawn[1][1]


def test_a_turn_has_an_end_even_if_the_model_finds_none(tmp_path):
  model = Scripted(*[("", "a")] * 50)
  talk = chat.Conversation(model, tmp_path)
  talk.add_user("h")
  assert len(talk.reply()) == chat.MAX_PHOTOS_PER_TURN


def test_a_block_without_a_word_is_no_photo(tmp_path):
  talk = chat.Conversation(Scripted(("a", "")), tmp_path)
  talk.add_user("h")
  assert talk.reply() == (Turn(chat.MODEL, "a"),)


def test_a_silent_model_leaves_the_conversation_whole(tmp_path):
  model = Scripted(("", None), ("c", None))
  talk = chat.Conversation(model, tmp_path)
  talk.add_user("a")
  assert talk.reply() == ()
  talk.add_user("b")
  talk.reply()
  assert model.contexts[1].tokens.tolist() == [1, 5, 6, 2]


def test_a_users_photo_is_shown_without_a_caption(tmp_path, red):
  model = Scripted(("a", None))
  talk = chat.Conversation(model, tmp_path)
  talk.add_user("b")
  turn = talk.add_user_photo(red)
  talk.reply()
  assert model.contexts[0].tokens.tolist() == [1, 6, 0, 0, 2]
  assert model.contexts[0].visual_index.tolist() == [-1, -1, 0, 1, -1]
  assert model.contexts[0].photos == (turn.photo,)


def test_an_unreadable_photo_is_not_added(tmp_path):
  talk = chat.Conversation(Scripted(), tmp_path)
  page = tmp_path / "page.jpg"
  page.write_text("<html>")
  for path in (page, tmp_path / "nowhere.png", tmp_path):
    with pytest.raises(images.ImageError, match=path.name):
      talk.add_user_photo(path)
  assert talk.turns == []
  with pytest.raises(chat.ChatError, match="empty"):
    talk.add_user("  ")


def test_of_a_long_conversation_the_newest_turns_count(tmp_path):
  model = Scripted(*[("b", None)] * 30)
  talk = chat.Conversation(model, tmp_path)
  for _ in range(15):
    talk.add_user("a c")
    talk.reply()
  talk.add_user("h h h")
  talk.reply()
  last = model.contexts[-1]
  assert len(last.tokens) <= model.spec.length
  assert last.tokens.tolist()[-5:] == [1, 12, 12, 12, 2]
  assert last.cut_turns > 0
  assert len(talk.turns) == 32  # Nothing was forgotten, only not read.


def long_talk(folder, red):
  model = Scripted(("a", "b c"), ("d", None), ("e", None))
  talk = chat.Conversation(model, folder)
  talk.add_user("h")
  talk.reply()
  talk.add_user_photo(red)
  talk.reply()
  return talk


def as_seen(turns):
  return [(t.speaker, t.text, t.photo and t.photo.caption) for t in turns]


def test_a_saved_conversation_is_a_photochat_file(tmp_path, red):
  talk = long_talk(tmp_path / "chat", red)
  talk.save(tmp_path / "mine" / "test" / "one.json")
  (dialogue,), coverage = photochat.read_split(tmp_path / "mine", "test")
  assert coverage.photos_found == 2
  assert coverage.broken == ()
  assert as_seen(dialogue.turns) == as_seen(talk.turns)
  (own, users) = (t.photo for t in dialogue.turns if t.photo)
  np.testing.assert_allclose(
    images.load_photo(own.path, 8), np.full((8, 8, 3), 40), atol=2
  )
  # The photo's own size and colour, not what the model sees of it.
  image = Image.open(users.path)
  assert image.size == (12, 9)
  np.testing.assert_allclose(
    np.asarray(image).mean((0, 1)), (200, 10, 10), atol=2
  )
  (record,) = json.loads((tmp_path / "mine/test/one.json").read_text())
  assert record["photo_id"] == own.id  # PhotoChat's: the sharer's photo.


def test_two_conversations_in_one_folder_keep_their_photos(tmp_path, red):
  talk = long_talk(tmp_path / "chat", red)
  talk.save(tmp_path / "one.json")
  talk.save(tmp_path / "two.json")
  found = sorted(
    str(p.relative_to(tmp_path)) for p in (tmp_path / "photos").glob("*/*")
  )
  assert found == [
    "photos/one/0002.jpg",
    "photos/one/0004.jpg",
    "photos/two/0002.jpg",
    "photos/two/0004.jpg",
  ]


def test_a_saved_conversation_goes_on(tmp_path, red):
  talk = long_talk(tmp_path / "chat", red)
  file = talk.save(tmp_path / "one.json")
  red.unlink()
  model = Scripted(("g", None))
  other = chat.Conversation.load(file, model, tmp_path / "chat", seed=5)
  assert as_seen(other.turns) == as_seen(talk.turns)
  other.add_user("h")
  other.reply()
  (context,) = model.contexts
  assert len(context.photos) == 2
  assert all(photo.path.exists() for photo in context.photos)


@pytest.mark.parametrize("content", ["", "{}", "[]", '[{"dialogue": [{}]}]'])
def test_another_file_is_refused_with_a_sentence(tmp_path, content):
  path = tmp_path / "other.json"
  path.write_text(content)
  with pytest.raises(chat.ChatError, match="other.json is not a conversation"):
    chat.Conversation.load(path, Scripted(), tmp_path)
  with pytest.raises(chat.ChatError, match="cannot be read"):
    chat.Conversation.load(tmp_path / "no.json", Scripted(), tmp_path)


def terminal(talk, *lines, end=EOFError):
  """Types lines and returns what was shown."""
  lines, shown = list(lines), []

  def read(prompt):
    assert prompt == "you> "
    if not lines:
      raise end
    return lines.pop(0)

  chat.talk(talk, read, shown.append)
  assert not lines
  return shown


def test_a_conversation_in_the_terminal(tmp_path, red):
  model = Scripted(("a", "b c"), ("d", None), ("e", None), ("", None))
  talk = chat.Conversation(model, tmp_path / "chat")
  shown = terminal(
    talk,
    "h",
    "",
    f"/photo '{red}'",
    "/help",
    f"/save {tmp_path / 'talk.json'}",
    "g",
    "/quit",
  )
  assert shown == [
    "model> a",
    f"model> [{tmp_path / 'chat' / '0001.png'}: b c]",
    "model> d",
    "model> e",
    chat.HELP,
    f"saved {tmp_path / 'talk.json'}",
    "model> ...",
    "Bye.",
  ]
  assert (tmp_path / "talk.json").exists()


def test_mistakes_cost_one_sentence_and_nothing_else(tmp_path):
  model = Scripted(("a", None))
  talk = chat.Conversation(model, tmp_path)
  (tmp_path / "page.jpg").write_text("<html>")
  (tmp_path / "file").write_text("")
  shown = terminal(
    talk,
    f"/photo {tmp_path / 'page.jpg'}",
    "/photo",
    "/save",
    f"/save {tmp_path / 'file' / 'x.json'}",
    "/dance",
    "h",
  )
  assert len(shown) == 8
  for line, word in zip(
    shown,
    ["page.jpg", "/photo FILE", "/save FILE", "x.json", "/dance", "model> a"],
    strict=False,
  ):
    assert word in line and "\n" not in line
  assert shown[-2:] == ["", "Bye."]
  assert len(talk.turns) == 2


def test_the_terminal_is_not_steered_by_the_model(tmp_path):
  model = Scripted(("a\x1b[2J\nb", None))
  assert terminal(chat.Conversation(model, tmp_path), "a", "/quit") == [
    "model> a [2J b",
    "Bye.",
  ]


def test_ctrl_c_ends_politely(tmp_path):
  talk = chat.Conversation(Scripted(), tmp_path)
  assert terminal(talk, end=KeyboardInterrupt) == ["", "Bye."]

  def interrupted(*_, **__):
    raise KeyboardInterrupt

  talk = chat.Conversation(types.SimpleNamespace(
    respond=interrupted, spec=Scripted().spec,
    tokenizer=toy_agent.WordTokenizer(),
  ), tmp_path)  # fmt: skip
  assert terminal(talk, "a") == ["", "Bye."]


def test_chat_opens_one_row_of_the_newest_checkpoint(tmp_path, monkeypatch):
  asked = []

  def open_generator(run, workdir, batch_size):
    asked.append((run, workdir, batch_size))
    return Scripted(("", "b"), ("c", None)), 7

  monkeypatch.setattr(generate, "open_generator", open_generator)
  lines, shown = ["a", "/quit"], []
  run = config_lib.RunConfig()
  chat.chat(run, tmp_path, lambda _: lines.pop(0), shown.append)
  assert asked == [(run, tmp_path, 1)]
  assert "step 7" in shown[0]
  assert shown[1] == f"model> [{tmp_path / 'chat' / '0001.png'}: b]"


def test_a_real_model_repeats_itself(tmp_path, red):
  model = PhotoChat(toy_agent.config())
  settings = types.SimpleNamespace(**vars(toy_agent.SETTINGS))
  settings.batch_size = 1

  def converse(folder, seed):
    talk = chat.Conversation(
      toy_agent.generator(
        model, toy_agent.random_params(model, 3), settings=settings
      ),
      folder, seed, Options("nucleus", top_p=1.0),
    )  # fmt: skip
    for _ in range(3):
      talk.add_user("a b")
      talk.reply()
      talk.add_user_photo(red)
      talk.reply()
    return as_seen(talk.turns), [
      t.photo.path.read_bytes()
      for t in talk.turns
      if t.photo and t.speaker == chat.MODEL
    ]

  words, photos = converse(tmp_path / "a", 0)
  assert photos  # It did share some.
  assert (words, photos) == converse(tmp_path / "b", 0)
  assert words != converse(tmp_path / "c", 1)[0]
