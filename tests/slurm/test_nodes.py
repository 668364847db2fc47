"""Tests SLURM's resources, and whether its nodes share this machine's folders."""

import os

from submissions import GPU, JOB, LEAF, error_of

from contnet.slurm.nodes import check_request, read_nodes
from contnet.slurm.settings import ClusterSettings
from contnet.slurm.submit import main

pytest_plugins = ["submissions"]


def test_folders_that_nodes_do_not_share(slurm, here, tmp_path, capsys):
    argv = ["--config-file", LEAF, "--timeout-hours", "24", *GPU]
    line = error_of(capsys, *argv, "OUTPUT_DIR", "/dev/shm/out")
    assert "the run folder /dev/shm/out is under /dev/shm" in line
    assert "--assume-shared" in line
    # A cluster that consists of this machine shares everything.
    host = os.uname().nodename
    (slurm.folder / "nodes").write_text(f"one*|up|gpu:2|8|16000|infinite|one|{host}\n")
    assert main([*argv, "OUTPUT_DIR", str(tmp_path / "out")]) == 0


def test_slurm_does_not_answer(slurm, capsys):
    slurm.set("sinfo", 'echo "Unable to contact slurm controller" >&2; exit 1')
    line = error_of(capsys, "--config-file", LEAF, *JOB, *GPU)
    assert "sinfo failed: Unable to contact slurm controller" in line


def test_nodes_are_read(slurm):
    nodes = read_nodes()
    assert [node.gpus for node in nodes] == [{"a100": 8}, {"a100": 8}, {"1080ti": 4}, {}, {"": 8}]
    assert [node.limit_hours for node in nodes] == [48, 48, 12, float("inf"), float("inf")]
    assert [node.default for node in nodes] == [True, True, False, False, False]
    fit = check_request(nodes, ClusterSettings(timeout_hours=1), 2, 8, 8)
    assert {node.name for node in fit} == {"node1", "node2"}
