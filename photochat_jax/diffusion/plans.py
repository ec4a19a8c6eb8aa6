"""A sampler as a table of numbers made on the host.

Every sampler goes from x_t a little way towards x_0 by adding up, with weights
known beforehand, the latents, what the denoiser said now and earlier, and
fresh noise. So a sampler is the weights, a row for each call of the denoiser:
`solvers` works them out, in float64, and `samplers.sample` is the one loop
that follows them.

Letters: N calls of the denoiser. Arrays have a row for each call.
"""

from typing import Any, NamedTuple

import numpy as np

from photochat_jax.diffusion.schedule import ScheduleConfig


class Rows(NamedTuple):
  """What happens at each of N calls.

  The denoiser is asked at the latents x. Its last outputs, weighed by
  `outputs`, are read as (x_0, eps) at `signal` and `sigma` and at the anchor
  a, which is x or, where not `anchors`, the x of an earlier row. Then

      x <- latents * a + sum_k x0[k] * (x_0 of k calls ago) + eps * eps
           + fresh * (standard normal noise)

  Attributes:
    times: int32 or float32[N], the step the denoiser is told.
    signal: [N], a = signal x_0 + sigma eps.
    sigma: [N].
    outputs: [N, H], newest first.
    anchors: bool[N].
    latents: [N].
    x0: [N, K], newest first.
    eps: [N].
    fresh: [N].
  """

  times: np.ndarray
  signal: np.ndarray
  sigma: np.ndarray
  outputs: np.ndarray
  anchors: np.ndarray
  latents: np.ndarray
  x0: np.ndarray
  eps: np.ndarray
  fresh: np.ndarray


class Plan(NamedTuple):
  """A sampler with its number of steps.

  Attributes:
    rows: a row for each call.
    initial: standard deviation of the latents that it starts from.
    clip: the predicted x_0 is kept within plus and minus this; None if not.
  """

  rows: Rows
  initial: float = 1.0
  clip: float | None = None


def timesteps(config: ScheduleConfig, num_steps: int) -> np.ndarray:
  """Training steps that most samplers of `num_steps` visit, falling.

  The three spacings are diffusers' (table 2 of arXiv:2305.08891).

  Args:
    config: the schedule.
    num_steps: how many to visit.

  Returns:
    int32[num_steps].

  Raises:
    ValueError: there are not that many training steps.
  """
  return np.round(spread(config, num_steps)).astype(np.int32)


def make(
  times: np.ndarray,
  ac: np.ndarray,
  *,
  outputs: Any = 1.0,
  anchors: Any = True,
  latents: Any = 0.0,
  x0: Any = 0.0,
  eps: Any = 0.0,
  fresh: Any = 0.0,
  initial: float = 1.0,
  clip: float | None = None,
) -> Plan:
  """A plan of rows read at abar `ac`; see `Rows` and `Plan`.

  A scalar is the same in all rows; `outputs` and `x0` without a second axis
  weigh the newest alone.
  """
  count = len(times)

  def column(values):
    return np.broadcast_to(values, count)

  def table(values):
    return values if np.ndim(values) == 2 else column(values)[:, None]

  rows = Rows(
    times=times,
    signal=np.sqrt(ac),
    sigma=np.sqrt(1 - ac),
    outputs=table(outputs),
    anchors=column(anchors),
    latents=column(latents),
    x0=table(x0),
    eps=column(eps),
    fresh=column(fresh),
  )
  return Plan(rows, initial, clip)


def spread(
  config: ScheduleConfig, count: int, last: int | None = None
) -> np.ndarray:
  """float64[count] falling steps, those of linspace not rounded.

  Only the first `last` training steps are used, where it is given.
  """
  total = config.num_train_timesteps
  last = total if last is None else last
  check(count, last, "training steps")
  if config.timestep_spacing == "linspace":
    return np.linspace(0, last - 1, count)[::-1]
  if config.timestep_spacing == "trailing":
    # An index, not a running sum: rounding must not add or lose a step.
    return np.round(last - np.arange(count) * (total / count)) - 1
  steps = np.arange(count)[::-1] * (last // count) + config.steps_offset
  if steps[0] >= total:
    raise ValueError(
      f"{count} leading steps with steps_offset {config.steps_offset} "
      f"pass the last of {total}; choose fewer steps or spacing trailing."
    )
  return steps.astype(np.float64)


def check(num_steps: int, limit: int, what: str) -> None:
  """Raises a ValueError if there are not that many steps."""
  if not 1 <= num_steps <= limit:
    raise ValueError(
      f"num_steps is {num_steps}; choose between 1 and the {limit} {what}."
    )
