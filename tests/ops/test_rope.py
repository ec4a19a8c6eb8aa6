"""ops/rope.py against complex rotations and transformers."""

import chex
import numpy as np
import pytest

from photochat_jax.ops import rope

LLAMA3 = {
    'rope_type': 'llama3',
    'factor': 32.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
}


@pytest.mark.parametrize(
    'scaling', [None, {'rope_type': 'linear', 'factor': 4.0}, LLAMA3]
)
def test_frequencies_equal_transformers(scaling):
  pytest.importorskip('torch')
  from transformers.models.llama import configuration_llama, modeling_llama

  config = configuration_llama.LlamaConfig(
      hidden_size=128,
      num_attention_heads=2,
      max_position_embeddings=16384,
      rope_parameters={
          'rope_type': 'default',
          'rope_theta': 500000.0,
          **(scaling or {}),
      },
  )
  want = modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
  got = rope.rope_frequencies(64, 500000.0, scaling)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_older_files_say_type():
  np.testing.assert_array_equal(
      rope.rope_frequencies(8, 100.0, {'type': 'linear', 'factor': 2.0}),
      np.array([1.0, 100**-0.25, 0.1, 100**-0.75], np.float32) / 2,
  )


def test_rotation_is_a_complex_product_of_the_halves():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 5, 3, 8)).astype(np.float32)
  positions = rng.integers(0, 100, (2, 5))
  inv_freq = rope.rope_frequencies(8, 10000.0)
  got = rope.apply_rope(x, *rope.rope_angles(positions, inv_freq))
  turn = np.exp(1j * positions[..., None, None] * inv_freq.astype(np.float64))
  want = (x[..., :4] + 1j * x[..., 4:]) * turn
  want = np.concatenate([want.real, want.imag], axis=-1)
  chex.assert_trees_all_close(got, want.astype(np.float32), atol=2e-5)


def test_scores_depend_on_the_distance_alone():
  rng = np.random.default_rng(1)
  q, k = rng.standard_normal((2, 1, 1, 1, 16)).astype(np.float32)
  inv_freq = rope.rope_frequencies(16, 10000.0)

  def score(q_position, k_position):
    rotated = [
        rope.apply_rope(x, *rope.rope_angles(np.array([[p]]), inv_freq))
        for x, p in ((q, q_position), (k, k_position))
    ]
    return float((rotated[0] * rotated[1]).sum())

  assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
  assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


@pytest.mark.parametrize(
    ('head_dim', 'scaling', 'message'),
    [
        (7, None, 'even'),
        (8, {'rope_type': 'yarn', 'factor': 2.0}, "'yarn' is not supported"),
        (8, {'rope_type': 'linear'}, "needs the entry 'factor'"),
        (8, {'rope_type': 'llama3', 'factor': 8.0}, 'low_freq_factor'),
    ],
)
def test_refuses_what_it_cannot_do(head_dim, scaling, message):
  with pytest.raises(ValueError, match=message):
    rope.rope_frequencies(head_dim, 10000.0, scaling)
