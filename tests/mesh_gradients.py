"""Run with eight devices: the joint stage's gradients on meshes of some of them.

python mesh_gradients.py FOLDER 1x8x1 2x2x2 ...  prints a line of JSON for each
mesh: how far its loss and gradients are from those of one device, and how the
parameters it creates compare with those that one device creates.
"""

import json
import math
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import small_run
import toy_agent

from photochat_jax import captions, initial, inputs, objective, sharding
from photochat_jax.data import pipeline, vocabulary
from photochat_jax.models.photochat import PhotoChat
from photochat_jax.ops import partition

JOINT, ROWS = 2, 8


def make_mesh(sizes):
  return sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


class Joint:
  """The joint stage of the smallest run, everything in it trainable."""

  def __init__(self, folder):
    self.run = small_run.run_config()
    self.model = PhotoChat(self.run.model)
    self.llm, self.clip = inputs.load_tokenizers(self.run)
    spec = inputs.data_spec(self.run, ROWS)
    data = pipeline.Pipeline(
      small_run.train_dialogues(folder, 24),
      "dialogues", spec, self.llm, self.clip,
    )  # fmt: skip
    self.batch = data.batch(0)
    assert self.batch["photos_out_mask"].any()
    assert self.batch["photos_in_mask"].any()
    self.table, _ = vocabulary.build_vocabulary_map(self.llm, self.clip)
    self.params = toy_agent.random_params(self.model)

  def loss(self, params, batch):
    ids = batch["example_id"].reshape(-1)
    return objective.loss_terms(
      self.model, self.run, self.run.stages[JOINT], params, jnp.float32(1),
      batch, captions.photo_keys(self.run, JOINT, 0, ids), jnp.int32(0),
      self.clip.encode_padded(""), self.table,
    )[0]  # fmt: skip

  def gradients(self, mesh):
    """The loss, and `{path: gradient}`, as the trainer places things."""
    places = sharding.shardings(self.params, mesh)
    with jax.set_mesh(mesh):
      loss, grads = jax.jit(
        jax.value_and_grad(self.loss), out_shardings=(None, places)
      )(
        jax.device_put(self.params, places),
        sharding.shard_batch(self.batch, mesh),
      )
    grads = partition.flatten(grads)
    return float(loss), {path: np.asarray(g) for path, g in grads.items()}

  def first_state(self, mesh):
    """The run's first state, and the program that made it."""
    programs, real = [], jax.jit

    def noted(*args, **options):
      function = real(*args, **options)

      def call(*inputs):
        programs.append(function.lower(*inputs).compile())
        return function(*inputs)

      return call

    stage = self.run.stages[JOINT]
    leg = initial.Leg(JOINT, stage, 0, stage.steps)
    with mock.patch.object(initial.jax, "jit", noted):
      state = initial.init_state(self.run, self.model, mesh, leg, self.llm)
    (program,) = programs
    return state, program


def compare(wanted, found):
  """The worst leaf: (difference, largest value, path), by their quotient."""
  floor = 1e-3  # Keys' biases have gradients that are nothing but rounding.
  return max(
    (
      float(np.abs(found[path] - leaf).max()),
      float(max(np.abs(leaf).max(), floor)),
      path,
    )
    for path, leaf in wanted.items()
  )


def main(folder, *meshes):
  joint = Joint(folder)
  one = make_mesh((1, 1, 1))
  loss, grads = joint.gradients(one)
  state, program = joint.first_state(one)
  leaves = partition.flatten(state)
  whole = sum(leaf.nbytes for leaf in leaves.values())
  for name in meshes:
    mesh = make_mesh([int(size) for size in name.split("x")])
    its_loss, its_grads = joint.gradients(mesh)
    quotients = {
      path: float(np.abs(its_grads[path] - leaf).max())
      / max(float(np.abs(leaf).max()), FLOOR)
      for path, leaf in grads.items()
    }
    worst = max(quotients, key=quotients.get)
    row = {
      "mesh": name,
      "loss": loss,
      "difference": abs(its_loss - loss),
      "worst": [worst, quotients[worst]],
      "absolute": max(
        float(np.abs(its_grads[p] - leaf).max()) for p, leaf in grads.items()
      ),
    }
    print(json.dumps(row), flush=True)


FLOOR = 1e-3

if __name__ == "__main__":
  main(*sys.argv[1:])
