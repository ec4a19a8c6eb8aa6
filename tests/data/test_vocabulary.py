"""Alignment and vocabulary maps on tokenizers in Llama's and CLIP's formats."""

import subprocess
import sys
import unicodedata

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from photochat_jax.data import tokenizers as tokenizers_lib
from photochat_jax.data import vocabulary

transformers = pytest.importorskip('transformers')
pre_tokenizers = pytest.importorskip('tokenizers.pre_tokenizers')

M = 20  # CLIP slots.
LLM_MERGES = [
  ('▁', 'a'), ('a', 't'), ('▁', 'c'), ('▁', 'd'), ('▁d', 'o'), ('o', 'g'),
  ('▁', 'C'), ('A', 'T'), ('▁', '日'), ('▁', '▁'), ('i', 'n'), ('▁', 'b'),
  ('g', ','), ('e', '▁'),
]
# Those of CLIP are spelled in its letters for bytes: 'ðŁĺ' is F0 9F 98.
CLIP_MERGES = [
  ('c', 'a'), ('ca', 't</w>'), ('ca', 't'), ('d', 'o'), ('do', 'g</w>'),
  ('n', "'"), ("'", 't</w>'), ('ð', 'Ł'), ('ðŁ', 'ĺ'), ('Ã', '©</w>'),
  ('æ', 'Ĺ'), ('æĹ', '¥'), ('i', 'n</w>'), ('i', 'n'),
]


def _with_merges(pieces, merges):
  vocab = dict.fromkeys(pieces)
  vocab.update(dict.fromkeys(a + b for a, b in merges))
  return {piece: i for i, piece in enumerate(vocab)}


@pytest.fixture(scope='module')
def llm(tmp_path_factory):
  octets = [f'<0x{i:02X}>' for i in range(256)]
  pieces = ['<unk>', '<s>', '</s>', *octets, '▁', *"abcdeginotACT日,'"]
  tokenizer = transformers.LlamaTokenizer(
    vocab=_with_merges(pieces, LLM_MERGES), merges=LLM_MERGES
  )
  path = tmp_path_factory.mktemp('llm') / 'tokenizer.json'
  path.write_text(tokenizer.backend_tokenizer.to_str(), encoding='utf-8')
  return tokenizers_lib.load_llm_tokenizer(path)


@pytest.fixture(scope='module')
def clip_oracle():
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  pieces = [*letters, *(letter + '</w>' for letter in letters)]
  vocab = _with_merges(pieces, CLIP_MERGES)
  for name in ('<|startoftext|>', '<|endoftext|>'):
    vocab[name] = len(vocab)
  return transformers.CLIPTokenizer(vocab=vocab, merges=CLIP_MERGES)


@pytest.fixture(scope='module')
def clip(clip_oracle, tmp_path_factory):
  path = tmp_path_factory.mktemp('clip') / 'tokenizer.json'
  path.write_text(clip_oracle.backend_tokenizer.to_str(), encoding='utf-8')
  return tokenizers_lib.load_clip_tokenizer(path, M, 0)


def _written(tokenizer, ids):
  return [tokenizer.token_bytes(int(i)) for i in ids]


def _pieces(clip, z):
  return _written(clip, z[1 : list(z).index(clip.eos_id)])


def _tokens(llm, *spellings):
  """Ids by what they write; None is a control id."""
  ids = {llm.token_bytes(i): i for i in range(llm.vocab_size)}
  return [llm.img_id if s is None else ids[s] for s in spellings]


def _check(llm, clip, ids):
  """What holds of every caption; returns the alignment."""
  z, share, final = vocabulary.align(llm, clip, ids)
  np.testing.assert_array_equal(z, clip.encode_padded(llm.decode(ids)))
  count = list(z).index(clip.eos_id) - 1
  expected = np.zeros(M)
  expected[1 : 1 + count] = 1
  np.testing.assert_allclose(share.sum(-1), expected, atol=1e-6)
  assert (share >= 0).all()
  silent = [not written for written in _written(llm, ids)]
  assert not share[:, silent].any()
  assert z.dtype == np.int32 and share.dtype == np.float32
  assert final.dtype == bool and final.shape == (len(ids),)
  return share


