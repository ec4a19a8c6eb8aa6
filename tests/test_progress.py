"""What a run writes, read back."""

import io
import json

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from photochat_jax import progress


class Clock:
  """Seconds that pass when told to."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


def rows(folder):
  text = (folder / "metrics.jsonl").read_text()
  return [json.loads(row) for row in text.splitlines()]


def board(folder):
  """The values of TensorBoard's files, [(step, tag, value or None)]."""
  found = []
  for file in sorted((folder / "tensorboard").iterdir()):
    data = file.read_bytes()
    while data:
      # A record is its length (8 bytes), a checksum (4), itself, and one (4).
      length = int.from_bytes(data[:8], "little")
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      for value in event.summary.value:
        is_image = value.HasField("image")
        found.append(
          (event.step, value.tag, None if is_image else value.simple_value)
        )
  return found


def write(folder, steps, clock=None, stream=None, total=100, start=0):
  clock = clock or Clock()
  stream = stream if stream is not None else io.StringIO()
  with progress.Progress(
    folder, total, start, interval=10.0, stream=stream, clock=clock
  ) as told:
    for step in steps:
      clock.now += 4.0
      told.write(step, {"train/loss": step / 2, "train/rate": 3}, "joint")
  return stream.getvalue()


def test_rows_and_tensorboard_hold_what_was_written(tmp_path):
  write(tmp_path, [1, 2])
  assert rows(tmp_path) == [
    {"step": 1, "stage": "joint", "train/loss": 0.5, "train/rate": 3.0},
    {"step": 2, "stage": "joint", "train/loss": 1.0, "train/rate": 3.0},
  ]
  assert board(tmp_path) == [
    (1, "train/loss", 0.5),
    (1, "train/rate", 3.0),
    (2, "train/loss", 1.0),
    (2, "train/rate", 3.0),
  ]


def test_numbers_that_are_none_stay_json(tmp_path):
  with progress.Progress(tmp_path, 10, stream=io.StringIO()) as told:
    told.write(1, {"loss": np.float32("nan"), "other": np.float64("inf")})
  assert rows(tmp_path) == [{"step": 1, "loss": "nan", "other": "inf"}]


def test_resuming_cuts_the_rows_that_come_again(tmp_path):
  write(tmp_path, [10, 20, 30, 40])
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 45, "tra')  # The process died while writing.
  write(tmp_path, [25, 30], start=20)
  assert [row["step"] for row in rows(tmp_path)] == [10, 20, 25, 30]


def test_a_plain_console_gets_a_line_every_ten_seconds(tmp_path):
  clock = Clock()
  lines = write(tmp_path, [10, 20, 30, 40, 50, 60], clock).splitlines()
  # 4 seconds pass between two writes; the first is told at once.
  assert [line.split()[:3] for line in lines] == [
    ["joint", "step", "10/100"],
    ["joint", "step", "40/100"],
  ]
  # 10 steps in 4 seconds, and 60 steps to go.
  assert lines[1].split("  ")[2:] == ["loss 20", "2.50 steps/s", "24s left"]


def test_the_last_step_is_always_told(tmp_path):
  lines = write(tmp_path, [10, 20], total=20).splitlines()
  assert "step 20/20" in lines[-1] and "0s left" in lines[-1]


def test_a_terminal_line_is_rewritten_and_ended_once(tmp_path):
  text = write(tmp_path, [1, 2, 3], stream=Terminal())
  assert text.count("\r") == 3 and text.count("\n") == 1
  assert text.endswith("\n")


def test_messages_do_not_run_into_the_progress_line(tmp_path):
  stream = Terminal()
  with progress.Progress(tmp_path, 9, stream=stream, clock=Clock()) as told:
    told.write(1, {"loss": 1.0})
    told.message("saved")
  assert stream.getvalue().splitlines()[-1] == "saved"


def test_the_rate_after_a_resume_counts_only_new_steps(tmp_path):
  line = write(tmp_path, [90], start=80)
  assert "2.50 steps/s" in line and "4s left" in line


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(progress.jax, "process_index", lambda: 1)
  stream = io.StringIO()
  with progress.Progress(tmp_path / "run", 9, stream=stream) as told:
    told.write(1, {"loss": 1.0})
    told.photos(1, "photos", np.zeros((1, 2, 2, 3), np.uint8))
    told.message("hello")
  assert stream.getvalue() == "" and not (tmp_path / "run").exists()


def test_photos_go_to_tensorboard_as_one_image(tmp_path):
  with progress.Progress(tmp_path, 9, stream=io.StringIO()) as told:
    told.photos(5, "drawn", np.zeros((3, 4, 4, 3), np.uint8))
  assert board(tmp_path) == [(5, "drawn", None)]


def test_a_sheet_lays_photos_out_row_by_row():
  photos = np.stack(
    [np.full((2, 2, 3), value, np.uint8) for value in (1, 2, 3)]
  )
  got = progress.sheet(photos, columns=2)[..., 0]
  assert got.tolist() == [
    [1, 1, 2, 2],
    [1, 1, 2, 2],
    [3, 3, 0, 0],
    [3, 3, 0, 0],
  ]


@pytest.mark.parametrize(
  "seconds, text",
  [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7625, "2h07m")],
)
def test_durations_as_people_say_them(seconds, text):
  assert progress.duration(seconds) == text
