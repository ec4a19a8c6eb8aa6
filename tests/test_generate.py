"""Decoding against a plain loop without a cache, and the rules of a turn."""

import functools
import types

import jax
import numpy as np
import pytest
import toy_agent
from PIL import Image
from toy_agent import BOS, END, EOS, IMG, PAD, SETTINGS, WORDS, A, B, C

from photochat_jax import decoding
from photochat_jax.data import dialogue
from photochat_jax.data.images import ImageError, load_vision
from photochat_jax.data.photochat import Photo, Turn
from photochat_jax.decoding_options import Options
from photochat_jax.models.photochat import PhotoChat


@pytest.fixture(scope="module")
def model():
  return PhotoChat(toy_agent.config())


@pytest.fixture(scope="module")
def params(model):
  return toy_agent.random_params(model)


@pytest.fixture(scope="module")
def generator(model, params):
  return toy_agent.generator(model, params)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  rng = np.random.default_rng(0)
  paths = [tmp_path_factory.mktemp("photos") / f"{i}.png" for i in range(2)]
  for path in paths:
    pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path)
  return [Photo(path.stem, "", "a b", path) for path in paths]


def contexts_of(spec, *dialogues):
  tokenizer = toy_agent.WordTokenizer()
  return [
    dialogue.encode_context(turns, 0, tokenizer, spec) for turns in dialogues
  ]


def talk(*texts):
  return [Turn(1 - i % 2, text) for i, text in enumerate(texts)]


@functools.partial(jax.jit, static_argnames="model")
def scores_after(model, params, tokens, index, photos):
  """Logits [L, V] of one row without a cache."""
  places = np.arange(tokens.shape[0])[None]
  hidden, _ = model.converse(
    params,
    tokens[None],
    places,
    np.ones_like(places),
    model.perceive(params, photos)[None],
    index[None],
  )
  return model.logits(params, hidden)[0]


def plain_loop(model, params, context, spec, limit):
  """Greedy decoding of one row, all of it read again for every token."""
  shown = np.zeros((2, 8, 8, 3), np.uint8)
  for p, photo in enumerate(context.photos):
    shown[p] = load_vision(photo.path, 8)
  tokens = np.zeros(40, np.int32)  # What follows does not change what was.
  index = np.full(40, -1, np.int32)
  length = len(context.tokens)
  tokens[:length], index[:length] = context.tokens, context.visual_index
  written, inside, count = [], False, 0
  for _ in range(limit):
    scores = scores_after(model, params, tokens, index, shown)
    scores = np.array(scores[length - 1])
    scores[[PAD, BOS]] = -np.inf
    if not inside:
      scores[END] = -np.inf
    else:
      scores[[IMG, EOS]] = -np.inf
      if count == 0:
        scores[END] = -np.inf
      if count == spec.caption_tokens:
        scores[np.arange(len(scores)) != END] = -np.inf
    token = int(np.argmax(scores))
    written.append(token)
    tokens[length], length = token, length + 1
    count = count + 1 if inside else 0
    inside = token == IMG or (inside and token != END)
    if token in (EOS, END):
      break
  return tuple(written)


def test_cached_decoding_equals_a_plain_loop(model, generator, photos):
  dialogues = [
    talk("a"),
    talk("b c", "a", "d e f g"),
    [Turn(1, "b c"), Turn(1, "", photos[0]), Turn(1, "d")],
    [*talk("h g", "f"), Turn(1, "e"), Turn(0, "d", photos[1])],
    [Turn(1, "", photos[1]), Turn(0, "g"), Turn(1, "h", photos[0])],
  ]
  contexts = contexts_of(generator.spec, *dialogues)
  ended, opened = set(), set()
  # Several models, so that blocks and ends of turn are met.
  for seed in range(4):
    params = toy_agent.random_params(model, seed)
    other = toy_agent.generator(model, params)
    expected = [
      plain_loop(model, params, c, other.spec, SETTINGS.max_new_tokens)
      for c in contexts
    ]
    assert len(set(expected)) > 1  # It listens to what was said.
    replies = other.respond(contexts)  # Five rows in batches of two.
    assert [r.tokens for r in replies] == expected
    # Another prompt length changes nothing but the padding.
    assert [r.tokens for r in other.respond(contexts, 20)] == expected
    ended |= {r.ended for r in replies}
    opened |= {r.caption is not None for r in replies}
  assert ended == opened == {True, False}


def test_a_photo_in_the_context_is_looked_at(model, params, generator, photos):
  logits = [
    decoding.prefill(
      model,
      params,
      dialogue.left_pad(
        contexts_of(generator.spec, [Turn(1, "a", photo)]),
        24,
        generator.tokenizer,
        generator.spec,
        generator.see,
      ),
      30,
    )[0][0, : len(WORDS)]
    for photo in photos
  ]
  assert not np.allclose(*logits)


