"""BLIP-2 captions photos as transformers itself would."""

import json
import logging
import sys

import numpy as np
import pytest
from PIL import Image

from photochat_jax import caption
from photochat_jax.caption_blip2 import Blip2Captioner
from photochat_jax.captioners import CaptionError, Written
from photochat_jax.checkpoints.files import WeightsError
from photochat_jax.data import images
from photochat_jax.data.schema import Photo
from photochat_jax.decoding_options import Options

VISION = dict(
  image_size=16,
  patch_size=4,
  hidden_size=12,
  intermediate_size=20,
  num_hidden_layers=2,
  num_attention_heads=2,
)
QFORMER = dict(
  vocab_size=30,
  hidden_size=8,
  intermediate_size=10,
  num_hidden_layers=2,
  num_attention_heads=2,
)
# 12 words and the controls; the processor adds <image>.
WORDS = "<pad> <s> </s> a big red cat dog sits on the mat sofa with it".split()
PAD, BOS, EOS = range(3)
LANGUAGE = {
  "opt": dict(
    model_type="opt",
    hidden_size=16,
    word_embed_proj_dim=16,
    ffn_dim=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
  ),
  "t5": dict(
    model_type="t5",
    d_model=16,
    d_kv=8,
    d_ff=16,
    num_layers=1,
    num_heads=2,
    decoder_start_token_id=PAD,
  ),
}


def write(folder, kind, seed):
  """A tiny random BLIP-2, as `save_pretrained` leaves it."""
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  import hf_models
  import tokenizers

  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<pad>")
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token="<pad>",
    bos_token="<s>",
    eos_token="</s>",
  )
  processor = transformers.Blip2Processor(
    transformers.BlipImageProcessorPil(size={"height": 16, "width": 16}),
    tokenizer,
    num_query_tokens=3,
  )
  language = LANGUAGE[kind] | dict(
    vocab_size=len(WORDS) + 1,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
  )
  config = transformers.Blip2Config(
    vision_config=VISION,
    qformer_config=QFORMER,
    text_config=language,
    num_query_tokens=3,
    image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
  )
  net = transformers.Blip2ForConditionalGeneration(config)
  hf_models.randomise(net, seed, loud="projection")
  net.save_pretrained(folder)
  processor.save_pretrained(folder)
  return net, processor


@pytest.fixture(scope="module", params=["opt", "t5"])
def blip2(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("hub") / f"blip2-{request.param}"
  # Random models of which some captions end and some do not.
  seed = {"opt": 21, "t5": 4}[request.param]
  return folder, *write(folder, request.param, seed)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  found = []
  for i in range(7):
    path = folder / f"{i}.png"
    pixels = rng.integers(0, 256, (20, 14 + i, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    found.append(Photo(f"train/{i}", "", None, path))
  return found


@pytest.fixture
def opened(blip2):
  def make(options, batch_size=3):
    return Blip2Captioner(str(blip2[0]), options, batch_size)

  return make


def expected(blip2, photos, **options):
  """What transformers' own `generate` says of a batch."""
  _, net, processor = blip2
  read = [images.decode(p.path.read_bytes()) for p in photos]
  inputs = processor(images=read, return_tensors="pt")
  out = net.generate(**inputs, max_new_tokens=6, **options)
  texts = processor.batch_decode(out, skip_special_tokens=True)
  return [" ".join(text.split()) for text in texts]


def write_all(captioner, photos):
  read = [images.decode(p.path.read_bytes()) for p in photos]
  prepared = [captioner.prepare(image) for image in read]
  return captioner.write([p.id for p in photos], prepared)


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_hold_what_transformers_generates(
  blip2, photos, tmp_path, opened, beams
):
  wanted = expected(
    blip2, photos, do_sample=False, num_beams=beams, length_penalty=0.5
  )
  assert len(set(wanted)) > 1
  options = Options(num_beams=beams, length_penalty=0.5, max_tokens=6)
  captioner = opened(options)
  path = tmp_path / caption.FILE
  summary = caption.caption_photos(photos, captioner, path)
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  said = {row["photo_id"]: row["caption"] for row in rows}
  assert [said.get(p.id, "") for p in photos] == wanted
  assert summary.written == sum(map(bool, wanted))
  assert summary.empty == [
    p.id for p, text in zip(photos, wanted, strict=True) if not text
  ]
  longest = sum(len(text.split()) == 6 for text in wanted)
  assert summary.cut >= longest
  assert {row["model"] for row in rows} == {captioner.model}
  assert captioner.model.startswith(f"{blip2[0].name}@")


def test_a_caption_that_ended_is_not_cut(photos, opened):
  short = write_all(opened(Options("greedy", max_tokens=20)), photos)
  longer = write_all(opened(Options("greedy", max_tokens=21)), photos)
  for one, other in zip(short, longer, strict=True):
    if not one.cut:
      assert other == one
  assert not all(written.cut for written in short)


def test_samples_belong_to_their_photo(photos, opened):
  options = Options("nucleus", top_p=0.8, max_tokens=6)
  captioner = opened(options)
  together = write_all(captioner, photos)
  alone = [write_all(captioner, [photo])[0] for photo in photos]
  assert alone == together
  assert write_all(captioner, photos[::-1]) == together[::-1]
  other = Options("nucleus", top_p=0.8, max_tokens=6, seed=1)
  assert write_all(opened(other), photos) != together
  greedy = write_all(opened(Options("greedy", max_tokens=6)), photos)
  assert greedy != together
  cold = Options("nucleus", temperature=1e-6, max_tokens=6)
  assert write_all(opened(cold), photos) == greedy


def test_a_control_token_is_not_in_a_caption(photos, opened):
  hot = Options("nucleus", top_p=1.0, temperature=50.0, max_tokens=12)
  for written in write_all(opened(hot), photos):
    assert isinstance(written, Written)
    assert not {"<s>", "</s>", "<pad>", "<image>"} & {*written.text.split()}


def test_without_torch_it_says_what_to_install(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(CaptionError, match=r"photochat_jax\[caption\]"):
    Blip2Captioner(str(tmp_path), Options(), 2)


def test_folders_that_are_no_blip2(tmp_path):
  pytest.importorskip("torch")
  with pytest.raises(WeightsError, match="no folder .*give the folder"):
    Blip2Captioner(str(tmp_path / "nothing"), Options(), 2)
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
  with pytest.raises(WeightsError, match="run code when opened"):
    Blip2Captioner(str(tmp_path), Options(), 2)
  folder = tmp_path / "old"
  write(folder, "opt", 1)
  settings = json.loads((folder / "config.json").read_text())
  changed = settings | {"image_token_index": None}
  (folder / "config.json").write_text(json.dumps(changed))
  with pytest.raises(CaptionError, match="has no image_token_index"):
    Blip2Captioner(str(folder), Options(), 2)
  (folder / "config.json").write_text(json.dumps(settings))
  (folder / "processor_config.json").unlink()
  (folder / "tokenizer.json").unlink()
  logging.getLogger("transformers").setLevel(logging.ERROR)
  with pytest.raises(CaptionError, match="is no BLIP-2 that captions"):
    Blip2Captioner(str(folder), Options(), 2)