# Text; what the language model's tokens write; what CLIP's pieces spell; the
# shares {(piece, token): share}, worked out by hand.
HALF, THIRD = 1 / 2, 1 / 3
CASES = {
  'words': (
    'a cat', [b' a', b' c', b'at'], [b'a', b'cat'],
    {(0, 0): 1, (1, 1): THIRD, (1, 2): 2 * THIRD},
  ),
  'capitals': (
    'CAT', [b' C', b'AT'], [b'cat'], {(0, 0): THIRD, (0, 1): 2 * THIRD},
  ),
  'emoji': (
    '😀', [b' ', b'\xf0', b'\x9f', b'\x98', b'\x80'],
    [b'\xf0\x9f\x98', b'\x80'],
    {(0, 1): THIRD, (0, 2): THIRD, (0, 3): THIRD, (1, 4): 1},
  ),
  'accent': (
    'É', [b' ', b'\xc3', b'\x89'], [b'\xc3\xa9'], {(0, 1): HALF, (0, 2): HALF},
  ),
  'combining': (  # e and U+0301 are one letter of two bytes in NFC.
    'e\u0301n', [b' ', b'e', b'\xcc', b'\x81', b'n'], [b'\xc3', b'\xa9', b'n'],
    {(2, 4): 1, **{(p, t): THIRD for p in (0, 1) for t in (1, 2, 3)}},
  ),
  'growing': (  # U+0130 in lower case is i and U+0307.
    'İ', [b' ', b'\xc4', b'\xb0'], [b'i', b'\xcc', b'\x87'],
    {(p, t): HALF for p in range(3) for t in (1, 2)},
  ),
  'reordered': (  # NFC swaps the marks: the five bytes answer as one.
    'e\u0301\u0323', [b' ', b'e', b'\xcc', b'\x81', b'\xcc', b'\xa3'],
    [b'\xe1', b'\xba', b'\xb9', b'\xcc', b'\x81'],
    {(p, t): 1 / 5 for p in range(5) for t in range(1, 6)},
  ),
  'contraction': (
    "don't", [b' do', b'n', b"'", b't'], [b'do', b'n', b"'t"],
    {(0, 0): 1, (1, 1): 1, (2, 2): HALF, (2, 3): HALF},
  ),
  'digits': (
    'a 12', [b' a', b' ', b'1', b'2'], [b'a', b'1', b'2'],
    {(0, 0): 1, (1, 2): 1, (2, 3): 1},
  ),
  'cjk': (  # 日 is a token, 本 is three; CLIP cuts neither where they are.
    '日本', [b' \xe6\x97\xa5', b'\xe6', b'\x9c', b'\xac'],
    [b'\xe6\x97\xa5', b'\xe6', b'\x9c', b'\xac'],
    {(0, 0): 1, (1, 1): 1, (2, 2): 1, (3, 3): 1},
  ),
  'spaces': (
    'a   cat  ', [b' a', b'  ', b' c', b'at', b'  '], [b'a', b'cat'],
    {(0, 0): 1, (1, 2): THIRD, (1, 3): 2 * THIRD},
  ),
  'punctuation': (
    'in,a', [b' ', b'in', b',', b'a'], [b'in', b',', b'a'],
    {(0, 1): 1, (1, 2): 1, (2, 3): 1},
  ),
  'empty': ('', [], [], {}),
}


@pytest.mark.parametrize('case', CASES)
def test_alignment_worked_out_by_hand(llm, clip, case):
  text, tokens, pieces, shares = CASES[case]
  ids = llm.encode(text)
  assert _written(llm, ids) == tokens
  share = _check(llm, clip, ids)
  assert _pieces(clip, clip.encode_padded(llm.decode(ids))) == pieces
  expected = np.zeros((M, len(ids)))
  for (piece, token), value in shares.items():
    expected[1 + piece, token] = value
  np.testing.assert_allclose(share, expected, atol=1e-6)


@pytest.mark.parametrize('text', [
  'a cat', "Don't 😀 12,日本", 'ne\u0301 İ', '</s> [img] <|endoftext|>', '',
])
def test_tokens_are_those_of_the_real_tokenizer(llm, clip, clip_oracle, text):
  z, _, _ = vocabulary.align(llm, clip, llm.encode(text))
  # What looks like a control token is text to us: no oracle for that.
  if '<|' not in text:
    expected = clip_oracle(text).input_ids[:-1][: M - 1]
    np.testing.assert_array_equal(z[: len(expected)], expected)
  assert list(z).count(clip.eos_id) == 1


def test_control_ids_own_nothing(llm, clip):
  ids = _tokens(llm, None, b' c', None, b'at', None)
  share = _check(llm, clip, ids)
  np.testing.assert_allclose(share[1], [0, THIRD, 0, 2 * THIRD, 0], atol=1e-6)
  _, share, final = vocabulary.align(llm, clip, _tokens(llm, None, None))
  assert not share.any() and final.all()