def test_a_photo_is_read_once(generator, tmp_path):
  path = tmp_path / "short_lived.png"
  Image.new("RGB", (9, 7), "red").save(path)
  photo = Photo("x", "", None, path)
  first = generator.see(photo)
  path.unlink()
  np.testing.assert_array_equal(generator.see(photo), first)
  assert first.shape == (8, 8, 3)
  with pytest.raises(ImageError, match="nowhere"):
    generator.see(Photo("y", "", None, tmp_path / "nowhere.png"))


def scripted(generator, monkeypatch, *lines, limit=6):
  """Replies of a model that wants to write `lines`."""
  jax.clear_caches()
  toy_agent.script(monkeypatch, 3, lines)  # <s> a </s>
  settings = vars(SETTINGS) | {"max_new_tokens": limit}
  monkeypatch.setattr(generator, "settings", types.SimpleNamespace(**settings))
  contexts = contexts_of(generator.spec, *[talk("a")] * len(lines))
  assert len(contexts[0].tokens) == 3
  replies = generator.respond(contexts)
  jax.clear_caches()
  return replies


def test_text_ends_at_the_end_of_turn(generator, monkeypatch):
  replies = scripted(
    generator, monkeypatch, [[A], [B], [EOS], [C]], [[EOS], [C]]
  )
  assert [reply[:-1] for reply in replies] == [
    ((A, B, EOS), "a b", None, True),
    ((EOS,), "", None, True),
  ]


def test_a_photo_stops_the_turn_until_it_is_drawn(generator, monkeypatch):
  photo, other = scripted(
    generator, monkeypatch, [[A], [IMG], [B], [C], [END], [A]], [[A]] * 6
  )
  assert photo[:-1] == ((A, IMG, B, C, END), "a", "b c", False)
  assert other[:-1] == ((A,) * 6, "a a a a a a", None, False)


def test_how_near_a_photo_was(generator, monkeypatch):
  # At each step the first wish has 10, the second 9, all 11 others 0; of the
  # 13 ids `<pad>`, `<s>` and `[/img]` are never written outside a block.
  first, second, others = np.exp([10.0, 9.0, 0.0])
  wished = first / (first + 9 * others)
  runner_up = second / (first + second + 8 * others)
  photo, near = scripted(
    generator,
    monkeypatch,
    [[A], [IMG], [B], [END]],
    [[A], [A, IMG], [EOS], [IMG]],
  )
  assert photo.photo_score == pytest.approx(wished, rel=1e-5)
  assert near.photo_score == pytest.approx(runner_up, rel=1e-5)
  # What comes after the end is not looked at.
  after, _ = scripted(
    generator, monkeypatch, [[EOS], [IMG], [IMG]], [[A], [A], [EOS]]
  )
  assert after.photo_score == pytest.approx(others / (first + 9 * others))


@pytest.mark.parametrize(
  "wishes,tokens,text,caption",
  [
    # Padding and begin of text are never written.
    ([[PAD, BOS, A], [BOS, PAD, B], [EOS]], (A, B, EOS), "a b", None),
    # A block that was not opened cannot be closed.
    ([[END, A], [EOS]], (A, EOS), "a", None),
    # Neither a second block nor the end of the turn stands in a block.
    (
      [[IMG], [IMG, A], [EOS, B], [END]],
      (IMG, A, B, END),
      "",
      "a b",
    ),
    # A caption is not empty.
    ([[IMG], [END, A], [END]], (IMG, A, END), "", "a"),
    # A caption of the longest kind is closed.
    (
      [[IMG], [A], [B], [C], [A, END], [A]],
      (IMG, A, B, C, END),
      "",
      "a b c",
    ),
  ],
)
def test_rules(generator, monkeypatch, wishes, tokens, text, caption):
  reply, twin = scripted(generator, monkeypatch, wishes, wishes)
  assert reply == twin
  assert reply[:-1] == (tokens, text, caption, tokens[-1] == EOS)


def test_a_block_left_open_is_closed_at_the_limit(generator, monkeypatch):
  wishes = [[A], [IMG], [B], [C]]
  reply, _ = scripted(generator, monkeypatch, wishes, wishes, limit=3)
  assert reply[:-1] == ((A, IMG, B), "a", "b", False)


