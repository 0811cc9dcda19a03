"""Starts the very same command on every host of a cluster: TPU VMs, GKE, Slurm."""