def test_broken_utf8_is_owned_by_its_bytes(llm, clip):
  # F0 9F is one U+FFFD (EF BF BD) of two tokens, 98 is one of one.
  ids = _tokens(llm, b'\xf0', b'\x9f', b'a', b'\x98')
  share = _check(llm, clip, ids)
  expected = [[HALF, HALF, 0, 0]] * 3 + [[0, 0, 1, 0]] + [[0, 0, 0, 1]] * 3
  np.testing.assert_allclose(share[1:8], expected, atol=1e-6)


def test_pieces_past_the_last_slot_have_no_row(llm, clip):
  ids = llm.encode('a cat ' * 15)
  share = _check(llm, clip, ids)
  # 18 pieces: nine times 'a', 'cat', which are three tokens.
  assert share[1:-1, : 3 * 9].sum() == pytest.approx(M - 2)
  assert not share[:, 3 * 9 :].any()


def test_final_tells_where_words_end(llm, clip):
  cases = [
    ([b' c', b'at', b' a', b',', b'in'], [0, 1, 0, 0, 1]),
    # A control id writes nothing: the word goes on behind it.
    ([b' c', None, b'at', None, b' a'], [0, 0, 1, 1, 1]),
    ([b' a', b'  ', b'c'], [1, 0, 1]),
  ]
  for tokens, expected in cases:
    _, _, final = vocabulary.align(llm, clip, _tokens(llm, *tokens))
    np.testing.assert_array_equal(final, expected)


def test_longer_n_is_padded_and_wrong_input_refused(llm, clip):
  ids = llm.encode('a cat')
  _, share, final = vocabulary.align(llm, clip, ids, 'a cat', 5)
  assert share.shape == (M, 5) and not share[:, 3:].any()
  np.testing.assert_array_equal(final, [1, 0, 1, 0, 0])
  with pytest.raises(ValueError, match='3 tokens does not fit into 2'):
    vocabulary.align(llm, clip, ids, None, 2)
  with pytest.raises(ValueError, match='not what its tokens decode to'):
    vocabulary.align(llm, clip, ids, 'a dog')


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(st.text(max_size=25))
def test_any_text_is_owned(llm, clip, text):
  _check(llm, clip, llm.encode(text))


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
  st.text(
    'aeE ḍ\u0301\u0323\u0307\u1100\u1161\u11a8İK\u00a0\u3000ſ', max_size=12
  )
)
def test_marks_and_case_are_owned(llm, clip, text):
  for form in ('NFC', 'NFD'):
    _check(llm, clip, llm.encode(unicodedata.normalize(form, text)))


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_tokens_are_owned(llm, clip, data):
  token = st.integers(0, llm.vocab_size - 1)
  _check(llm, clip, data.draw(st.lists(token, max_size=25)))


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(st.text("acatDOGg in'Én日本😀1,", max_size=20))
def test_alignment_equals_a_byte_count_where_case_keeps_lengths(
  llm, clip, text
):
  ids = llm.encode(text)
  share = _check(llm, clip, ids)
  owners = [
    i for i, written in enumerate(_written(llm, ids))
    for octet in written if octet != ord(' ')
  ]
  expected = np.zeros((M, len(ids)))
  for slot, piece in enumerate(
    _pieces(clip, clip.encode_padded(text)), start=1
  ):
    for _ in piece:
      expected[slot, owners.pop(0)] += 1 / len(piece)
  np.testing.assert_allclose(share, expected, atol=1e-6)


def _row(llm, table, spelling):
  (token,) = _tokens(llm, spelling)
  at = table['rows'] == token
  return dict(zip(table['cols'][at].tolist(), table['weights'][at].tolist(),
                  strict=True))


