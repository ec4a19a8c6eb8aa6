"""The optimiser: AdamW over the trainable parameters of one stage.

A frozen parameter is never differentiated: `split` takes it out of the tree,
so that it has neither a gradient nor an optimiser slot, and `merge` puts the
whole back together inside the step.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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


def hold_frozen(
  params: Any, stages: tuple[Any, ...], dtype: jax.typing.DTypeLike
) -> dict:
  """Casts float32 parameters that none of the stages trains.

  The autoencoder keeps its precision: precomputed moments are known by the
  weights that made them.

  Args:
    params: nested dict of parameters.
    stages: `config.StageConfig`s, this one and those to come.
    dtype: of the frozen parameters.
  """
  trained = [
    re.compile(regex)
    for stage in stages
    if stage.steps
    for regex in stage.trainable
  ]

  def hold(path: str, leaf: jax.Array) -> jax.Array:
    moves = any(regex.fullmatch(path) for regex in trained)
    kept = moves or path.startswith("vae/") or leaf.dtype != jnp.float32
    return leaf if kept else leaf.astype(dtype)

  leaves = partition.flatten(params)
  return partition.unflatten({p: hold(p, leaf) for p, leaf in leaves.items()})


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


class Guarded(NamedTuple):
  """The state of `guard`.

  Attributes:
    inner: of the optimiser that it guards.
    usual: float32, running mean of the accepted gradients' norms.
    accepted: int32, updates that were made.
    skipped: int32, updates that were not, in a row up to now; 0 says that the
      last one was made.
  """

  inner: Any
  usual: jax.Array
  accepted: jax.Array
  skipped: jax.Array


def guard(
  inner: optax.GradientTransformation, health: Any
) -> optax.GradientTransformationExtraArgs:
  """Skips an update that would spoil the run, on the device.

  Skipped is what is not finite, in the loss or in the gradient, and a
  gradient whose norm is `spike_factor` times the usual, the running mean of
  the last fifty or so. The inner state stays bit for bit as it was.

  Args:
    inner: the optimiser.
    health: `config.HealthConfig`.

  Returns:
    A transformation whose `update` takes the loss too, as `loss=`.
  """

  def init(params):
    # Arrays of their own: no buffer can be given away twice.
    accepted, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
    return Guarded(inner.init(params), jnp.zeros(()), accepted, skipped)

  def update(grads, state, params=None, *, loss):
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if health.spike_factor:
      early = state.accepted < health.spike_warmup
      good &= early | (norm <= health.spike_factor * state.usual)
    updates, after = inner.update(grads, state.inner, params)
    share = jnp.maximum(1 / (state.accepted + 1), 0.02)
    made = Guarded(
      after,
      state.usual + share * (norm - state.usual),
      state.accepted + 1,
      jnp.zeros_like(state.skipped),
    )
    stays = state._replace(skipped=state.skipped + 1)
    return updates, choose(good, made, stays)

  return optax.GradientTransformationExtraArgs(init, update)


def choose(good: jax.Array, new: Any, old: Any) -> Any:
  """The tree `new` where `good`, bit for bit `old` where not."""
  return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def make_optimizer(
  optim: Any, health: Any, stage: Any, params: Any
) -> optax.GradientTransformationExtraArgs:
  """Makes the optimiser of one stage, which skips bad updates.

  AdamW (Loshchilov and Hutter 2019), gradients clipped to a global norm. The
  update of a parameter is its learning rate (schedule times multiplier) times
  (Adam's direction + weight decay times the parameter).

  Args:
    optim: `config.OptimConfig`.
    health: `config.HealthConfig`.
    stage: `config.StageConfig`.
    params: the TRAINABLE parameters (arrays or their shapes), as given by
      `split`; every path must be matched by the tables `lr_multipliers` and
      `decay`.

  Returns:
    A transformation over trees like `params`, see `guard`.
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
  return guard(optax.chain(*steps), health)
