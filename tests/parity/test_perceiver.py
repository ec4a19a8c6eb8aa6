"""The image perceptron against the eyes of transformers' BLIP-2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from photochat_jax.models import qformer, vit

torch = pytest.importorskip("torch")
import hf_compare  # noqa: E402
import hf_models  # noqa: E402

# Name: differences of the vision model and the Q-Former, fields of ours.
CASES = {
  "as published": {},
  "odd sizes, every layer looks": {
    "vision": {
      "image_size": 35,
      "patch_size": 7,
      "hidden_size": 21,
      "num_attention_heads": 3,
      "qkv_bias": False,
      "layer_norm_eps": 1e-2,
    },
    "queries": {
      "hidden_size": 15,
      "num_attention_heads": 5,
      "num_hidden_layers": 3,
      "cross_attention_frequency": 1,
      "encoder_hidden_size": 21,
      "layer_norm_eps": 1e-2,
    },
    "ours": {"remat": "full"},
  },
  "every third layer looks": {
    "vision": {"image_size": 10, "patch_size": 5, "num_hidden_layers": 2},
    "queries": {"num_hidden_layers": 6, "cross_attention_frequency": 3},
  },
}


@pytest.mark.parametrize("name", CASES)
def test_every_stage_and_all_gradients_equal_the_originals(name, tmp_path):
  pair = hf_models.blip2(tmp_path, **CASES[name])
  vision, queries = pair.config
  width = hf_models.LANGUAGE["hidden_size"]
  size = vision.image_size
  rng = np.random.default_rng(2)
  pixels = rng.standard_normal((2, size, size, 3)).astype(np.float32)

  torch_pixels = hf_compare.channels_first(pixels).requires_grad_()
  seen = pair.oracle.get_image_features(torch_pixels, return_dict=True)
  want = (
    seen.last_hidden_state,
    seen.qformer_outputs.last_hidden_state,
    seen.pooler_output,
  )
  weights = [hf_compare.cotangent(x.shape, i) for i, x in enumerate(want)]
  sum(
    (x * torch.from_numpy(weight)).sum()
    for x, weight in zip(want, weights, strict=True)
  ).backward()

  def loss(params, pixels):
    features = vit.ViT(vision).apply({"params": params["vision_model"]}, pixels)
    tokens = qformer.QFormer(queries).apply(
      {"params": params["qformer"]}, features
    )
    projected = qformer.Projection(width).apply(
      {"params": params["language_projection"]}, tokens
    )
    got = features, tokens, projected
    return sum(map(jnp.vdot, got, weights)), got

  (by_params, by_pixels), got = jax.jit(
    jax.grad(loss, (0, 1), has_aux=True), compiler_options=hf_compare.FAST
  )(pair.params, pixels)
  for ours, theirs in zip(got, want, strict=True):
    hf_compare.assert_outputs_equal(ours, theirs.detach().numpy())
  hf_compare.assert_gradients_equal(by_params, hf_compare.gradients(pair))
  hf_compare.assert_gradients_equal(
    {"pixels": by_pixels},
    {"pixels": hf_compare.channels_last(torch_pixels.grad)},
  )
