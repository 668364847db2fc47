"""The facts of a cluster: its file, and options over it."""

import shutil

import pytest
import yaml
from conftest import REPOSITORY
from submissions import GPU, JOB, LEAF, error_of

from contnet.slurm.settings import ClusterSettings
from contnet.slurm.submit import main, parse_submission

pytest_plugins = ["submissions"]


def test_cluster_file_is_found_by_name(slurm, here, monkeypatch, tmp_path):
    (here / "clusters").mkdir()
    content = {
        "partition": "gpu",
        "cpus_per_gpu": 4,
        "timeout_hours": 12,
        "setup": ["first"],
        "sbatch": {"mail_type": "END", "comment": "from the file"},
    }
    (here / "clusters" / "ours.yaml").write_text(yaml.safe_dump(content))
    options = ["--cluster-file", "ours", "--setup", "second", "--sbatch", "comment=from here"]
    argv = ["--config-file", LEAF, "--assume-shared", *options, *GPU]
    assert main([*argv, "--timeout-hours", "0.5", "OUTPUT_DIR", "a"]) == 0
    assert {"#SBATCH --time=30", "#SBATCH --cpus-per-task=4"} <= set(slurm.sent)
    assert {"#SBATCH --mail-type=END", "#SBATCH --comment='from here'"} <= set(slurm.sent)
    assert slurm.sent.index("first") < slurm.sent.index("second")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    shutil.move(here / "clusters", tmp_path / "contnet")
    assert main([*argv, "OUTPUT_DIR", "b"]) == 0
    assert "#SBATCH --time=720" in slurm.sent


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("partitoin: gpu", "no key partitoin, the nearest is partition"),
        ("mem_gb: lots", "mem_gb is 'lots', it must be a number"),
        ("setup: {a: b}", "setup is {'a': 'b'}, it must be a list of texts"),
        ("sbatch: {nodes: 3}", "--num-nodes"),
        ("partition: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("- partition", "KEY: value"),
    ],
)
def test_wrong_cluster_files(slurm, here, capsys, content, said):
    (here / "bad.yaml").write_text(content)
    argv = ["--config-file", LEAF, *JOB, *GPU, "--cluster-file", "bad.yaml"]
    assert said in error_of(capsys, *argv)


def test_the_example_of_a_cluster_file_is_complete():
    path = REPOSITORY / "clusters" / "example.yaml"
    keys = {line.lstrip("# ").partition(":")[0] for line in path.read_text().splitlines()}
    assert set(ClusterSettings.__dataclass_fields__) <= keys
    args = parse_submission(["--cluster-file", str(path)])
    assert args.cluster_file == str(path)
    yaml.safe_load(path.read_text())