def test_vocabulary_map_worked_out_by_hand(llm, clip, clip_oracle):
  maps, _ = vocabulary.build_vocabulary_map(llm, clip)
  ids = clip_oracle.get_vocab()

  def rows(spelling):
    names = ('static', 'final', 'internal')
    return [_row(llm, maps[name], spelling) for name in names]

  # 'in' is a piece within and at the end of a word; ' do' only within one.
  both = {ids['in']: 0.5, ids['in</w>']: 0.5}
  assert rows(b'in') == [both, {ids['in</w>']: 1}, {ids['in']: 1}]
  assert rows(b' do') == [
    {ids['do']: 1}, {ids['d']: 0.5, ids['o</w>']: 0.5}, {ids['do']: 1},
  ]
  # Exact matches know no lower case; the pieces do.
  assert rows(b'AT') == [
    {}, {ids['a']: 0.5, ids['t</w>']: 0.5}, {ids['a']: 0.5, ids['t']: 0.5},
  ]
  # CLIP's letter for the byte C3 is Ã.
  assert rows(b'\xc3') == [
    {ids['Ã']: 0.5, ids['Ã</w>']: 0.5}, {ids['Ã</w>']: 1}, {ids['Ã']: 1},
  ]
  assert rows(b' \xe6\x97\xa5') == [
    {ids['æĹ¥']: 1}, {ids['æĹ']: 0.5, ids['¥</w>']: 0.5}, {ids['æĹ¥']: 1},
  ]
  # Only the last of a token's words can go on, and none through a space.
  comma = {ids['g</w>']: 0.5, ids[',</w>']: 0.5}
  assert rows(b'g,') == [{}, comma, {ids['g</w>']: 0.5, ids[',']: 0.5}]
  assert rows(b'e ') == [{}, {ids['e</w>']: 1}, {ids['e</w>']: 1}]
  assert rows(b'  ') == [{}, {}, {}]
  np.testing.assert_array_equal(
    maps['specials'], [ids['<|startoftext|>'], ids['<|endoftext|>'], 0]
  )


def test_every_printable_token_reaches_clip(llm, clip):
  maps, coverage = vocabulary.build_vocabulary_map(llm, clip)
  written = _written(llm, range(llm.vocab_size))
  control = sum(not w for w in written)
  spaces = sum(bool(w) and not w.decode('utf-8', 'replace').strip(
    ' \t\n\v\f\r') for w in written)
  for name in ('final', 'internal'):
    table = maps[name]
    assert (np.diff(table['rows']) >= 0).all()
    total = np.bincount(
      table['rows'], table['weights'], minlength=llm.vocab_size
    )
    np.testing.assert_allclose(total[total > 0], 1, atol=1e-6)
    assert (total == 0).sum() == control + spaces
    assert coverage.zero[name] == {'control': control, 'white space': spaces}
  assert coverage.zero['static']['not in CLIP as a piece'] > 0
  assert f'final: {llm.vocab_size - control - spaces} of' in str(coverage)
  assert f'{control} control' in str(coverage)


def test_retokeniser_is_align_for_a_batch(llm, clip):
  texts = ['a cat', '', "don't 😀", 'a cat']
  tokens = np.full((4, 12), llm.pad_id, np.int32)
  mask = np.zeros((4, 12), bool)
  for x, text in enumerate(texts):
    ids = llm.encode(text)
    tokens[x, : len(ids)], mask[x, : len(ids)] = ids, True
  # The last one's tokens need not stand together.
  tokens[3, [2, 5, 7]] = llm.encode('a cat')
  mask[3] = np.isin(np.arange(12), [2, 5, 7])
  tokens[~mask] = llm.encode('g')[-1]
  z, share, final = vocabulary.Retokeniser(llm, clip, 12)(tokens, mask)
  for x, text in enumerate(texts):
    expected = vocabulary.align(llm, clip, llm.encode(text))
    np.testing.assert_array_equal(z[x], expected[0])
    np.testing.assert_array_equal(share[x][:, mask[x]], expected[1])
    np.testing.assert_array_equal(final[x][mask[x]], expected[2])
    assert not share[x][:, ~mask[x]].any() and not final[x][~mask[x]].any()
  assert (z.dtype, share.dtype, final.dtype) == (np.int32, np.float32, bool)


def test_retokeniser_asks_once_for_each_caption(llm, clip, monkeypatch):
  calls = []
  monkeypatch.setattr(
    clip, 'encode_padded',
    lambda text: calls.append(text) or type(clip).encode_padded(clip, text),
  )
  retokenise = vocabulary.Retokeniser(llm, clip, 3)
  tokens = np.array([llm.encode('a cat')] * 2, np.int32)
  for _ in range(2):
    retokenise(tokens, np.ones((2, 3), bool))
  assert calls == ['a cat']
  with pytest.raises(ValueError, match='4 positions, not 3'):
    retokenise(np.zeros((1, 4), np.int32), np.ones((1, 4), bool))


def test_imports_no_jax():
  subprocess.run(
    [sys.executable, '-c',
     'import sys, photochat_jax.data.vocabulary;'
     'assert "jax" not in sys.modules'],
    check=True,
  )
