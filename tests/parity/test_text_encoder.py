"""The text encoder against transformers' `CLIPTextModel`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import clip_text

torch = pytest.importorskip("torch")
import hf_compare  # noqa: E402
import hf_models  # noqa: E402

# Name: differences, lengths of captions, fields of ours.
CASES = {
  "quick_gelu": ({"hidden_act": "quick_gelu"}, (9, 5), {}),
  "gelu, odd sizes": (
    {
      "hidden_act": "gelu",
      "vocab_size": 37,
      "hidden_size": 21,
      "intermediate_size": 33,
      "num_attention_heads": 3,
      "layer_norm_eps": 1e-2,
    },
    (7,),
    {"remat": "full"},
  ),
  "one layer": ({"num_hidden_layers": 1}, (2,), {}),
}


@pytest.mark.parametrize(
  "name,length",
  [(name, length) for name, case in CASES.items() for length in case[1]],
)
def test_states_and_all_gradients_equal_the_originals(name, length, tmp_path):
  changes, _, ours = CASES[name]
  pair = hf_models.text(tmp_path, ours, **changes)
  config, model = pair.config, clip_text.CLIPText(pair.config)
  ids = np.random.default_rng(2).integers(0, config.vocab_size, (3, length))
  weights = hf_compare.cotangent((3, length, config.hidden_size), 3)

  vectors = []

  def keep(module, args, output):
    output.retain_grad()
    vectors.append(output)

  pair.oracle.embeddings.token_embedding.register_forward_hook(keep)
  want = pair.oracle(torch.from_numpy(ids)).last_hidden_state
  (want * torch.from_numpy(weights)).sum().backward()

  def loss(params, shift):
    embeds = model.apply({"params": params}, ids, method="embed")
    got = model.apply({"params": params}, embeds + shift)
    return jnp.vdot(got, weights), got

  zeros = np.zeros(vectors[0].shape, np.float32)
  (by_params, by_vectors), got = jax.jit(
    jax.grad(loss, (0, 1), has_aux=True), compiler_options=hf_compare.FAST
  )(pair.params, zeros)
  hf_compare.assert_outputs_equal(got, want.detach().numpy())
  hf_compare.assert_gradients_equal(by_params, hf_compare.gradients(pair))
  hf_compare.assert_gradients_equal(
    {"vectors": by_vectors}, {"vectors": vectors[0].grad.numpy()}
  )


def test_a_model_without_its_last_layer_gives_the_penultimate_states(tmp_path):
  # How Stable Diffusion 2.x ships OpenCLIP's 24 layers: 23 of them.
  whole = hf_models.text(tmp_path / "whole", hidden_act="gelu")
  layers = whole.config.num_hidden_layers - 1
  ids = np.random.default_rng(2).integers(0, 50, (2, 9))
  with torch.no_grad():
    states = whole.oracle(torch.from_numpy(ids), output_hidden_states=True)
    want = whole.oracle.final_layer_norm(states.hidden_states[-2]).numpy()

  cut = hf_models.text(
    tmp_path / "cut", hidden_act="gelu", num_hidden_layers=layers
  )
  params = {
    **whole.params,
    "layers": jax.tree.map(lambda x: x[:layers], whole.params["layers"]),
  }
  assert cut.config == dataclasses.replace(
    whole.config, num_hidden_layers=layers
  )
  model = clip_text.CLIPText(cut.config)
  embeds = model.apply({"params": params}, ids, method="embed")
  got = jax.jit(model.apply)({"params": params}, embeds)
  hf_compare.assert_outputs_equal(got, want)
