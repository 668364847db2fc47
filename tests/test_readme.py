"""Tests README and docs: commands, Python, links, names, keys, counts."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, finish
from PIL import Image
from untrained import save_untrained

from benchmarks import compare_checkouts
from benchmarks import main as benchmarks
from contnet.commands import (
    analyze,
    configs,
    convert_dataset,
    demo,
    doctor,
    export,
    make_shards,
    predict,
    prepare_cityscapes,
    publish,
    report,
)
from contnet.commands import convert_weights as weights
from contnet.commands import results as table
from contnet.commands.model_zoo import make_zoo
from contnet.config import load_config
from contnet.config.shipped import find_config
from contnet.data.datasets.shapes import make_shapes, shapes_datasets
from contnet.launch.arguments import parse_arguments
from contnet.launch.preflight_config import load_checked_config
from contnet.slurm import sweep
from contnet.slurm.submit import parse_submission
from contnet.utils.errors import UserError

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
README = REPOSITORY / "README.md"
SIZES = REPOSITORY / "docs" / "network.md"
PACKAGE = REPOSITORY / "projects" / "ConTNet"
# Besides python, torchrun and make, whose arguments are checked.
KNOWN_PROGRAMS = {".", "cd", "export", "git", "pip", "sh"}
TORCHRUN_OPTIONS = {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"}


@dataclass
class Block:
    """A code block: its language ("" if indented), its text, the number of its first line."""

    language: str
    text: str
    line: int


def find_blocks(markdown: str) -> list[Block]:
    """Returns the fenced and indented code blocks of a page."""
    blocks, lines, start, language = [], [], 0, None
    before = ""
    for number, line in enumerate(markdown.splitlines(), 1):
        if line.startswith("```"):
            if language is None:
                language, lines, start = line[3:].strip(), [], number + 1
            else:
                blocks.append(Block(language, "\n".join(lines), start))
                language = None
        elif language is not None:
            lines.append(line)
        elif line.startswith("    ") and (not before.strip() or before.startswith("    ")):
            if not before.strip():
                blocks.append(Block("", line[4:], number))
            else:
                blocks[-1].text += "\n" + line[4:]
        before = line
    assert language is None, "a fence is not closed"
    return blocks


def read_commands(text: str) -> list[list[str]]:
    """Returns the commands of a shell block as words, without assignments before them."""
    commands, pending = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        pending += line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # an open quote
            pending += "\n"
            continue
        pending = ""
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words:
            commands.append(words)
    assert not pending, f"a quote is not closed: {pending}"
    return commands


def is_shell(block: Block) -> bool:
    begins = re.match(r"(contnet|python|torchrun|make|pip|sh|git) ", block.text)
    return block.language in ("bash", "sh") or (not block.language and bool(begins))


def every_command() -> list:
    found = []
    for page in PAGES:
        for block in filter(is_shell, find_blocks(page.read_text())):
            for words in read_commands(block.text):
                name = f"{page.name}:{block.line} {' '.join(words)[:40]}".splitlines()[0]
                found.append(pytest.param(words, id=name))
    return found


def check_overrides(config_file: str, opts: list[str]) -> None:
    """Checks that the config exists and every KEY VALUE is valid."""
    load_checked_config(find_config(config_file), opts)


def check_train_net(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    check_overrides(args.config_file, args.opts)


def check_submit(arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sweep, "_read_array", lambda path: [(1, ["SEED", "1"]), (2, ["SEED", "2"])])
    args = parse_submission(arguments)
    if args.status or args.cancel:
        return
    for run in sweep.expand_runs(args):
        check_overrides(run.config_file, run.opts)
    if args.cluster_file:
        assert (REPOSITORY / "clusters" / f"{args.cluster_file}.yaml").is_file()


def check_demo(arguments: list[str], monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(demo, "run_demo", lambda *given: seen.append(given) or (100.0, Path("x")))
    assert demo.main(arguments) == 0
    config_file, _, opts = seen[0]
    check_overrides(str(config_file), list(opts))


def check_prepare_cityscapes(arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr(prepare_cityscapes, "prepare_cityscapes", lambda root, workers: (0, 0))
    assert prepare_cityscapes.main(arguments) == 0


def check_make_shards(arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr(make_shards, "make_shards", lambda *given: (0, 0))
    assert make_shards.main(arguments) == 0


def check_doctor(arguments: list[str]) -> None:
    args = doctor.build_parser().parse_intermixed_args(arguments)
    check_overrides(args.config_file, args.opts)


def check_analyze(arguments: list[str]) -> None:
    args = analyze.build_parser().parse_intermixed_args(arguments)
    check_overrides(args.config_file, args.opts)


def check_configs(arguments: list[str]) -> None:
    args = configs.parse_arguments(arguments)
    for file in (args.config, args.other) if args.form == "diff" else ():
        check_overrides(file, [])
    if args.form == "show":
        check_overrides(args.config, args.opts)
    elif args.form == "list":
        assert configs.list_configs(args.words)
    for key in args.keys if args.form == "explain" else ():
        configs.explain_key(key)


def check_benchmark(arguments: list[str], monkeypatch) -> None:
    for subject in benchmarks.SUBJECTS.values():
        monkeypatch.setattr(subject, "run", lambda args: None)
    assert benchmarks.main(arguments) == 0


def check_make(arguments: list[str]) -> None:
    text = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([\w.-]+):", text, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) *[?:]?=", text, re.MULTILINE))
    for word in arguments:
        variable, equals, _ = word.partition("=")
        if equals:
            assert variable in variables, f"the Makefile has no variable {variable}"
        else:
            assert word in targets, f"the Makefile has no target {word}"


def check_command(words: list[str], monkeypatch) -> None:
    """Fails unless this project supports the command."""
    program, *arguments = words
    if program == "torchrun":
        script = arguments.index("train_net.py")
        assert set(arguments[:script:2]) <= TORCHRUN_OPTIONS
        program, arguments = "python", arguments[script:]
    if program == "contnet":
        name = arguments[0].replace("-", "_")
        script = "train_net.py" if name == "train" else f"tools/{name}.py"
        program, arguments = "python", [script, *arguments[1:]]
    if program == "make":
        check_make(arguments)
    elif program in ("python", "python3"):
        if arguments[0] == "train_net.py":
            check_train_net(arguments[1:])
        elif arguments[0] == "train_toy.py":  # run by tests/launch/test_extensions.py
            parse_arguments(arguments[1:])
        elif arguments[0] == "tools/demo.py":
            check_demo(arguments[1:], monkeypatch)
        elif arguments[0] == "tools/prepare_cityscapes.py":
            check_prepare_cityscapes(arguments[1:], monkeypatch)
        elif arguments[0] == "tools/make_shards.py":
            check_make_shards(arguments[1:], monkeypatch)
        elif arguments[0] == "tools/benchmark.py":
            check_benchmark(arguments[1:], monkeypatch)
        elif arguments[0] == "tools/convert_dataset.py":
            convert_dataset.build_parser().parse_args(arguments[1:])
        elif arguments[0] == "tools/compare_checkouts.py":
            compare_checkouts.build_parser().parse_args(arguments[1:])
        elif arguments[0] == "tools/doctor.py":
            check_doctor(arguments[1:])
        elif arguments[0] == "tools/analyze.py":
            check_analyze(arguments[1:])
        elif arguments[0] == "tools/configs.py":
            check_configs(arguments[1:])
        elif arguments[0] == "tools/submit.py":
            check_submit(arguments[1:], monkeypatch)
        elif arguments[0] == "tools/predict.py":
            predict.build_parser().parse_intermixed_args(arguments[1:])
        elif arguments[0] == "tools/publish.py":
            publish.build_parser().parse_args(arguments[1:])
        elif arguments[0] == "tools/report.py":
            report.build_parser().parse_args(arguments[1:])
        elif arguments[0] == "tools/export.py":
            export.build_parser().parse_args(arguments[1:])
        elif arguments[0] == "tools/results.py":
            table.build_parser().parse_args(arguments[1:])
        elif arguments[0] == "tools/convert_weights.py":
            weights.build_parser().parse_args(arguments[1:])
        else:
            assert arguments[0] == "-c", f"nothing is known about {arguments[0]}"
            compile(arguments[1], "command", "exec")
    else:
        assert program in KNOWN_PROGRAMS, f"nothing is known about {program}"
        for path in arguments:
            if re.fullmatch(r"(requirements|tools)/[\w./-]+", path):
                assert (REPOSITORY / path).is_file(), path


@pytest.mark.parametrize("words", every_command())
def test_commands_are_legal(words, monkeypatch):
    check_command(words, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "python train_net.py --config-file configs/faster_rcnn_contm.yaml --num-gpu 8",
        "python train_net.py --config-file configs/faster_rcnn_contx.yaml",
        "python train_net.py --config-file configs/faster_rcnn_contm.yaml SOLVER.BASE_RATE 1",
        "python train_net.py --config-file configs/faster_rcnn_contm.yaml SOLVER.MAX_ITER 0",
        "torchrun --nproc-per-node 2 train_net.py --config-file configs/none.yaml",
        "python tools/demo.py MODEL.CONTNET.TAPS all",
        "python tools/prepare_cityscapes.py --folder here",
        "python tools/make_shards.py datasets/imagenet/train",
        "python tools/doctor.py --config-file configs/faster_rcnn_contm.yaml DATASETS.REGISTERED x",
        "python tools/analyze.py --config-file configs/fcos_contm.yaml --size 800",
        "python tools/configs.py explain MODEL.CONTNET.TAP",
        "python tools/configs.py list fcos mask",
        "python tools/configs.py show configs/fcos_contm.yaml --change",
        "python tools/submit.py --config-file configs/faster_rcnn_contm.yaml --partitoin gpu",
        "python tools/submit.py --config-file configs/faster_rcnn_contm.yaml --sweep SEED=x,y",
        "python tools/submit.py --config-file configs/faster_rcnn_contm.yaml --cluster-file none",
        "python tools/submit.py --config-file configs/faster_rcnn_contm.yaml --sweep SEED=1,2 "
        "--only SEED=3 'SOLVER.BASE_LR 0.01'",
        "python tools/submit.py --config-file configs/faster_rcnn_contm.yaml --sweep SEED=1,2 "
        "--only SEED=2 'SOLVER.BASE_RATE 0.01'",
        "python tools/predict.py output/run photos/",
        "python tools/report.py output/run --picture 3",
        "python tools/export.py output/run exported --format caffe",
        "python tools/results.py",
        "python tools/results.py output/rates --costs",
        "python tools/benchmark.py evaluation --boxes",
        "python tools/convert_dataset.py coco mine mine.json",
        "python tools/convert_dataset.py voc mine",
        "python tools/convert_weights.py a.pth b.pth --head none",
        "python tools/compare_checkouts.py ../before --only retinanet",
        "python train.py",
        "make tests",
        "make setup VENW=here",
        "detectron2 train",
        "pip install -r requirements/none.txt",
    ],
)
def test_wrong_commands_are_found(line, monkeypatch):
    (words,) = read_commands(line)
    with pytest.raises((Exception, SystemExit)):
        check_command(words, monkeypatch)


def test_blocks_and_commands_are_read_whole():
    page = "a\n\n    make x\n    make y\n\nb\n\n```bash\nA=1 make \\\n  z\npython -c '\n1'\n```\n"
    blocks = find_blocks(page)
    assert [block.text for block in blocks if is_shell(block)] == [
        "make x\nmake y",
        "A=1 make \\\n  z\npython -c '\n1'",
    ]
    assert read_commands(blocks[1].text) == [["make", "z"], ["python", "-c", "\n1"]]


def test_readme_begins_with_the_two_commands():
    first = next(filter(is_shell, find_blocks(README.read_text())))
    assert read_commands(first.text) == [["make", "demo"], ["make", "test"]]


# --- Python in the pages -------------------------------------------------------------------------


def python_pages() -> list:
    pages = [p for p in PAGES if any(b.language == "python" for b in find_blocks(p.read_text()))]
    assert README in pages
    slow = {"network.md": pytest.mark.slow}
    # It has two files, which tests/launch/test_extensions.py writes and runs.
    pages = [page for page in pages if page.name != "architecture.md"]
    return [pytest.param(p, id=p.name, marks=slow.get(p.name, ())) for p in pages]


@pytest.mark.parametrize("page", python_pages())
def test_python_runs(page, tmp_path, monkeypatch):
    """A page's blocks run one after the other, in the same namespace."""
    monkeypatch.chdir(tmp_path)
    if page.name == "prediction.md":  # it predicts an image with a run
        save_untrained(Path("output/faster_rcnn_contm"), "faster_rcnn_contti")
        Path("photos").mkdir()
        Image.new("RGB", (90, 60)).save("photos/a.jpg")
    names = {"__name__": "page"}
    for block in find_blocks(page.read_text()):
        if block.language == "python":
            text = "\n" * (block.line - 1) + block.text
            exec(compile(text, str(page), "exec"), names)


