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


def rows(folder, name="metrics.jsonl"):
  text = (folder / name).read_text()
  return [json.loads(row) for row in text.splitlines()]


def events(folder):
  """What TensorBoard's files hold."""
  for file in sorted((folder / "tensorboard").iterdir()):
    data = file.read_bytes()
    while data:
      # A record is its length (8 bytes), a checksum (4), itself, and one (4).
      length = int.from_bytes(data[:8], "little")
      yield event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]


def board(folder):
  """The values of TensorBoard's files, [(step, tag, value or None)]."""
  found = []
  for event in events(folder):
    for value in event.summary.value:
      is_image = value.HasField("image")
      found.append(
        (event.step, value.tag, None if is_image else value.simple_value)
      )
  return found


def starts(folder):
  """The steps from which TensorBoard drops the points of earlier files."""
  start = event_pb2.SessionLog.START
  return [e.step for e in events(folder) if e.session_log.status == start]


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


PERF = {
  "perf/steps_per_second": 0.5,
  "perf/tokens_per_second_per_chip": 12345.6,
  "perf/photos_per_second_per_chip": 2.25,
  "perf/mfu": 0.4567,
  "perf/hbm_peak_gb": 71.24,
  "perf/data_wait": 0.002,
  "perf/goodput": 0.93,
}


def write_perf(folder, perf, stream):
  with progress.Progress(folder, 100, stream=stream, clock=Clock()) as told:
    told.perf(10, perf)
    told.write(10, {"train/loss": 2.0})


def test_speed_is_kept_apart_from_what_was_learnt(tmp_path):
  write_perf(tmp_path, PERF, io.StringIO())
  assert rows(tmp_path) == [{"step": 10, "train/loss": 2.0}]
  assert rows(tmp_path, "perf.jsonl") == [{"step": 10, **PERF}]
  assert {tag for _, tag, _ in board(tmp_path)} == {*PERF, "train/loss"}


def test_a_log_line_has_every_meter(tmp_path):
  stream = io.StringIO()
  write_perf(tmp_path, PERF, stream)
  assert stream.getvalue().rstrip().split("  ") == [
    "step 10/100", "loss 2", "0.50 steps/s", "12,346 tokens/s/chip",
    "2.25 photos/s/chip", "MFU 45.7%", "HBM 71.2 GB", "data wait 0.2%",
    "goodput 93.0%", "3m00s left",
  ]  # fmt: skip


@pytest.mark.parametrize("wait, told", [(0.01, False), (0.02, True)])
def test_a_terminal_is_told_of_waiting_where_it_matters(
  tmp_path, monkeypatch, wait, told
):
  monkeypatch.setenv("COLUMNS", "200")
  stream = Terminal()
  write_perf(tmp_path, PERF | {"perf/data_wait": wait}, stream)
  text = stream.getvalue()
  assert ("data wait 2.0%" in text) == told
  assert "MFU 45.7%" in text and "3m00s left" in text
  assert "goodput" not in text and "HBM" not in text


def test_a_terminal_line_is_never_wrapped(tmp_path, monkeypatch):
  monkeypatch.setenv("COLUMNS", "40")
  stream = Terminal()
  write_perf(tmp_path, PERF, stream)
  (line,) = stream.getvalue().replace("\r\x1b[K", "").splitlines()
  assert len(line) == 39 and line.startswith("step 10/100  loss 2")


def test_meters_that_are_not_known_are_not_told(tmp_path):
  stream = io.StringIO()
  write_perf(tmp_path, {"perf/goodput": 0.5}, stream)
  assert stream.getvalue() == "step 10/100  loss 2\n"


def test_going_back_takes_back_what_came_after(tmp_path):
  clock = Clock()
  stream = io.StringIO()
  with progress.Progress(tmp_path, 100, stream=stream, clock=clock) as told:
    for step in (10, 20, 30):
      told.write(step, {"train/loss": step})
      told.perf(step, {"perf/steps_per_second": 9.0})
    told.rewind(10)
    clock.now += 50.0
    told.write(20, {"train/loss": -1.0})
  assert rows(tmp_path) == [
    {"step": 10, "train/loss": 10.0},
    {"step": 20, "train/loss": -1.0},
  ]
  assert [row["step"] for row in rows(tmp_path, "perf.jsonl")] == [10]
  # The old points stay in their file, and the new one's start purges them.
  assert (30, "train/loss", 30.0) in board(tmp_path)
  assert (20, "train/loss", -1.0) in board(tmp_path)
  assert starts(tmp_path) == [1, 11]
  # 10 steps in 50 seconds, not 9 steps a second.
  assert stream.getvalue().splitlines()[-1].endswith("0.20 steps/s  6m40s left")


def test_the_files_are_cut_at_one_stroke(tmp_path, monkeypatch):
  write(tmp_path, [10, 20, 30])
  before = rows(tmp_path)

  def killed(self, target):
    raise KeyboardInterrupt

  monkeypatch.setattr(type(progress.epath.Path(tmp_path)), "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path, [], start=20)
  assert rows(tmp_path) == before


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
