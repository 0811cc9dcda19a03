"""Tests of the scripts that start a command on every host: what they print and run, and what they refuse."""

import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.launch import command
from nemocascade import host_memory
from nemocascade.errors import UserError

SFT = "python -m experiments.sft --config=configs/nano_30b/sft.py --workdir=gs://bucket/sft"
ODD = SFT + """ --config.sources="{'mine': {'path': 'chats/*.jsonl'}}" """
TPU = ["--tpu=pod", "--zone=us-east5-a"]
GKE = ["--cluster=c", "--workload=w", "--tpu_type=v5p-128", "--image=gcr.io/p/i:1"]


def printed(monkeypatch, capsys, name: str, *words: str) -> str:
  """What the launcher prints when it must not run anything."""
  monkeypatch.setattr(host_memory, "keep", lambda: None)
  monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a dry run ran something"))
  monkeypatch.setattr(sys, "argv", [name, *words, "--dry_run"])
  with pytest.raises(SystemExit) as ended:
    runpy.run_module(f"experiments.launch.{name}", run_name="__main__")
  out, err = capsys.readouterr()
  assert ended.value.code == 0, err
  return out


def lines(out: str) -> list[list[str]]:
  """The words of the commands, without the remarks."""
  return [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]


def test_tpu_vms_get_this_commit_and_the_same_command(monkeypatch, capsys):
  archive, copy, unpack, start = lines(printed(monkeypatch, capsys, "tpu_vm", SFT, *TPU))
  assert archive == ["git", "archive", "--format=tar.gz", "--output=nemocascade.tar.gz", "HEAD"]
  assert copy == shlex.split("gcloud compute tpus tpu-vm scp nemocascade.tar.gz pod: --zone=us-east5-a --worker=all")
  ssh = "gcloud compute tpus tpu-vm ssh pod --zone=us-east5-a --worker=all".split()
  assert unpack[:-1] == ssh and unpack[-1].endswith("cd nemocascade && pip install -q -e '.[tpu,gcs]'")
  assert start[:-1] == ssh
  assert start[-1] == (
    f"--command=cd nemocascade && nohup setsid sh -c 'echo $$ > run.pid; exec {SFT} --distributed=auto'"
    " > run.log 2>&1 < /dev/null & sleep 1; echo started"
  )


def test_tpu_vms_without_a_bucket_need_no_library_for_buckets(monkeypatch, capsys):
  here = SFT.replace("gs://bucket", "/shared")
  assert lines(printed(monkeypatch, capsys, "tpu_vm", here, *TPU))[2][-1].endswith("pip install -q -e '.[tpu]'")


def test_the_lines_of_the_page_can_be_copied(monkeypatch, capsys):
  page = (Path(__file__).parent.parent / "docs" / "pod.md").read_text()
  shown = [shlex.split(line)[2:] for line in page.splitlines() if line.startswith("    python -m experiments.launch.")]
  assert [module.rpartition(".")[2] for module, *_ in shown] == ["tpu_vm", "gke", "slurm"]
  for module, *words in shown:
    assert "--distributed=auto" in printed(monkeypatch, capsys, module.rpartition(".")[2], *words)


def test_quotes_in_the_command_reach_the_hosts(monkeypatch, capsys, tmp_path):
  """The line is run by a shell here, with a program in the place of Python that writes its arguments."""
  start = lines(printed(monkeypatch, capsys, "tpu_vm", ODD, *TPU))[-1][-1].removeprefix("--command=")
  monkeypatch.undo()
  (tmp_path / "nemocascade").mkdir()
  (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > arguments\n')
  (tmp_path / "python").chmod(0o755)
  environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
  subprocess.run(["bash", "-c", start], cwd=tmp_path, env=environment, check=True, capture_output=True)
  arguments = (tmp_path / "nemocascade" / "arguments").read_text().splitlines()
  assert arguments == [*shlex.split(ODD)[1:], "--distributed=auto"]
  assert (tmp_path / "nemocascade" / "run.pid").read_text().strip().isdecimal()


def test_tpu_vms_are_stopped_by_sigterm(monkeypatch, capsys):
  (stop,) = lines(printed(monkeypatch, capsys, "tpu_vm", "", "--do=stop", *TPU))
  assert stop[-2:] == ["--worker=all", "--command=kill -TERM $(cat nemocascade/run.pid)"]
  (log,) = lines(printed(monkeypatch, capsys, "tpu_vm", "", "--do=log", *TPU))
  assert log[-1] == "--command=tail -n 20 nemocascade/run.log"


def test_gke_gets_one_workload_that_resumes(monkeypatch, capsys):
  (create,) = lines(printed(monkeypatch, capsys, "gke", SFT, *GKE, "--restarts=3"))
  assert create == [
    "xpk", "workload", "create", "--cluster=c", "--workload=w", "--tpu-type=v5p-128", "--num-slices=1",
    "--docker-image=gcr.io/p/i:1", "--max-restarts=3", "--termination-grace-period-seconds=120",
    f"--command={SFT} --distributed=auto --connect_s=900 --grace_s=100",
  ]  # fmt: skip


def test_slurm_gets_a_process_for_each_gpu(monkeypatch, capsys):
  flags = ["--nodes=4", "--gpus=8", "--hours=12", "--partition=big"]
  out = printed(monkeypatch, capsys, "slurm", SFT, *flags)
  assert out.startswith("# Queues the job.\nsbatch\n# with the input:\n#!/bin/bash\n")
  for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=12:00:00", "--partition=big"):
    assert f"\n#SBATCH {line}\n" in out
  assert f"\nsrun --kill-on-bad-exit=0 {SFT} --distributed=auto --connect_s=300 --grace_s=100\n" in out


@pytest.mark.parametrize(
  "words, said",
  [
    ("", "must be 'python -m experiments.NAME ...'"),
    ("python train.py", "must be 'python -m experiments.NAME ...'"),
    ("python -m experiments.sfd --workdir=/w", "there is no experiments.sfd"),
    ("python -m experiments.chat --workdir=/w", "experiments.chat runs in one process"),
    (SFT + " --distributed=auto", "leave it out of the command"),
    ("python -m experiments.sft --config=c.py", "--workdir='': must be an absolute path"),
    ("python -m experiments.sft --config=c.py --workdir=runs/a", "--workdir=runs/a: must be an absolute path"),
  ],
)
def test_what_cannot_run_on_several_hosts_is_refused(words, said):
  with pytest.raises(UserError) as error:
    command.checked(words)
  assert said.replace("''", "") in str(error.value).replace("''", "")


def test_a_cluster_without_a_name_is_refused():
  with pytest.raises(UserError, match="--tpu='': must be a name"):
    command.named("tpu", "")
