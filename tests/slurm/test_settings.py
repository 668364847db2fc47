"""Tests the settings of a cluster: its file, and options that override it."""

import shlex
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from submissions import GPU, JOB, LEAF, error_of

from contnet.slurm.settings import ClusterSettings, read_settings
from contnet.slurm.submit import main, parse_submission
from contnet.utils.errors import UsageError, UserError

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
    """The job's shell does not expand them, except in container and set-up commands."""
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
        ("setup: {a: b}", "setup is {'a': 'b'}, it must be a list of strings"),
        ("sbatch: {nodes: 3}", "--num-nodes"),
        ("partition: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("mem_gb: 0x" + "f" * 5000, "cannot be read"),
        ("sbatch: {nice: 0x" + "f" * 5000 + "}", "cannot be read"),
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


# --- values that could become separate lines or options ------------------------------------------

LIVE = "x\n#SBATCH --uid=0\ntouch taken"


def settings_of(*argv: str, content: object = None) -> ClusterSettings:
    if content is not None:
        Path("ours.yaml").write_text(yaml.safe_dump(content))
        argv = ("--cluster-file", "ours.yaml", *argv)
    return read_settings(parse_submission(argv))


@pytest.mark.parametrize("text", [LIVE, "a\rb", "a\x1b[2J", "a\u2028b", "a\u202eb", "a\udcffb"])
@pytest.mark.parametrize(
    "key", [each.name for each in fields(ClusterSettings) if each.type in ("str", "list", "dict")]
)
def test_a_setting_is_one_line(here, key, text):
    dicts, option = key in ("sbatch", "srun"), f"--{key.replace('_', '-')}"
    with pytest.raises(UsageError, match=key):
        settings_of(option, f"comment={text}" if dicts else text)
    values = [text] if key == "setup" else {"comment": text} if dicts else text
    if "\udcff" not in text:  # not valid in YAML
        with pytest.raises(UsageError, match=key):
            settings_of(content={key: values})


@pytest.mark.parametrize("name", ["sbatch", "srun"])
@pytest.mark.parametrize(
    "entry",
    [{LIVE: 1}, {"a b": 1}, {"": 1}, {"a=b": 1}, {"a": float("nan")}, {"a": float("inf")}]
    + [{"a": value} for value in (None, False, [1], {"b": 1})],
)
def test_entries_of_sbatch_and_srun_are_options(here, name, entry):
    with pytest.raises(UsageError, match=name):
        settings_of(content={name: entry})


@pytest.mark.parametrize(
    "key", ["partition", "account", "qos", "constraint", "exclude", "gpu_type"]
)
@pytest.mark.parametrize("text", ["a\\' --wrap=reboot '", 'a" --uid=0', "a\\"])
def test_sbatch_reads_quotes_in_its_own_way(here, key, text):
    for option in ([f"--{key.replace('_', '-')}", text], ["--sbatch", f"comment={text}"]):
        with pytest.raises(UsageError, match="sbatch accepts no"):
            settings_of(*option)
    with pytest.raises(UsageError, match="--sbatch wrap"):
        settings_of("--sbatch", "wrap=reboot")


@pytest.mark.parametrize(
    "key", [e.name for e in fields(ClusterSettings) if e.type in ("int", "float")]
)
def test_numbers_are_numbers(here, key):
    wrong = [float("nan"), float("inf"), -float("inf"), -1, 10**18, True, "nan", "1"]
    for value in wrong:
        with pytest.raises(UsageError, match=key):
            settings_of(content={key: value})
    for text in ("nan", "inf", "-1", "1e400"):
        with pytest.raises(UserError, match=key.replace("_", "-")):
            settings_of(f"--{key.replace('_', '-')}={text}")


@pytest.mark.parametrize("kind", ["config", "output", "datasets", "pythonpath"])
def test_names_and_paths_are_one_line(slurm, here, capsys, monkeypatch, kind):
    config, output = here / "mine.yaml", "out"
    if kind == "config":
        config = here / "x\n#SBATCH --uid=0\n.yaml"
    elif kind == "output":
        output = f"out{LIVE}".replace("/", "")
    elif kind == "datasets":
        monkeypatch.setenv("DETECTRON2_DATASETS", f"{here}/data\nsets")
    else:
        monkeypatch.setenv("PYTHONPATH", f"{here}/{LIVE}")
    config.write_text(f"_BASE_: {LEAF}\n" + yaml.safe_dump({"OUTPUT_DIR": output}))
    argv = ["--config-file", str(config), *JOB, *GPU]
    assert main(argv) != 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and r"\n" in lines[0], lines
    assert not [call for call in slurm.calls if call.startswith("sbatch")]


def test_odd_names_stay_values(slurm, here):
    """The sbatch script has exactly the lines of an ordinary job, with other values."""
    odd = "$(touch taken) `touch taken` # --wrap=x; %j & | 猫"
    (here / "mine $(touch taken) #.yaml").write_text(f"_BASE_: {LEAF}\n")
    texts = []
    for name, value in ((LEAF, "plain"), ("mine $(touch taken) #.yaml", odd)):
        options = ["--account", value, "--sbatch", f"comment={value}", "--srun", f"mpi={value}"]
        options += ["OUTPUT_DIR", f"out {value.replace('%', '')}".replace("/", "")]
        assert main(["--config-file", name, *JOB, *GPU, *options]) == 0
        texts.append(slurm.sent)
    plain, sent = texts
    assert len(plain) == len(sent)
    for one, other in zip(plain, sent, strict=True):
        assert one.partition("=")[0].split()[:2] == other.partition("=")[0].split()[:2]
    words = [shlex.split(line) for line in sent if line.startswith(("#SBATCH", "srun"))]
    flags = [each for each in words if each[0] == "#SBATCH"]
    assert all(len(each) == 2 for each in flags)
    assert ["#SBATCH", f"--account={odd}"] in flags and ["#SBATCH", f"--comment={odd}"] in flags
    assert f"--mpi={odd}" in words[-1]
    script = "\n".join(line for line in sent if not line.startswith("srun"))
    subprocess.run(["bash", "-c", script], check=True, cwd=here)
    assert not (here / "taken").exists()
