"""Tests how a process reads the launcher's environment variables."""

from dataclasses import replace

import pytest
from launchers import LOCAL, STEP, TORCHRUN

from contnet.launch.environment import DistributedEnvironment, find_environment, first_host
from contnet.utils.errors import UserError

ALONE = DistributedEnvironment()
IN_JOB = DistributedEnvironment(cluster="slurm", job_id="77")
IN_STEP = DistributedEnvironment(
    "slurm", 3, 4, 1, 2, "gpu07", "77.0.0", cluster="slurm", job_id="77", num_nodes=2
)
IN_LOCAL = DistributedEnvironment(
    "local", 1, 2, 1, 2, "127.0.0.1", "99.0.0", cluster="local", job_id="99"
)
BY_TORCHRUN = DistributedEnvironment("torchrun", 1, 2, 0, 1)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a,b", "a"),
        ("rack[2,4]node[1-3]x,b[1-2]", "rack2node1x"),
        ("127.0.0.[1-2]", "127.0.0.1"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("variables", "environment"),
    [
        ({}, ALONE),
        (STEP, IN_STEP),
        (
            {**STEP, "SLURM_RESTART_COUNT": "2"},
            replace(IN_STEP, attempt="77.0.2", restart=2),
        ),
        (
            {**STEP, "SLURM_STEP_LAUNCHER_PORT": "4000"},
            replace(IN_STEP, attempt="77.0.0.4000"),
        ),
        (
            {**STEP, "SLURM_ARRAY_JOB_ID": "75", "SLURM_ARRAY_TASK_ID": "2"},
            replace(IN_STEP, job_id="75_2"),
        ),
        # Interactive shells of salloc and srun --pty, and a batch script.
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"}, IN_JOB),
        (
            {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
            replace(IN_JOB, num_nodes=2),
        ),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, IN_JOB),
        (LOCAL, IN_LOCAL),
        ({**STEP, **LOCAL}, IN_LOCAL),
        ({**LOCAL, "SUBMITIT_LOCAL_NTASKS": "1"}, replace(ALONE, cluster="local", job_id="99")),
        (TORCHRUN, BY_TORCHRUN),
        (
            {**STEP, **TORCHRUN},
            replace(BY_TORCHRUN, cluster="slurm", job_id="77", num_nodes=2),
        ),
    ],
)
def test_environment(variables, environment):
    assert find_environment(variables) == environment


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({k: v for k, v in STEP.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID is not"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "MASTER_PORT is not"),
        ({k: v for k, v in LOCAL.items() if "GLOBAL" not in k}, "SUBMITIT_LOCAL_GLOBALID is not"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, "--ntasks-per-node"),
        ({**STEP, "SLURM_PROCID": "2"}, "--distribution=block"),
    ],
)
def test_partial_settings(variables, message):
    with pytest.raises(UserError, match=message) as error:
        find_environment(variables)
    assert "\n" not in str(error.value)
