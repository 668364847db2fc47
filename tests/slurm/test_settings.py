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


def test_paths_of_a_cluster_file_are_written_out(slurm, here, monkeypatch, tmp_path):
    """The shell of the job does not see them, but for the container and set-up commands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    content = {
        "python": "~/venv/bin/python",
        "container": "apptainer exec --bind $TMP_OF_JOB",
        "setup": ["cd $TMP_OF_JOB"],
        "sbatch": {"chdir": "$DATA/work", "comment": "5$"},
        "srun": {"prolog": "~/prolog"},
    }
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(content))
    argv = ["--config-file", LEAF, "--assume-shared", *GPU, "--timeout-hours", "1"]
    assert main([*argv, "--cluster-file", "~/ours.yaml", "OUTPUT_DIR", "a"]) == 0
    sent = "\n".join(slurm.sent)
    for text in ("--chdir=/data/work", "--comment='5$'", f"--prolog={tmp_path}/prolog"):
        assert text in sent
    assert f"--bind $TMP_OF_JOB {tmp_path}/venv/bin/python" in sent
    assert "\ncd $TMP_OF_JOB\n" in sent


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("python: $NOT_SET/python", "python is '$NOT_SET/python', but the environment variable"),
        ("srun: {chdir: $NOT_SET}", "srun chdir is '$NOT_SET', but the environment variable"),
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
