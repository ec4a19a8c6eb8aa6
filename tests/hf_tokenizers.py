"""Small tokenizers in the formats of real checkpoints, and lines to try them.

Vocabularies are learnt from the texts here and from the sample dialogues; the
pipelines around them (normaliser, splitting, control tokens) are the published
ones. Each builder gives transformers' tokenizer, whose `save_pretrained` writes
the folder of a checkpoint.
"""

import functools
import json
import pathlib
import random

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SAMPLE = pathlib.Path(__file__).parent / "data" / "photochat_sample"
LLAMA3_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_PATTERN = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|"
  r"[\p{N}]|[^\s\p{L}\p{N}]+"
)
SCRIPTS = {
  "Latin": "Ça va, Zoë? naïve façade, Ærø, Łódź, İstanbul, straße, ﬁn, Việt",
  "combining": "e\u0301te\u0301 n\u0303 a\u0323\u0301 Z\u0335\u0337",
  "Cyrillic": "Привет, как дела? Ёж и щука, ще не вмерла",
  "Greek": "Καλημέρα, πώς είσαι; Σίσυφος ὁδός",
  "Arabic": "مرحبا، كيف حالك؟ شُكْرًا",
  "Hebrew": "שלום, מה שלומך? שָׁלוֹם",
  "Hindi": "नमस्ते, आप कैसे हैं? क्षत्रिय",
  "Thai": "สวัสดีครับ สบายดีไหม",
  "Chinese": "你好，你好吗？我们去看猫。",
  "Japanese": "こんにちは、元気ですか。ネコとｶﾞｷﾞ",
  "Hangul": "안녕하세요, 잘 지내요? 하늘 \u1112\u1161\u11ab",
  "emoji": "😀 👩‍👩‍👧‍👦 👍🏽 🇩🇪🇯🇵 ❤️ 🏳️‍🌈 1️⃣",
  "invisible": "a\u200bb c\u200cd \u200e\u202eabc\u202c \ufeffx \u00adsoft",
  "digits": "2 10 123 4567 3.14 ٣٤ ५६ ² ½ 12:30 1,000,000",
  "contractions": "I'm you're it's WE'LL don't they've he'd o'clock ’tis",
  "spaces": "a  b   c\td\n\ne \r\n f\u00a0g\u3000h",
  "signs": "!!! ??? ... -- @user #tag $5 100% <br> {x} [y] \\ ~ `z` __init__",
  "planes": "𝔘𝔫𝔦 𐍈 𠮷野 \U000f0000 \U0010ffff \ue000",
}
LOOKALIKES = (
  *("<s>", "</s>", "<unk>", "<0x0A>", "▁", "</w>", "Ġ", "<pad>"),
  *("<|startoftext|>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>"),
  *("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
  *("<|finetune_right_pad_id|>", "<|im_start|>", "<|im_end|>", "[img]"),
  *("[/img]", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
  *("<|user|>", "<|assistant|>", "<|system|>", "<|USER|>", "[/IN[/INST]ST]"),
)
# As published, but for Llama 2's check that turns alternate.
CHAT_TEMPLATES = {
  "llama2": (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' "
    "+ message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
  ),
  "llama3": (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
  ),
  "chatml": (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
  ),
  "zephyr": (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
  ),
}
PLAIN = "user assistant system INST img yes no cat dog photo look here".split()


def lines(count: int, seed: int, lookalikes: bool = True) -> list[str]:
  """Lines that mix scripts, white space and, if wanted, control look-alikes."""
  draw = random.Random(seed)
  pools = [text.split(" ") for text in SCRIPTS.values()] + [PLAIN, PLAIN]
  pools += [LOOKALIKES] * (5 if lookalikes else 0)
  joints = [" "] * 6 + ["", "  ", "\t", "\n", "\n\n", "\u200b", ", "]
  found = []
  for _ in range(count):
    parts = []
    for _ in range(draw.randint(1, 9)):
      parts += [draw.choice(draw.choice(pools)), draw.choice(joints)]
    whole = draw.random() < 0.2
    line = "".join(parts) + (draw.choice([*SCRIPTS.values()]) if whole else "")
    # The joint at the end stays, as do those that begin the next line.
    found.append(draw.choice(["", "", " ", "\n"]) + line)
  return found


@functools.cache
def corpus() -> tuple[str, ...]:
  """What the vocabularies are learnt from."""
  texts = [text for text in SCRIPTS.values() for _ in range(3)]
  for path in sorted(SAMPLE.glob("*/*.json")):
    for record in json.loads(path.read_text(encoding="utf-8")):
      texts += [turn["message"] for turn in record["dialogue"]]
  return (*texts, *(f"{a} {b}" for a in PLAIN for b in PLAIN))


def _learn(pre_tokenizer, size, texts=(), **options):
  """Vocabulary and merges of a new byte pair encoding."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizer
  trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, **options)
  tokenizer.train_from_iterator(texts or corpus(), trainer)
  model = json.loads(tokenizer.to_str())["model"]
  return model["vocab"], [tuple(merge) for merge in model["merges"]]


@functools.cache
def _learn_llama2():
  octets = [f"<0x{octet:02X}>" for octet in range(256)]
  vocab, merges = _learn(
    pre_tokenizers.Metaspace(),
    1200,
    [" ".join(text.split()) for text in corpus()],  # Line feeds are bytes.
    special_tokens=["<unk>", "<s>", "</s>", *octets],
    initial_alphabet=[*map(chr, range(33, 127))],
    limit_alphabet=150,
  )
  # Llama's first merges are of spaces; these never meet others.
  merges = [("▁", "▁"), ("▁▁", "▁▁"), *merges]
  for left, right in merges[:2]:
    vocab.setdefault(left + right, len(vocab))
  return vocab, merges


def llama2(style: str = "old"):
  """Llama 2's kind (TinyLlama's, too), in one of the styles of real files.

  Args:
    style: 'old' as the published files: the normaliser puts the mark before
      each stretch between control tokens; 'always' and 'first' as transformers
      5 writes them, with `legacy` or without: before each, before the first.
  """
  import transformers

  vocab, merges = _learn_llama2()
  tokenizer = transformers.LlamaTokenizer(
    vocab=vocab, merges=merges, legacy=style == "always"
  )
  if style != "old":
    return tokenizer
  backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
  backend.pre_tokenizer = None
  backend.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token="<s>",
    eos_token="</s>",
    unk_token="<unk>",
  )


@functools.cache
def _learn_bytes(kind):
  letters = pre_tokenizers.ByteLevel.alphabet()
  if kind == "llama3":
    split = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    )
    special = []
  else:
    split = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
      ]
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
  learnt = _learn(split, 1000, initial_alphabet=letters, special_tokens=special)
  return split, special, *learnt


def _byte_level(kind, special, **names):
  import transformers

  split, known, vocab, merges = _learn_bytes(kind)
  backend = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=merges, ignore_merges=kind == "llama3")
  )
  backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
  backend.add_special_tokens(
    [tokenizers.AddedToken(n, special=True) for n in (*known, *special)]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, clean_up_tokenization_spaces=False, **names
  )


def llama3():
  """Llama 3's kind; the control tokens that chat uses, of its 256."""
  special = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"),
    *("<|finetune_right_pad_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
  )
  return _byte_level(
    "llama3", special, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
  )


def smollm2():
  """SmolLM2's kind, with the roles of the instruct models."""
  return _byte_level(
    "smollm2",
    (),
    bos_token="<|im_start|>",
    eos_token="<|im_end|>",
    pad_token="<|im_end|>",
    unk_token="<|endoftext|>",
  )


@functools.cache
def _learn_clip():
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  split = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(CLIP_PATTERN), "removed", True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  _, merges = _learn(
    split, 900, initial_alphabet=letters, end_of_word_suffix="</w>"
  )
  pieces = dict.fromkeys(letters + [f"{letter}</w>" for letter in letters])
  merges = [m for m in merges if _grow(pieces, m)]
  vocab = [*pieces, "<|startoftext|>", "<|endoftext|>"]
  return {piece: number for number, piece in enumerate(vocab)}, merges


def _grow(pieces, merge) -> bool:
  known = merge[0] in pieces and merge[1] in pieces
  if known:
    pieces["".join(merge)] = None
  return known


def clip(pad_token: str = "<|endoftext|>"):
  """CLIP's; Stable Diffusion 2.x pads with '!', whose id is 0."""
  import transformers

  vocab, merges = _learn_clip()
  return transformers.CLIPTokenizer(
    vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77
  )
