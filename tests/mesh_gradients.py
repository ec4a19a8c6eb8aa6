"""What the joint stage computes on meshes of some of eight devices.

python mesh_gradients.py FOLDER gradients|creation 1x8x1 2x2x2 ...

prints a line of JSON for each mesh: how far its loss and gradients are from
those of one device, or how the state it creates compares with that of one.
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


def make_mesh(name):
  sizes = [int(size) for size in name.split("x")]
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
        return programs[-1](*inputs)

      return call

    stage = self.run.stages[JOINT]
    leg = initial.Leg(JOINT, stage, 0, stage.steps)
    with mock.patch.object(initial.jax, "jit", noted):
      state = initial.init_state(self.run, self.model, mesh, leg, self.llm)
    (program,) = programs
    return state, program


def gradients(joint, names):
  """Prints how far each mesh is from one device."""
  loss, grads = joint.gradients(make_mesh("1x1x1"))
  for name in names:
    its_loss, found = joint.gradients(make_mesh(name))
    row = {"mesh": name, "loss": [its_loss, loss]}
    row["gradients"] = {
      path: [
        float(np.abs(found[path] - gradient).max()),
        float(np.abs(gradient).max()),
      ]
      for path, gradient in grads.items()
    }
    print(json.dumps(row), flush=True)


def creation(joint, names):
  """Prints what each mesh makes for a first state, and how large it is."""
  state, _ = joint.first_state(make_mesh("1x1x1"))
  wanted = partition.flatten(state)
  for name in names:
    state, program = joint.first_state(make_mesh(name))
    found = partition.flatten(state)
    memory = program.memory_analysis()
    row = {
      "mesh": name,
      "unequal": [
        path
        for path, leaf in wanted.items()
        if not np.array_equal(np.asarray(found[path]), np.asarray(leaf))
      ],
      "whole": sum(leaf.nbytes for leaf in wanted.values()),
      "held": [
        sum(
          shard.data.nbytes
          for leaf in found.values()
          for shard in leaf.addressable_shards
          if shard.device == device
        )
        for device in jax.devices()
      ],
      "made": memory.output_size_in_bytes,
      "working": memory.temp_size_in_bytes,
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
  what = {"gradients": gradients, "creation": creation}[sys.argv[2]]
  what(Joint(sys.argv[1]), sys.argv[3:])
