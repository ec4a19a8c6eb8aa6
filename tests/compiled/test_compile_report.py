"""The verdict, and arrays that must never be there."""

import dataclasses
import importlib.util
import io
import json
import pathlib

import pytest
import rich.console

from photochat_jax import config as config_lib
from photochat_jax.compiled import hlo, memory, report, tables, usage

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "photochat.py"


class FakeMesh:
  """A mesh's sizes, for what only looks at them."""

  shape = {"data": 1, "fsdp": 4, "tensor": 1}


@pytest.fixture(scope="module")
def run():
  spec = importlib.util.spec_from_file_location("photochat_config", CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return config_lib.build(module.get_config(""))


def look(run, *arrays, gathered=()):
  """What is found of arrays among the logits of 2 x 128 positions.

  Those `gathered` are the results of fusions with an all-gather inside.
  """
  bodies = "".join(
    f"%body.{number} (p: f32[]) -> {array} {{\n"
    f"  %g.{number} = {array} all-gather(%p), dimensions={{1}}\n"
    f"  ROOT %d.{number} = {array} custom-call(%g.{number})\n}}\n"
    for number, array in enumerate(gathered)
  )
  calls = "".join(
    f"  %c.{number} = {array} fusion(%x), calls=%body.{number}\n"
    for number, array in enumerate(gathered)
  )
  lines = "".join(
    f"  %a.{number} = {array} broadcast(%zero), dimensions={{}}\n"
    for number, array in enumerate(("f32[2,128,32128]", *arrays))
  )
  text = f"{bodies}ENTRY %main (x: f32[]) -> f32[] {{\n{lines}{calls}}}\n"
  stage = dataclasses.replace(run.stages[0], batch_size=8, accumulate=1)
  return report.vocabulary_arrays(hlo.Program(text), run, stage, FakeMesh())


def test_tables_and_chunks_are_allowed(run):
  # Llama's vocabulary is 32,002 with the photo marks, 32,128 padded; its
  # width is 4,096, divided by 4.
  found = look(run, "f32[4096,32128]", "f32[32128,1024]", "f32[9999,9999]")
  assert found["forbidden"] == []
  assert found["largest"] == "f32[2,128,32128]"
  assert found["elements"] == 2 * 128 * 32128
  # 8 rows of 1,024 on 4 ways.
  assert found["batch_length_vocabulary"] == 2 * 1024 * 32002
  assert found["vocabularies"] == 32002 * 49408


def test_a_piece_of_a_table_is_allowed_where_it_is_gathered(run):
  # As many columns as a chip has positions, and half of the table's.
  assert look(run, "bf16[32128,2048]")["forbidden"]
  assert not look(run, gathered=["bf16[32128,2048]"])["forbidden"]
  # Logits would be no piece of the table, were they gathered.
  for logits in ("bf16[2,1024,32128]", "bf16[32128,3072]"):
    assert look(run, gathered=[logits])["forbidden"]


@pytest.mark.parametrize(
  "array",
  [
    "f32[2,1024,32128]",
    "f32[2,1023,32002]",
    "bf16[2048,32128]",
    "bf16[1,32002,2048]",
    "f32[8,1024,32128]",
    "f32[32128,49408]",
    "s8[49408,32002]",
  ],
)
def test_whole_logits_and_a_matrix_of_vocabularies_are_found(run, array):
  (found,) = look(run, array)["forbidden"]
  assert found.startswith(array)


def made(found=None, overflow=None):
  """A report on a chip of 16 GB."""
  return report.Report(
    about={"chips": 4, "peak_tflops": 100.0, "versions": {"jax": "1"}},
    hbm=16e9,
    state={"unet": {"trained": 2_000_000_000, "optimiser": 2_000_000_000}},
    batch=10,
    vocabulary_map=10,
    memory=found,
    overflow=overflow,
    traffic=[usage.Traffic("UNet", "once", "forward", "all-gather", 1, 2, 3)],
    buffers=[
      usage.Buffer(
        usage.Array("bf16", (3, 5)), "copy", "jit(f)", "a.py:1", 1, 4096
      )
    ],
    buffers_at_peak=True,
    vocabulary={
      "forbidden": [],
      "largest": "f32[2]",
      "source": "b.py:2",
      "elements": 2,
      "batch_length_vocabulary": 30,
      "vocabularies": 40,
    },
    flops={"unet": 4e14},
    seconds={"lower": 1.0, "compile": 2.0},
  )


def taking(temporaries):
  return memory.Memory(
    4_100_000_000, 3_900_000_000, 3_900_000_000, temporaries, 100_000_000
  )


@pytest.mark.parametrize(
  "one, fits, line",
  [
    (
      made(taking(8_000_000_000)),
      True,
      "fits: 12.20 of 16 GB per chip (76.2 %)",
    ),
    (
      made(taking(12_000_000_000)),
      False,
      "does not fit: 16.20 of 16 GB per chip (101.2 %)",
    ),
    (
      made(overflow=memory.Overflow(24_000_000_000, 1, ((5, "f32[1]", "x"),))),
      False,
      "does not fit: 24.00 of 16 GB per chip (150.0 %)",
    ),
  ],
)
def test_the_verdict_is_the_last_line(one, fits, line):
  stream = io.StringIO()
  tables.write(one, rich.console.Console(file=stream, width=120))
  assert one.fits is fits
  assert stream.getvalue().splitlines()[-1] == line
  # 4e14 FLOP on 4 chips of 1e14 FLOP/s.
  assert "a step would take 1.000 s" in stream.getvalue()
  assert json.loads(json.dumps(one.as_dict()))["last_line"] == line


def test_the_share_of_the_state_that_is_written_over():
  assert made(taking(1)).aliased_share == pytest.approx(3.9 / 4.0)
