"""Real traces of steps on the CPU, read back."""

import jax
import jax.numpy as jnp
import pytest

from photochat_jax.runtime.profiling import Profiler


@jax.jit
def update(x):
  return x @ x


def make_steps(profiler, count):
  x = jnp.eye(8)
  for number in range(1, count + 1):
    profiler.step(number, x)
    x = update(x)


def traces(workdir):
  return sorted((workdir / "profile").glob("plugins/profile/*/*.xplane.pb"))


def traced_steps(file):
  """The numbers of the steps in a trace."""
  data = jax.profiler.ProfileData.from_file(str(file))
  found = set()
  for plane in data.planes:
    for line in plane.lines:
      for event in line.events:
        numbers = dict(event.stats)
        if event.name == "train" and "step_num" in numbers:
          found.add(int(numbers["step_num"]))
  return sorted(found)


def test_exactly_the_steps_asked_for_are_traced_once(tmp_path):
  said = []
  with Profiler(tmp_path, (3, 5), said.append) as profiler:
    make_steps(profiler, 5)
    assert not traces(tmp_path) and not said
    profiler.step(6)
    (file,) = traces(tmp_path)
    make_steps(profiler, 9)  # The numbers come again; the trace does not.
  assert traces(tmp_path) == [file]
  assert traced_steps(file) == [3, 4, 5]
  (line,) = said
  assert f"xprof --logdir={tmp_path / 'profile'} " in line


def test_a_run_that_ends_inside_keeps_what_there_is(tmp_path):
  with Profiler(tmp_path, (2, 50)) as profiler:
    make_steps(profiler, 3)
  (file,) = traces(tmp_path)
  assert traced_steps(file) == [2, 3]


def test_an_error_ends_the_trace(tmp_path):
  with pytest.raises(KeyError), Profiler(tmp_path, (1, 9)) as profiler:
    make_steps(profiler, 2)
    raise KeyError
  assert len(traces(tmp_path)) == 1
  with Profiler(tmp_path / "next", (1, 1)) as profiler:  # Another can begin.
    make_steps(profiler, 2)
  assert len(traces(tmp_path / "next")) == 1


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path):
  (tmp_path / "profile").write_text("in the way")
  said = []
  with Profiler(tmp_path, (1, 1), said.append) as profiler:
    make_steps(profiler, 3)
  assert len(said) == 1 and "cannot be written" in said[0]


def test_a_run_too_short_says_so(tmp_path):
  said = []
  with Profiler(tmp_path, (10, 15), said.append) as profiler:
    make_steps(profiler, 2)
  assert said == [
    "Nothing was profiled: the run ended before step 10 of this start."
  ]
  assert not (tmp_path / "profile").exists()


def test_nothing_is_traced_unless_asked_for(tmp_path):
  with Profiler(tmp_path, None) as profiler:
    make_steps(profiler, 3)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [(5, 4), (0, 3), (1, 2, 3)])
def test_steps_out_of_order_are_refused(tmp_path, steps):
  with pytest.raises(ValueError, match="The steps to profile"):
    Profiler(tmp_path, steps)
