"""The language model there and back, and its vocabulary grown."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from photochat_jax.checkpoints import files, llama, tables
from photochat_jax.models.llama import Llama, LlamaConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import hf_compare  # noqa: E402
import hf_export  # noqa: E402
import hf_models  # noqa: E402
import random_params  # noqa: E402

LANGUAGES = {
  "tied, llama3": LlamaConfig(
    vocab_size=129,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=10,
    rope_theta=500.0,
    rope_scaling={
      "rope_type": "llama3",
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 16,
    },
    tie_word_embeddings=True,
  ),
  "linear": LlamaConfig(
    vocab_size=128,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    rms_norm_eps=1e-2,
    rope_scaling={"rope_type": "linear", "factor": 4.0},
  ),
}


def scores(config, params, tokens):
  """Our language model's logits [B, L, V], jitted."""
  module = Llama(config)

  @jax.jit
  def run(params):
    embeds = module.apply({"params": params}, tokens, method="embed")
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = module.apply(
      {"params": params}, embeds, positions, jnp.ones_like(positions)
    )
    return module.apply({"params": params}, hidden, method="logits")

  return np.asarray(run(params))


def their_scores(model, tokens):
  with torch.no_grad():
    return model(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize("name", LANGUAGES)
def test_transformers_opens_our_language_model(name, tmp_path):
  config = LANGUAGES[name]
  params = random_params.draw(hf_models.abstract(config))
  content = llama.write_config(config, config.vocab_size, eos_token_id=5)
  hf_export.publish(tmp_path, content, llama.table(config), params)
  model = hf_export.opened(transformers.LlamaForCausalLM, tmp_path)
  assert model.config.eos_token_id == 5
  assert isinstance(
    hf_export.opened(transformers.AutoModelForCausalLM, tmp_path), type(model)
  )
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 20))
  hf_compare.assert_outputs_equal(
    scores(config, params, tokens)[..., : config.vocab_size],
    their_scores(model, tokens),
  )
  # Our own way back gives the config we had.
  head_dim = config.size_per_head
  assert llama.read_config(content) == dataclasses.replace(
    config, head_dim=head_dim
  )


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_grows_and_shrinks_back(tied, tmp_path):
  # From one multiple of 128 over the next: the padding grows as well.
  pair = hf_models.language(
    tmp_path / "theirs", vocab_size=127, tie_word_embeddings=tied
  )
  config = dataclasses.replace(pair.config, vocab_size=129)
  assert config.padded_vocab_size == 256
  table = llama.table(config, 127, fresh=(127, 128))
  tensors = files.Tensors(pair.folder)
  params = tables.read(table, hf_models.abstract(config), tensors)
  grown = {"model.embed_tokens.weight": params["embed_tokens"]["embedding"]}
  if not tied:
    grown["lm_head.weight"] = params["lm_head"]["kernel"].T
  for key, ours in grown.items():
    theirs = pair.oracle.state_dict()[key]
    np.testing.assert_array_equal(ours[:127], theirs.numpy())
    mean = theirs.double().mean(0).float().numpy()
    np.testing.assert_allclose(ours[127:129], [mean, mean], rtol=1e-6)
    np.testing.assert_array_equal(ours[129:], 0)
  tokens = np.random.default_rng(1).integers(0, 129, (2, 9))
  got = scores(config, params, tokens)
  assert np.isfinite(got[..., :129]).all()
  assert np.all(got[..., 129:] == -np.inf)

  kept, content = tmp_path / "kept", llama.write_config(config, 129)
  hf_export.publish(kept, content, llama.table(config), params)
  model = hf_export.opened(transformers.LlamaForCausalLM, kept)
  assert model.vocab_size == 129
  hf_compare.assert_outputs_equal(got[..., :129], their_scores(model, tokens))

  undone = tmp_path / "undone"
  hf_export.publish(undone, llama.write_config(config, 127), table, params)
  hf_compare.assert_same(
    {key: np.asarray(tensor) for key, tensor in files.Tensors(undone).items()},
    {key: np.asarray(tensor) for key, tensor in tensors.items()},
  )


def test_new_marks_may_take_rows_that_the_file_left_unused(tmp_path):
  pair = hf_models.language(tmp_path, vocab_size=9)
  table = llama.table(pair.config, 9, fresh=(8, 3))
  tensors = files.Tensors(pair.folder)
  params = tables.read(table, pair.shapes, tensors)
  theirs = np.asarray(tensors["model.embed_tokens.weight"])
  ours = params["embed_tokens"]["embedding"]
  others = [0, 1, 2, 4, 5, 6, 7]
  np.testing.assert_array_equal(ours[others], theirs[others])
  mean = theirs[others].astype(np.float64).mean(0)
  np.testing.assert_allclose(ours[[3, 8]], [mean, mean], rtol=1e-5, atol=1e-7)


def test_a_file_with_more_tokens_than_the_vocabulary_is_refused():
  config = LANGUAGES["linear"]
  with pytest.raises(files.WeightsError, match="129 tokens and vocab_size is"):
    llama.table(config, 129)


def test_half_precision_goes_out_as_it_came_in(tmp_path):
  config = LANGUAGES["linear"]
  params = jax.tree.map(
    lambda x: x.astype(ml_dtypes.bfloat16),
    random_params.draw(hf_models.abstract(config)),
  )
  table = llama.table(config)
  files.write_tensors(tmp_path, tables.write(table, params))
  content = llama.write_config(config, config.vocab_size, "bfloat16")
  files.write_json(tmp_path / "config.json", content)
  model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
  assert model.dtype == torch.bfloat16
  want = dict(tables.write(table, params))
  for key, value in model.state_dict().items():
    np.testing.assert_array_equal(
      value.float().numpy(), want[key].astype(np.float32)
    )
  back = tables.read(
    table, hf_models.abstract(config), files.Tensors(tmp_path)
  )
  hf_compare.assert_same(back, params)
