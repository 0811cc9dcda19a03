"""Starts a command on every host of a Cloud TPU slice, by gcloud.

  python -m experiments.launch.tpu_vm "python -m experiments.sft --config=configs/nano_30b/sft.py --workdir=gs://B/sft"
    --tpu=NAME --zone=ZONE --dry_run
  python -m experiments.launch.tpu_vm --do=log --tpu=NAME --zone=ZONE
  python -m experiments.launch.tpu_vm --do=stop --tpu=NAME --zone=ZONE

Copies the commit that is checked out here to all hosts, installs it (with the extra `gcs` where the command names a
bucket), and starts the command there, detached. The same line resumes the run. `stop` sends SIGTERM: the run saves at
the end of its step.
"""

from experiments.launch.command import COMMAND, DRY_RUN, FOLDER, Step, checked, name_of, named, take
from nemocascade.fields import word
from nemocascade.runtime.launch import launch
from nemocascade.state_files import BUCKET

ARCHIVE = f"{FOLDER}.tar.gz"
# The process's own number is kept: `exec` makes the command the process of that number.
START = (
  "cd {folder} && nohup setsid sh -c 'echo $$ > run.pid; exec {command}' > run.log 2>&1 < /dev/null & sleep 1;"
  " echo started"
)


def run(command: str, do: str, tpu: str, zone: str, dry_run: bool) -> None:
  at = [named("tpu", tpu), f"--zone={named('zone', zone)}", "--worker=all"]

  def ssh(what: str, line: str) -> Step:
    return Step(what, ["gcloud", "compute", "tpus", "tpu-vm", "ssh", *at, f"--command={line}"])

  if do == "log":
    take([ssh("The last lines of every host.", f"tail -n 20 {FOLDER}/run.log")], dry_run)
  elif do == "stop":
    take([ssh("SIGTERM to the process of every host.", f"kill -TERM $(cat {FOLDER}/run.pid)")], dry_run)
  else:
    # In double quotes on the host, since START is in single quotes: shlex writes single ones.
    line = START.format(folder=FOLDER, command=checked(command).replace("'", "'\\''"))
    extras = "tpu,gcs" if BUCKET in command else "tpu"
    unpack = f"mkdir -p {FOLDER} && tar -xzf {ARCHIVE} -C {FOLDER} && cd {FOLDER} && pip install -q -e '.[{extras}]'"
    take(
      [
        Step("The commit that is checked out.", ["git", "archive", "--format=tar.gz", f"--output={ARCHIVE}", "HEAD"]),
        Step("To every host.", ["gcloud", "compute", "tpus", "tpu-vm", "scp", ARCHIVE, f"{at[0]}:", *at[1:]]),
        ssh("Unpacked and installed.", unpack),
        ssh("The same command on every host.", line),
      ],
      dry_run,
    )


if __name__ == "__main__":
  launch(
    run,
    config=False,
    positional=COMMAND,
    do=(word("What to do.", ("start", "log", "stop")), "start"),
    tpu=name_of("Name of the TPU."),
    zone=name_of("Its zone."),
    dry_run=DRY_RUN,
  )
