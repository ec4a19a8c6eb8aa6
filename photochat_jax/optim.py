"""The optimiser: AdamW over the trainable parameters of one stage.

A frozen parameter is never differentiated: `split` takes it out of the tree,
so that it has neither a gradient nor an optimiser slot, and `merge` puts the
whole back together inside the step.
"""

from typing import Any

import jax
import optax

from photochat_jax.ops import partition


def split(params: Any, regexes: tuple[str, ...]) -> tuple[dict, dict]:
  """Divides parameters into the trainable and the frozen.

  Args:
    params: nested dict of parameters.
    regexes: whole paths of the trainable parameters; each must match one.

  Returns:
    (trainable, frozen), nested dicts which share no parameter.
  """
  leaves = partition.flatten(params)
  chosen, others = partition.select(regexes, leaves)
  return (
    partition.unflatten({path: leaves[path] for path in chosen}),
    partition.unflatten({path: leaves[path] for path in others}),
  )


def merge(trainable: dict, frozen: dict) -> dict:
  """Returns the one nested dict which `split` divided."""
  return partition.unflatten(
    {**partition.flatten(frozen), **partition.flatten(trainable)}
  )


def learning_rate(optim: Any, stage: Any) -> optax.Schedule:
  """Returns the learning rate as a function of the stage's own step.

  Linear warm-up from 0 to the peak over `optim.warmup_steps` updates, then
  `optim.schedule` down to `optim.final_scale` times the peak at the stage's
  end.

  Args:
    optim: `config.OptimConfig`.
    stage: `config.StageConfig`; its `learning_rate` is the peak where it is
      not 0, and its `steps` is the schedule's length.
  """
  peak = stage.learning_rate or optim.learning_rate
  warmup = min(optim.warmup_steps, stage.steps)
  length = max(stage.steps - warmup, 1)
  end = peak * optim.final_scale
  if optim.schedule == "constant":
    decay = optax.constant_schedule(peak)
  elif optim.schedule == "linear":
    decay = optax.linear_schedule(peak, end, length)
  else:
    decay = optax.cosine_decay_schedule(peak, length, optim.final_scale)
  if not warmup:
    return decay
  # The first update is made with peak / warmup, not with 0.
  rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(
  optim: Any, stage: Any, params: Any
) -> optax.GradientTransformation:
  """Makes the optimiser of one stage.

  AdamW (Loshchilov and Hutter 2019), gradients clipped to a global norm. The
  update of a parameter is its learning rate (schedule times multiplier) times
  (Adam's direction + weight decay times the parameter).

  Args:
    optim: `config.OptimConfig`.
    stage: `config.StageConfig`.
    params: the TRAINABLE parameters (arrays or their shapes), as given by
      `split`; every path must be matched by the tables `lr_multipliers` and
      `decay`.

  Returns:
    A transformation over trees like `params`.
  """
  multipliers = partition.match(optim.lr_multipliers, params)
  decayed = partition.match(optim.decay, params)
  steps = []
  if optim.grad_clip:
    steps.append(optax.clip_by_global_norm(optim.grad_clip))
  steps.append(optax.scale_by_adam(optim.b1, optim.b2, optim.eps))
  if optim.weight_decay:
    steps.append(optax.add_decayed_weights(optim.weight_decay, decayed))
  steps.append(
    optax.stateless(
      lambda updates, _: jax.tree.map(
        lambda update, x: update * x, updates, multipliers
      )
    )
  )
  steps.append(optax.scale_by_learning_rate(learning_rate(optim, stage)))
  return optax.chain(*steps)
