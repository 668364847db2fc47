"""How many CPUs there are for this process."""

import os

__all__ = ["available_cpus"]


def available_cpus() -> int:
    """CPUs that this process may use, which taskset, SLURM or a container may have made fewer."""
    return len(os.sched_getaffinity(0))
