"""Starts a command on every GPU of a Slurm job: a process for each GPU.

  python -m experiments.launch.slurm "python -m experiments.sft --config=FILE --workdir=/shared/sft"
    --nodes=4 --gpus=8 --hours=24 --dry_run

The code is run where it lies here, so this folder must be shared by the nodes. Two minutes before the time limit Slurm
sends SIGTERM: the run saves at the end of its step. A job that was stopped so (exit code 75), or lost a process (69),
is queued again, and resumes.
"""

from experiments.launch.command import COMMAND, DRY_RUN, ROOT, Step, checked, take
from nemocascade.fields import text, whole
from nemocascade.runtime.launch import launch

SCRIPT = """#!/bin/bash
#SBATCH --job-name=nemocascade
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={hours}:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
{partition}cd {root}
srun --kill-on-bad-exit=0 {command} --connect_s=300 --grace_s=100
code=$?
if [ $code -eq 75 ] || [ $code -eq 69 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def run(command: str, nodes: int, gpus: int, hours: int, partition: str, dry_run: bool) -> None:
  line = f"#SBATCH --partition={partition}\n" if partition else ""
  script = SCRIPT.format(nodes=nodes, gpus=gpus, hours=hours, partition=line, root=ROOT, command=checked(command))
  take([Step("Queues the job.", ["sbatch"], script)], dry_run)


if __name__ == "__main__":
  launch(
    run,
    config=False,
    positional=COMMAND,
    nodes=(whole("Nodes of the job."), 1),
    gpus=(whole("GPUs of a node, each of which gets a process."), 8),
    hours=(whole("Time limit."), 24),
    partition=(text("Slurm's partition; the cluster's own without it."), ""),
    dry_run=DRY_RUN,
  )
