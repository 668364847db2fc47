"""The number of CPUs that this process may use."""

import os

__all__ = ["available_cpus"]


def available_cpus() -> int:
    """Returns the number of CPUs for this process; taskset, SLURM or a container may limit it."""
    return len(os.sched_getaffinity(0))