def test_temperature_samples_and_a_seed_repeats(generator):
  contexts = contexts_of(generator.spec, talk("a"), talk("b"), talk("a"))

  def tokens(seed, temperature=50.0, numbers=None, of=contexts):
    options = Options("nucleus", top_p=1.0, temperature=temperature, seed=seed)
    replies = generator.respond(of, options=options, numbers=numbers)
    return [reply.tokens for reply in replies]

  assert tokens(1) == tokens(1)
  assert tokens(1) != tokens(2)
  one, _, same_prompt = tokens(1)
  assert one != same_prompt  # Each row has draws of its own,
  # which follow from its number, wherever it stands (batches have two rows).
  first, second, third = tokens(1, numbers=[7, 2**32 - 1, 9])
  turned = [contexts[i] for i in (2, 0, 1)]
  moved = tokens(1, numbers=[9, 7, 2**32 - 1], of=turned)
  assert moved == [third, first, second]
  assert first != one
  assert tokens(3, 1e-6) == [r.tokens for r in generator.respond(contexts)]


def test_beams_answer_and_say_how_near_a_photo_was(model):
  opened = set()
  for seed in range(4):
    params = toy_agent.random_params(model, seed)
    generator = toy_agent.generator(model, params)
    contexts = contexts_of(generator.spec, talk("a"), talk("b c"), talk("d"))
    greedy = generator.respond(contexts)
    beams = generator.respond(contexts, options=Options("beam", num_beams=3))
    assert [r.tokens for r in beams] != [r.tokens for r in greedy]
    for context, reply in zip(contexts, beams, strict=True):
      chances = photo_chances(model, params, context, reply.tokens)
      assert reply.photo_score == pytest.approx(max(chances), rel=1e-4)
      opened.add(reply.caption is not None)
  assert opened == {True, False}


def photo_chances(model, params, context, written):
  """The probability of `[img]` at each token up to the first that is one."""
  length = len(context.tokens)
  tokens = np.zeros(40, np.int32)
  tokens[: length + len(written)] = [*context.tokens, *written]
  shown = np.zeros((2, 8, 8, 3), np.uint8)
  scores = scores_after(
    model, params, tokens, np.full(40, -1, np.int32), shown
  )
  found = []
  for step, token in enumerate(written):
    allowed = np.array(scores[length - 1 + step], np.float64)
    allowed[[PAD, BOS, END]] = -np.inf
    weights = np.exp(allowed - allowed.max())
    found.append(weights[IMG] / weights.sum())
    if token == IMG:
      break
  return found


def test_sampling_follows_the_softmax(generator, monkeypatch):
  # Logits 10, 9 and twice 0 at temperature 2, of 8 words that may stand.
  draws = 400
  monkeypatch.setattr(
    generator,
    "settings",
    types.SimpleNamespace(batch_size=draws, max_new_tokens=1),
  )
  jax.clear_caches()
  toy_agent.script(monkeypatch, 3, [[[A, B]]] * draws)
  contexts = contexts_of(generator.spec, *[talk("a")] * draws)
  options = Options("nucleus", top_p=1.0, temperature=2.0)
  replies = generator.respond(contexts, options=options)
  jax.clear_caches()
  share = np.mean([reply.tokens == (A,) for reply in replies])
  # 13 words less <pad>, <s> and [/img]: A, B and 8 others at 0.
  weights = np.exp([10 / 2, 9 / 2] + [0] * 8)
  wanted = weights[0] / weights.sum()
  assert abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / draws)


def test_padded_logits_are_never_chosen(model, generator):
  assert model.config.language.padded_vocab_size > len(WORDS)
  contexts = contexts_of(generator.spec, *[talk("a")] * 20)
  options = Options("nucleus", top_p=1.0, temperature=1e6)
  replies = generator.respond(contexts, options=options)
  assert all(t < len(WORDS) for r in replies for t in r.tokens)


def test_a_photo_depends_on_its_caption_and_seed_alone(generator):
  photos = generator.draw(["a b", "c", "a b"], [1, 2, 3])
  assert photos.shape == (3, *generator.model.photo_shape)
  assert photos.dtype == np.uint8
  # In another place of another batch: the same but for rounding.
  moved = generator.draw(["c", "a b"], [2, 1])
  np.testing.assert_allclose(
    moved[::-1].astype(int), photos[:2].astype(int), atol=1
  )
  assert np.abs(photos[0].astype(int) - photos[2]).max() > 1
  assert np.abs(photos[:1].astype(int) - generator.draw(["h"], [1])).max() > 1
  assert generator.draw([], []).shape == (0, *generator.model.photo_shape)


def test_averaged_weights_draw(model, params, generator):
  averaged = jax.tree.map(lambda x: x * 0.5, params["unet"])
  other = toy_agent.generator(model, params, ema={"unet": averaged})
  whole = toy_agent.generator(model, {**params, "unet": averaged})
  drawn = other.draw(["a"], [0])
  np.testing.assert_array_equal(drawn, whole.draw(["a"], [0]))
  assert (drawn != generator.draw(["a"], [0])).any()
