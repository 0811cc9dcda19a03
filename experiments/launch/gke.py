"""Starts a command on every host of a TPU slice in a GKE cluster, by xpk.

  python -m experiments.launch.gke "python -m experiments.sft --config=configs/nano_30b/sft.py --workdir=gs://B/sft"
    --cluster=NAME --workload=NAME --tpu_type=v5p-128 --image=IMAGE --dry_run

The image has the code in its working directory, with Python and `pip install -e '.[tpu,gcs]'` (`gcs` is for work
directories in a bucket). A workload that fails is restarted `restarts` times, and resumes: also after a host was lost
(exit code 69) or preempted (75).
"""

from experiments.launch.command import COMMAND, DRY_RUN, Step, checked, name_of, named, take
from nemocascade.errors import UserError
from nemocascade.fields import whole
from nemocascade.runtime.launch import launch


def run(command: str, cluster: str, workload: str, tpu_type: str, image: str, restarts: int, dry_run: bool) -> None:
  if not image:
    raise UserError("--image='': must be the name of an image that the cluster can load")
  take(
    [
      Step(
        "A pod for every host of the slice, each with the same command.",
        [
          "xpk", "workload", "create", f"--cluster={named('cluster', cluster)}",
          f"--workload={named('workload', workload)}", f"--tpu-type={named('tpu_type', tpu_type)}", "--num-slices=1",
          f"--docker-image={image}", f"--max-restarts={restarts}", "--termination-grace-period-seconds=120",
          # Hosts get their pods at different times.
          f"--command={checked(command)} --connect_s=900 --grace_s=100",
        ],
      )
    ],
    dry_run,
  )  # fmt: skip


if __name__ == "__main__":
  launch(
    run,
    config=False,
    positional=COMMAND,
    cluster=name_of("Name of the cluster."),
    workload=name_of("Name of the workload."),
    tpu_type=name_of("Type and cores of the slice, such as v5p-128."),
    image=name_of("The image of the pods."),
    restarts=(whole("How often a failed workload is restarted.", low=0), 10),
    dry_run=DRY_RUN,
  )