def table_of_sizes() -> dict[str, tuple[str, ...]]:
    """Returns counted columns of a page's table: parameters, MACs, attention."""
    rows = re.findall(r"^\| ConT-(\w+) \|(.*)\|$", SIZES.read_text(), re.MULTILINE)
    cells = [(name.lower(), [cell.strip() for cell in row.split("|")]) for name, row in rows]
    whole = [(name, row) for name, row in cells if len(row) == 5]
    return {f"contnet_{name}": (row[1], row[3], row[4]) for name, row in whole}


def test_counting_command_gives_the_table():
    blocks = filter(is_shell, find_blocks(SIZES.read_text()))
    (command,) = [w for block in blocks for w in read_commands(block.text) if w[1:2] == ["-c"]]
    done = subprocess.run(
        [sys.executable, *command[1:]], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"(\w+): ([\d.]+) M, ([\d.]+) G, attention ([\d.]+) G", done.stdout)
    assert {name: tuple(numbers) for name, *numbers in printed} == table_of_sizes()
    assert len(printed) == 4


# --- links, files, names, keys -------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [t.partition("#")[0] for t in targets if "://" not in t and not t.startswith("#")]
    missing = [t for t in local if not (page.parent / t).exists()]
    assert not missing


def mentioned_files(text: str) -> set[str]:
    return set(re.findall(r"`([\w./-]+\.(?:py|md|sh|txt|cfg|toml))`", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_mentioned_files_exist(page):
    made_by_runs = {"log.txt", "code.txt", "submission1/code.txt", "example.py"}
    examples = {"toy.py", "train_toy.py"}
    of_data_sets = {"classes.txt", "val_labels.txt", "ILSVRC2012_validation_ground_truth.txt"}
    elsewhere = {"convert-torchvision-to-d2.py", *of_data_sets}
    names = mentioned_files(page.read_text()) - made_by_runs - examples - elsewhere
    roots = (REPOSITORY, PACKAGE, PACKAGE / "contnet", page.parent, REPOSITORY / "configs")
    assert not [name for name in names if not any((root / name).is_file() for root in roots)]


def resolve(name: str) -> object:
    """Returns the object with a dotted name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_names_of_the_package_exist(page):
    names = set(re.findall(r"(?<![\w./-])contnet(?:\.[A-Za-z_]\w*)+", page.read_text()))
    for name in names - {"contnet.egg"}:
        resolve(name)


def test_wrong_names_are_found():
    with pytest.raises(AttributeError):
        resolve("contnet.create_modell")
    with pytest.raises(AttributeError):
        resolve("contnet.config.load")


def unknown_keys(text: str) -> list[str]:
    """Returns the config keys in a text that do not exist."""
    unknown = []
    cfg = load_config(str(REPOSITORY / "configs" / "faster_rcnn_contm.yaml"))
    for key in sorted(set(re.findall(r"\b[A-Z][A-Z_]+(?:\.[A-Z][A-Z_0-9]*)+\b", text))):
        node = cfg
        for part in key.split("."):
            if not hasattr(node, part):
                unknown.append(key)
                break
            node = getattr(node, part)
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_keys_exist(page):
    assert unknown_keys(page.read_text()) == []


def test_wrong_keys_are_found():
    text = "`SOLVER.BASE_LR`, `MODEL.CONTNET.TAP`, SOLVER.EMA.DECAY.X and MODEL.CONTNET"
    assert unknown_keys(text) == ["MODEL.CONTNET.TAP", "SOLVER.EMA.DECAY.X"]


def test_every_key_for_the_network_is_in_the_docs():
    text = "".join(page.read_text() for page in PAGES)
    node = load_config(str(REPOSITORY / "configs" / "faster_rcnn_contm.yaml")).MODEL.CONTNET
    assert [key for key in node if f"MODEL.CONTNET.{key}" not in text] == []


def test_every_recipe_is_in_the_model_zoo():
    text = (REPOSITORY / "MODEL_ZOO.md").read_text()
    leaves = [path.relative_to(REPOSITORY) for path in (REPOSITORY / "configs").rglob("*.yaml")]
    leaves = [path for path in leaves if not path.name.startswith(("Base", "demo"))]
    leaves = [path for path in leaves if path.parent.name != "quick"]
    assert len(leaves) > 40
    assert [path for path in leaves if f"({path})" not in text] == []


@pytest.mark.slow
def test_model_zoo_is_up_to_date():
    """If this fails, run: python tools/model_zoo.py."""
    assert (REPOSITORY / "MODEL_ZOO.md").read_text() == make_zoo(REPOSITORY)


def test_results_of_unknown_configs_are_refused(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.yaml").write_text("[{paper: {nothing: {}}, here: {}}]")
    with pytest.raises(UserError, match=r"configs/nothing\.yaml does not exist"):
        make_zoo(tmp_path)


# --- a command sequence for real -----------------------------------------------------------------


def commands_below(heading: str) -> list[list[str]]:
    """Returns the commands in a section of the README."""
    section = README.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return [words for b in find_blocks(section) if is_shell(b) for words in read_commands(b.text)]


@pytest.mark.slow
def test_your_own_data_in_ten_minutes(tmp_path):
    """Runs the README's commands on drawn data, with a shortened training."""
    shapes = make_shapes(tmp_path / "shapes", num_train=8, num_val=4)
    images = tmp_path / "mine" / "images"
    images.mkdir(parents=True)
    for (_, file, folder), split in zip(shapes_datasets(shapes), ("train", "val"), strict=True):
        content = json.loads(Path(file).read_text())
        for each in content["images"]:  # both splits have the same names
            name = f"{split}_{each['file_name']}"
            shutil.copy(Path(folder, each["file_name"]), images / name)
            each["file_name"] = name
        (images.parent / f"{split}.json").write_text(json.dumps(content))
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    commands = commands_below("Your own data in ten minutes")
    assert [words[1] for words in commands if words[0] == "python"] == [
        "tools/doctor.py",
        "train_net.py",
        "tools/report.py",
        "tools/predict.py",
    ]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    for program, script, *words in commands[-4:]:
        assert program == "python"
        if script == "train_net.py":
            words += ["SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "1", "TEST.EVAL_PERIOD", "0"]
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / script), *words],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    for page in ("data.html", "output/mine/report.html", "found/index.html"):
        assert (tmp_path / page).is_file()


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.slow
def test_short_try_on_the_cpu_works(train_net, tmp_path):
    blocks = filter(is_shell, find_blocks(README.read_text()))
    commands = [words for block in blocks for words in read_commands(block.text)]
    (words,) = [w for w in commands if w[:2] == ["python", "train_net.py"] and "./output/try" in w]
    process = train_net(" ".join(words[2:]), "OUTPUT_DIR", str(tmp_path))
    assert "MODEL.WEIGHTS is empty" in finish(process)
    checkpoint = torch.load(tmp_path / "model_final.pth")
    assert checkpoint["trainer"]["iteration"] == 19
    left = {path.name for path in tmp_path.iterdir()}
    training = (REPOSITORY / "docs" / "training.md").read_text()
    training = training[
        training.index("## Output files") : training.index("## Experiment trackers")
    ]
    table = re.findall(r"^\| `([\w.]+)/?` \|", training, re.MULTILINE)
    assert {"log.txt", "config.yaml", "metrics.json", "last_checkpoint"} <= set(table)
    assert set(table) - {"set_aside", "trackers.json"} <= left
