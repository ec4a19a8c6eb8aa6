"""launch/gke/jobset.py: the manifest, and what is given to kubectl and xpk."""

import re
import sys

import pytest
from stand_ins import LAUNCH, command, expected, shown

yaml = pytest.importorskip("yaml", reason="PyYAML reads the manifest")

SCRIPT = (sys.executable, LAUNCH / "gke" / "jobset.py")
TEMPLATE = LAUNCH / "gke" / "jobset.yaml"
RUN = (
  "--image=r/p/photochat:1",
  "--config=configs/photochat.py:run=gs://B/w",
  "--workdir=gs://B/r",
)
NAMED = ("--name=run1", "--namespace=research")
SLICES = ("--topology=v5p:4x4x4", "--slices=2")
FLAGS = ("--", "--config.stages.joint.steps=300")

DRY_RUNS = {
  "jobset_apply": ("apply", *NAMED, *SLICES, *RUN, "--dry-run", *FLAGS),
  "jobset_delete": ("delete", *NAMED, "--dry-run"),
  "jobset_xpk": ("xpk", *NAMED, *SLICES, *RUN, "--cluster=ours", *FLAGS),
}


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_prints_every_command_and_runs_none(stand_ins, name):
  program = stand_ins.run(*SCRIPT, *DRY_RUNS[name])
  assert shown(program) == expected(name)
  assert stand_ins.calls() == []


def manifest(stand_ins, *arguments):
  program = stand_ins.run(
    *SCRIPT, "apply", "--name=run1", *RUN, "--dry-run", *arguments
  )
  _, *lines, end = shown(program).splitlines()
  assert end == "EOF"
  return yaml.safe_load("\n".join(lines))


def pods(found):
  (job,) = found["spec"]["replicatedJobs"]
  return job, job["template"]["spec"], job["template"]["spec"]["template"]


def test_exit_codes_restart_or_end_the_run(stand_ins):
  found = manifest(stand_ins, "--topology=v6e:4x4", "--max-restarts=7")
  _, job, _ = pods(found)
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule == {
    "action": "FailJob",
    "onExitCodes": {"containerName": "main", "operator": "In", "values": [2]},
  }
  # A pod that ends with any other code fails its job for another reason, and
  # what no rule names restarts the JobSet.
  assert job["backoffLimit"] == 0
  policy = found["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 7
  (rule,) = policy["rules"]
  assert rule["action"] == "FailJobSet"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


@pytest.mark.parametrize(
  "arguments, label, shape, hosts, chips",
  [
    # Chips are the product of the shape, four to a host.
    (["--topology=v4:2x2x4"], "tpu-v4-podslice", "2x2x4", 4, 4),
    (["--topology=v5p:4x4x8"], "tpu-v5p-slice", "4x4x8", 32, 4),
    (["--topology=v5e:16x16"], "tpu-v5-lite-podslice", "16x16", 64, 4),
    (["--topology=v6e:1x1"], "tpu-v6e-slice", "1x1", 1, 1),
    (
      ["--topology=v6e:2x4", "--chips-per-host=8"],
      "tpu-v6e-slice",
      "2x4",
      1,
      8,
    ),
  ],
)
def test_a_slice_is_as_its_node_pool(
  stand_ins, arguments, label, shape, hosts, chips
):
  _, job, template = pods(manifest(stand_ins, *arguments))
  assert job["parallelism"] == job["completions"] == hosts
  assert template["spec"]["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": label,
    "cloud.google.com/gke-tpu-topology": shape,
  }
  (container,) = template["spec"]["containers"]
  assert container["resources"] == {"limits": {"google.com/tpu": chips}}


def test_a_pod_has_time_to_save_and_gets_words_unchanged(stand_ins):
  odd = ["--config.a='x: y'", '--config.b="#"', "--config.c=$HOME"]
  found = manifest(stand_ins, "--topology=v4:2x2x1", "--grace=600", "--", *odd)
  _, _, template = pods(found)
  assert template["spec"]["terminationGracePeriodSeconds"] == 600
  (container,) = template["spec"]["containers"]
  assert container["args"] == [*RUN[1:], *odd]
  # The image's entry point gets SIGTERM: no shell stands before it.
  assert "command" not in container


@pytest.mark.parametrize(
  "topology, kind",
  [
    ("v4:2x2x2", "v4-16"),  # v4 and v5p count two cores to a chip.
    ("v5p:2x2x1", "v5p-8"),
    ("v5e:4x4", "v5litepod-16"),
    ("v6e:4x4", "v6e-16"),
  ],
)
def test_xpk_counts_as_the_tpu_api(stand_ins, topology, kind):
  program = stand_ins.run(
    *SCRIPT, "xpk", "--name=r", *RUN, "--cluster=c", f"--topology={topology}"
  )
  assert f" --tpu-type={kind} " in program.stdout


def test_kubectl_gets_the_manifest(stand_ins, tmp_path):
  (stand_ins.folder / "kubectl").unlink()
  command(
    stand_ins.folder / "kubectl",
    f'printf "%s\\n" "$*" >{tmp_path}/call\ncat >{tmp_path}/input\nexit 3\n',
  )
  program = stand_ins.run(*SCRIPT, "apply", *NAMED, *SLICES, *RUN, *FLAGS)
  assert program.returncode == 3  # kubectl's own.
  assert (tmp_path / "call").read_text() == "apply --filename=-\n"
  text = (tmp_path / "input").read_text()
  assert f"kubectl apply --filename=- <<'EOF'\n{text}EOF\n" == expected(
    "jobset_apply"
  )


def test_every_name_of_the_template_is_explained():
  head, _, body = TEMPLATE.read_text().partition("apiVersion:")
  names = set(re.findall(r"\$([A-Z_]+)", body))
  explained = set(re.findall(r"^#   ((?:[A-Z_]+(?:, )?)+)", head, re.M))
  assert names == {name for row in explained for name in row.split(", ")}


@pytest.mark.parametrize(
  "arguments, sentence",
  [
    ((), "The following arguments are required: action, --name."),
    (("apply", "--name=r"), "Give --topology to apply a run."),
    (
      ("delete", "--name=Run_1"),
      "--name=Run_1 must be up to 40 small letters, digits and hyphens, and "
      "begin with a letter.",
    ),
    (
      ("apply", "--name=r", *RUN, "--topology=v5p:4x4"),
      "--topology=v5p:4x4 is none of v4:AxBxC, v5p:AxBxC, v5e:AxB and v6e:AxB.",
    ),
    (
      ("apply", "--name=r", *RUN, "--topology=v5e-16"),
      "--topology=v5e-16 is none of v4:AxBxC, v5p:AxBxC, v5e:AxB and v6e:AxB.",
    ),
    (
      ("apply", "--name=r", *RUN[:2], "--workdir=/w", "--topology=v6e:4x4"),
      "Give --workdir=gs://BUCKET/RUN; pods share no disk.",
    ),
    (
      ("xpk", "--name=r", *RUN, "--topology=v6e:4x4"),
      "Give --cluster, the one that xpk made.",
    ),
    (
      ("apply", "--name=r", *RUN, "--topology=v6e:3x5"),
      "15 chips cannot be divided by --chips-per-host=4.",
    ),
    (("apply", "--name=r", "--fly"), "Unrecognized arguments: --fly."),
  ],
)
def test_what_is_wrong_is_one_sentence(stand_ins, arguments, sentence):
  program = stand_ins.run(*SCRIPT, *arguments)
  assert (program.returncode, program.stdout) == (2, "")
  assert program.stderr == f"jobset.py: {sentence}\n"
