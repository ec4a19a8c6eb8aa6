"""The memory of a chip by kind, and the compiler's messages about it."""

import types

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from photochat_jax import sharding
from photochat_jax.compiled import memory, step
from photochat_jax.config import StageConfig
from photochat_jax.state import TrainState

TOO_MUCH = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of \
memory in memory space hbm. Used 23.50G of 15.75G hbm. Exceeded hbm capacity by
 7.75G.

Total hbm usage >= 23.75G:
    reserved        258.00M
    program          23.50G

Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(step)/jvp(Llama)/add"
     Shape: f32[32768,32768]{1,0:T(8,128)}
     Unpadded size: 4.00G
     ==========================

  2. Size: 512.0M
     Shape: bf16[16,16777216]{1,0}
     ==========================
"""
TEMPORARIES = (
  "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
  "HLO temporaries (72.00G) exceeds available HBM (15.75G)."
)
GIB = 2**30


def test_the_total_counts_what_is_written_over_once():
  found = memory.read_analysis(
    types.SimpleNamespace(
      argument_size_in_bytes=100,
      alias_size_in_bytes=90,
      output_size_in_bytes=95,
      temp_size_in_bytes=30,
      generated_code_size_in_bytes=7,
    )
  )
  assert found.total == 100 + (95 - 90) + 30 + 7


def test_what_does_not_fit_is_read_from_the_message():
  found = memory.read_overflow(TOO_MUCH, 1)
  assert found.used == 23.5 * GIB and found.limit == 15.75 * GIB
  assert found.largest == (
    (4 * GIB, "f32[32768,32768]", "jit(step)/jvp(Llama)/add"),
    (GIB // 2, "bf16[16,16777216]", ""),
  )


def test_temporaries_come_on_top_of_the_arguments():
  found = memory.read_overflow(TEMPORARIES, 3 * GIB)
  assert found.used == 75 * GIB and found.limit == 15.75 * GIB


def test_another_message_is_not_about_memory():
  assert memory.read_overflow("INTERNAL: something else") is None


def test_the_state_by_part_and_kind():
  mesh = sharding.make_mesh()

  def array(dtype, *shape):
    place = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  params = {
    "unet": {"conv_in": {"kernel": array(np.float32, 3, 5)}},
    "vae": {"conv_in": {"kernel": array(np.float16, 7)}},
  }
  moments = {"unet": params["unet"]}
  state = TrainState(
    step=array(np.int32),
    params=params,
    opt_state=({"mu": moments, "nu": moments}, array(np.int32)),
    ema={"unet": params["unet"]},
    latent_scale=array(np.float32),
  )
  found = memory.state_bytes(
    step.AbstractStep(None, state, {}, {}), StageConfig(trainable=("unet/.*",))
  )
  assert found == {
    "unet": {"trained": 60, "optimiser": 120, "averages": 60},
    "vae": {"frozen": 14},
    "step": {"optimiser": 4, "trained": 8},
  }
  assert memory.tree_bytes(state) == 60 + 120 + 60 + 14 + 12
