"""What a program sends and holds, on a program written by hand."""

import pytest

from photochat_jax.compiled import hlo, usage

# A loop of 5 layers which gathers a kernel beside a product (so that it is
# printed twice) and scatters a sum; then, once, an asynchronous gather.
TEXT = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/photochat_jax/models/llama.py"
2 "/home/me/flax/linen/linear.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=34 end_line=34 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %added = f32[] add(%a, %b)
}

%beside (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %big.inside = f32[999,999]{1,0} broadcast(%p), dimensions={}
  ROOT %gather.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}, metadata={op_name="jit(step)/jvp(Llama)/while/body/q_proj" stack_frame_id=2}
}

%all-reduce-scatter.1 (q: f32[16,8]) -> f32[4,8] {
  %q = f32[16,8]{1,0} parameter(0)
  %reduce.1 = f32[16,8]{1,0} all-reduce(%q), channel_id=8, to_apply=%sum
  ROOT %cut = f32[4,8]{1,0} dynamic-slice(%reduce.1), dynamic_slice_sizes={4,8}
}

%body (arg: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %k = bf16[4,8]{1,0} get-tuple-element(%arg), index=1
  %start = bf16[16,8]{1,0} fusion(%k), kind=kCustom, calls=%beside
  %done = f32[16,8]{1,0} fusion(%k), kind=kCustom, calls=%beside, metadata={op_name="jit(step)/jvp(Llama)/while/body/q_proj" stack_frame_id=2}
  %scattered = f32[4,8]{1,0} fusion(%done), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/transpose(jvp(Llama))/while/body/q_proj" stack_frame_id=2}
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%next, %k)
}

%condition (arg.2: (s32[], bf16[4,8])) -> pred[] {
  %arg.2 = (s32[], bf16[4,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%arg.2), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%j, %five), direction=LT
}

ENTRY %main (state: bf16[4,8]) -> bf16[4,8] {
  %state = bf16[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[4,8]{1,0}) tuple(%zero, %state)
  %loop = (s32[], bf16[4,8]{1,0}) while(%init), condition=%condition, body=%body, metadata={op_name="jit(step)/jvp(Llama)/while" stack_frame_id=1}
  %vmem = f32[64,64]{1,0:T(8,128)S(1)} broadcast(%zero), dimensions={}
  %async = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%state), channel_id=9, dimensions={0}, metadata={op_name="jit(step)/jvp(UNet)/conv_in/conv"}
  %end = bf16[32,8]{1,0} all-gather-done(%async), metadata={op_name="jit(step)/jvp(UNet)/conv_in/conv"}
  ROOT %result = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def program():
  return hlo.Program(TEXT)


def test_collectives_are_counted_where_and_as_often_as_they_run(program):
  assert {tuple(row) for row in usage.traffic(program)} == {
    # 16 x 8 numbers of 2 bytes, once a layer although it is printed twice.
    ("Llama", "each layer", "forward", "all-gather", 5, 1, 256),
    # 16 x 8 numbers of 4 bytes go in.
    ("Llama", "each layer", "backward", "reduce-scatter", 5, 1, 512),
    # Of the pair (operand, result) only the result.
    ("UNet", "once", "forward", "all-gather", 1, 1, 512),
  }


def test_what_sends_most_in_a_step_is_first(program):
  sent = [row.trips * row.nbytes for row in usage.traffic(program)]
  assert sent == [2560, 1280, 512]


def test_buffers_are_those_with_memory_of_their_own(program):
  found = {str(b.array): b for b in usage.largest(program)}
  # Neither what is inside a fusion nor what lies in the chip's own memory.
  assert "f32[999,999]" not in found and "f32[64,64]" not in found
  assert set(list(found)[:2]) == {"f32[16,8]", "bf16[32,8]"}  # 512 bytes each.
  assert found["f32[16,8]"].array.nbytes == 512
  assert found["bf16[32,8]"].count == 1


def test_a_buffer_names_the_line_of_the_package(program):
  found = {str(b.array): b.source for b in usage.largest(program)}
  # Flax's line is inside it.
  assert found["f32[16,8]"] == "photochat_jax/models/llama.py:12"


@pytest.mark.parametrize(
  "loop, place",
  [
    ("", "once"),
    ("jit(step)/jvp(ViT)/while", "each layer"),
    ("jit(step)/transpose(jvp(Llama))/while", "each layer"),
    ("jit(step)/jvp()/while", "each chunk"),
    ("jit(step)/jvp(UNet)/down_blocks_0/attn1/while", "each chunk"),
    ("jit(step)/while", "once"),  # The parts of a batch.
  ],
)
def test_loops_have_names_for_people(loop, place):
  assert usage.place_of(loop) == place


def test_parts_are_modules():
  assert usage.part_of("jit(step)/jvp()/while/Llama.logits/x") == "Llama.logits"
  assert usage.part_of("jit(step)/transpose(jvp(UNet))/mid/add") == "UNet"
  assert usage.part_of("jit(step)/add") == "other"
