"""The shell recipes and the package metadata agree with the code. The scripts run with stand-ins for uv, pip and Python, and at toy size whole."""
import ast
import csv
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from analysis.sweep_config import check_runs, read_sweep
from nanochat.cli import ArgumentParser
from nanochat.growth.stages import parse_path
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((ROOT / "runs").glob("*.sh")), ROOT / ".ci" / "run"]
DOCUMENTS = [ROOT / "README.md", ROOT / "analysis" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULE_OF = {"huggingface-hub": "huggingface_hub", "langchain-core": "langchain_core", "langchain-openai": "langchain_openai", "lm-eval": "lm_eval", "markdown-it-py": "markdown_it", "pyyaml": "yaml"}  # where it differs from the distribution's name


# -----------------------------------------------------------------------------
# Metadata


def metadata_list(name):
    """The distributions in one list of pyproject.toml (tomllib is not in Python 3.10)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (content,) = re.findall(rf"^{name} = \[(.*?)\] *(?:#.*)?$", text, re.MULTILINE | re.DOTALL)
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in re.findall(r'"(.+?)"', content)}


def imports(*folders):
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"functorch",  # comes with torch
                                                   "tomllib",  # from Python 3.11 on
                                                   "nanochat", "scripts", "tasks", "tests", "dev", "analysis"}


def modules(distributions):
    return {MODULE_OF.get(name, name) for name in distributions}


def test_every_import_is_declared():
    extras = metadata_list("gpu") | metadata_list("eval") | metadata_list("export") | metadata_list("sweep")  # for parts that say so where they are missing
    declared = modules(metadata_list("dependencies") | extras)
    assert imports("nanochat", "scripts", "tasks", "analysis") <= declared
    assert imports("tests") <= declared | modules(metadata_list("dev"))


def test_every_dependency_is_imported():
    assert modules(metadata_list("dependencies") | metadata_list("gpu") | metadata_list("sweep")) <= imports("nanochat", "scripts", "tasks", "analysis")


# -----------------------------------------------------------------------------
# Commands in the recipes and the documents


def commands():
    """(file, module, flags) of every `-m nanochat.X`, `-m scripts.X` or `-m analysis.X`; variables of flags have their defaults."""
    setup = (ROOT / "runs" / "setup.sh").read_text(encoding="utf-8")
    get_text = re.search(r"^get_text\(\) \{\n(.*?)^\}", setup, re.MULTILINE | re.DOTALL)[1]
    for path in [*(path for path in SCRIPTS if path.name != "setup.sh"), *DOCUMENTS]:
        text = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8").replace("\nget_text\n", f"\n{get_text}"))
        variables = dict(re.findall(r'"\$\{([A-Z_]+)=([^}]*)\}"', text))  # with their defaults
        variables |= dict(re.findall(r'^([A-Z_]+)="\$\{\w+-([^}]*)\}"', text, re.MULTILINE))
        for module, rest in re.findall(r"-m ((?:nanochat|scripts|analysis)\.\w+)(.*)", text):
            rest = re.split(r"[`;)<>]|\s[&|]|\s#", rest)[0]
            rest = re.sub(r"(?<![\w\"=])\$([A-Z_]+)", lambda match: variables.get(match[1], match[0]), rest)
            yield path.name, module, [re.sub(r"\$\{?\w+\}?", "1", word) for word in shlex.split(rest) if word != "--"]


class Parsed(Exception):
    pass


@pytest.mark.parametrize("where, module, flags", [pytest.param(*found, id=f"{found[0]}-{found[1]}-{i}") for i, found in enumerate(commands())])
def test_commands_exist_and_take_their_flags(where, module, flags, monkeypatch):
    def parse_only(self, args=None, namespace=None, parse=ArgumentParser.parse_args):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_only)
    with pytest.raises(Parsed):
        importlib.import_module(module).main(flags)


def test_growths_are_made_of_whole_heads():
    found = 0
    for path in [*DOCUMENTS, ROOT / "scripts" / "grow_checkpoint.py"]:
        for line in path.read_text(encoding="utf-8").splitlines():
            head_dim = int(re.search(r"--head-dim=(\d+)|$", line)[1] or 128)  # base_train's
            for shapes in re.findall(r"--(?:grow-path|grow-to|to)=(\d[\dx,]+)", line) if "-m scripts." in line else ():
                assert not [str(shape) for shape in parse_path(shapes) if shape.width % head_dim], line
                found += 1
    assert found > 8


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        file, _, place = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if place:
            titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert place in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], link


def test_files_that_documents_name_exist():
    """Names between backticks that look like a path of this project."""
    files = {str(path.relative_to(ROOT)) for folder in ("nanochat", "scripts", "tasks", "analysis", "runs", "docs", "dev", "tests") for path in (ROOT / folder).rglob("*")}
    for path in DOCUMENTS:
        for name in re.findall(r"`((?:nanochat|scripts|tasks|analysis|runs|docs|dev|tests)/[\w./-]+)`", path.read_text(encoding="utf-8")):
            assert name.rstrip("/") in files, f"{path.name}: {name}"


def test_commands_are_found():
    found = {(where, module) for where, module, _ in commands()}
    assert {("quickstart.sh", "scripts.base_train"), ("speedrun.sh", "scripts.base_train"), ("README.md", "scripts.base_train")} <= found
    (flags,) = [flags for where, module, flags in commands() if (where, module) == ("speedrun.sh", "scripts.base_train")]
    assert flags[-3:] == ["--target-param-data-ratio=8", "--device-batch-size=16", "--fp8"]


def test_torchrun_leaves_our_flags_alone():
    """torchrun accepts abbreviations of its own flags: our --run, for one, would be an error without `--` before it."""
    found = 0
    for path in [*SCRIPTS, *DOCUMENTS]:
        for line in re.findall(r"^ *torchrun (.*)", path.read_text(encoding="utf-8").replace("\\\n", " "), re.MULTILINE):
            words = shlex.split(line.replace("$NPROC_PER_NODE", "8"))
            ours = words[words.index("-m") + 2:]
            assert get_args_parser().parse_args(words).training_script_args == [word for word in ours if word != "--"]
            found += 1
    assert found >= 3


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(path, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", path], check=True, cwd=ROOT)


# -----------------------------------------------------------------------------
# setup.sh


class Sandbox:
    """A project folder with the real recipes, and a PATH of stand-ins that write down how they are called."""

    def __init__(self, folder):
        self.project, self.bin, self.calls_file = folder / "my project", folder / "bin", folder / "calls"
        self.bin.mkdir()
        shutil.copytree(ROOT / "runs", self.project / "runs")
        shutil.copy(ROOT / "pyproject.toml", self.project)
        for tool in ("bash", "cat", "cksum", "cp", "dirname", "grep", "ln", "mkdir", "rm"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.calls_file.touch()

    def tool(self, name, body):
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def python(self, name="python3", version_ok=True):
        """A Python that answers the version check, makes environments, and writes down what it installs."""
        self.tool(name, f"""
            case "$*" in
                -c*) exit {0 if version_ok else 1} ;;
                "-m venv "*) echo "venv" >> '{self.calls_file}'; mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
                *) echo "$*" >> '{self.calls_file}'; [ ! -e '{self.project}/broken' ] ;;
            esac""")

    def uv(self):
        self.tool("uv", f"""
            case "$1" in
                venv) echo "uv venv" >> '{self.calls_file}'; mkdir -p .venv/bin; cp '{self.bin}/python3' .venv/bin/python ;;
                *) echo "uv $*" >> '{self.calls_file}' ;;
            esac""")

    def run(self, script, *args, **env):
        """Runs a recipe from another folder; returns (exit status, calls, stderr)."""
        self.calls_file.write_text("")
        result = subprocess.run(["bash", self.project / "runs" / script, *args], capture_output=True, text=True, cwd=self.bin,
                                stdin=subprocess.DEVNULL, env={"PATH": str(self.bin), "HOME": str(self.project), **env})
        return result.returncode, self.calls_file.read_text().splitlines(), result.stderr


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def test_setup_installs_once(sandbox):
    sandbox.python()
    assert sandbox.run("setup.sh")[:2] == (0, ["venv", "-m pip install -e ."])
    assert sandbox.run("setup.sh")[:2] == (0, [])
    assert sandbox.run("setup.sh", "--dev")[:2] == (0, ["-m pip install -e .[dev]"])
    assert sandbox.run("setup.sh", "--dev")[:2] == (0, [])
    assert sandbox.run("setup.sh")[:2] == (0, [])
    with open(sandbox.project / "pyproject.toml", "a") as f:
        f.write("# changed\n")
    assert sandbox.run("setup.sh")[:2] == (0, ["-m pip install -e ."])


def test_setup_goes_on_after_a_failed_installation(sandbox):
    sandbox.python()
    (sandbox.project / "broken").touch()
    status, calls, stderr = sandbox.run("setup.sh")
    assert (status, calls) == (1, ["venv", "-m pip install -e ."]) and "pip could not install" in stderr
    (sandbox.project / "broken").unlink()
    assert sandbox.run("setup.sh")[:2] == (0, ["-m pip install -e ."])


def test_setup_replaces_a_half_made_environment(sandbox):
    sandbox.python()
    (sandbox.project / ".venv" / "bin").mkdir(parents=True)
    assert sandbox.run("setup.sh")[1] == ["venv", "-m pip install -e ."]


def test_setup_with_uv_passes_the_wheels_on(sandbox):
    sandbox.python()
    sandbox.uv()
    wheels = {"PIP_FIND_LINKS": "/wheels /more"}
    assert sandbox.run("setup.sh", **wheels)[:2] == (
        0, ["uv venv", "uv pip install --python .venv/bin/python --find-links /wheels --find-links /more -e ."])
    assert sandbox.run("setup.sh", **wheels)[:2] == (0, [])


def test_setup_makes_a_new_environment_when_a_gpu_appears(sandbox):
    sandbox.python()
    sandbox.tool("nvidia-smi", "exit 9")  # a driver without a GPU
    assert sandbox.run("setup.sh", "--dev")[1] == ["venv", "-m pip install -e .[dev]"]
    sandbox.tool("nvidia-smi", "exit 0")
    assert sandbox.run("setup.sh", "--dev")[1] == ["venv", "-m pip install -e .[dev,gpu]"]
    assert sandbox.run("setup.sh")[1] == []


def test_setup_takes_the_first_python_that_is_new_enough(sandbox):
    sandbox.python("python3", version_ok=False)
    status, calls, stderr = sandbox.run("setup.sh")
    assert (status, calls) == (1, []) and "no Python 3.10 or newer found" in stderr
    sandbox.python("python3.11")
    assert sandbox.run("setup.sh")[:2] == (0, ["venv", "-m pip install -e ."])


def test_setup_refuses_unknown_arguments(sandbox):
    sandbox.python()
    status, calls, stderr = sandbox.run("setup.sh", "--fast")
    assert (status, calls) == (1, []) and "--fast" in stderr


# -----------------------------------------------------------------------------
# quickstart.sh and chat.sh

PRODUCTS = {"nanochat.report reset": "report/header.md", "nanochat.dataset": "base_data_climbmix/source.json",
            "scripts.tok_train": "tokenizer/token_bytes.pt", "scripts.base_train": "report/base-model-training.md",
            "scripts.base_eval": "report/base-model-evaluation.md", "scripts.chat_sft": "report/chat-sft.md",
            "scripts.chat_eval": "report/chat-evaluation-sft.md"}


def stand_in(sandbox, failing):
    """A Python that makes each command's product; the module `failing` fails until the file `repaired` is there."""
    make = "\n".join(f'*"{command}"*) product={product} ;;' for command, product in PRODUCTS.items())
    sandbox.tool("python", f"""
        echo "$2" >> '{sandbox.calls_file}'
        product=report/report.md
        case "$*" in {make} esac
        if [[ $* == *{failing}* && ! -e '{sandbox.bin}/repaired' ]]; then exit 2; fi
        mkdir -p "$(dirname "$NANOCHAT_BASE_DIR/$product")"
        : > "$NANOCHAT_BASE_DIR/$product" """)
    (sandbox.project / "runs" / "setup.sh").write_text("")
    return {"NANOCHAT_BASE_DIR": str(sandbox.project / "base")}


def test_quickstart_does_each_stage_once_and_goes_on_where_it_failed(sandbox):
    env, base = stand_in(sandbox, "tok_train"), sandbox.project / "base"
    status, calls, stderr = sandbox.run("quickstart.sh", **env)
    assert (status, calls) == (1, ["nanochat.report", "nanochat.dataset", "scripts.tok_train"])
    assert 'quickstart: stage "tokenizer" failed' in stderr
    (sandbox.bin / "repaired").touch()
    later = ["scripts.tok_train", "scripts.base_train", "scripts.base_eval", "nanochat.report"]
    assert sandbox.run("quickstart.sh", **env)[:2] == (0, later)
    assert sandbox.run("quickstart.sh", **env)[:2] == (0, ["nanochat.report"])
    (base / "quickstart" / "tokenizer" / "token_bytes.pt").unlink()  # what was made with it is made again too
    assert sandbox.run("quickstart.sh", **env)[:2] == (0, later)
    assert os.listdir(base) == ["quickstart"]


def test_chat_goes_on_from_a_finished_quickstart(sandbox):
    env = stand_in(sandbox, "chat_eval")
    status, calls, stderr = sandbox.run("chat.sh", **env)
    assert (status, calls) == (1, []) and "first: bash runs/quickstart.sh" in stderr
    assert sandbox.run("quickstart.sh", **env)[0] == 0
    status, calls, stderr = sandbox.run("chat.sh", **env)
    assert (status, calls) == (1, ["scripts.chat_sft", "scripts.chat_eval"]) and 'chat: stage "evaluation" failed' in stderr
    (sandbox.bin / "repaired").touch()
    assert sandbox.run("chat.sh", **env)[:2] == (0, ["scripts.chat_eval", "nanochat.report", "scripts.chat_cli"])
    assert sandbox.run("chat.sh", **env)[:2] == (0, ["nanochat.report", "scripts.chat_cli"])


# -----------------------------------------------------------------------------
# miniseries.sh and scaling_laws.sh


def series(sandbox, recipe, **env):
    """The runs of the sweep that a recipe starts on a CPU, and what it calls."""
    sandbox.tool("python", f"""
        echo "$2" >> '{sandbox.calls_file}'
        if [[ $2 == analysis.sweep ]]; then printf '%s' "${{@: -1}}" > '{sandbox.project}/flags'; cat > '{sandbox.project}/sweep.toml'; fi""")
    setup = sandbox.project / "runs" / "setup.sh"
    setup.write_text(setup.read_text(encoding="utf-8").partition('\nsetup_venv "$@"')[0], encoding="utf-8")
    status, calls, stderr = sandbox.run(recipe, DEVICE_TYPE="cpu", **env)
    assert status == 0, stderr
    sweep = read_sweep("sweep.toml", (sandbox.project / "sweep.toml").read_text(), (sandbox.project / "flags").read_text().removeprefix("--flags="))
    check_runs(sweep, sweep.trials({}))
    return sweep, calls


def test_the_miniseries_trains_what_it_says(sandbox):
    sweep, calls = series(sandbox, "miniseries.sh")
    assert calls == ["nanochat.dataset", "scripts.tok_train", "analysis.sweep", "analysis.scaling"] and sweep.ranks == 8
    arguments = [trial.arguments() for trial in sweep.trials({})]
    assert [words[-1] for words in arguments] == [f"--model-tag=mini_miniseries_d{depth}" for depth in (12, 14, 16, 18, 20, 22, 24, 26)]
    assert arguments[-1][:-1] == ["--device-type=cpu", "--depth=26", "--device-batch-size=16", "--core-metric-every=999999", "--core-metric-max-per-task=-1",
                                  "--sample-every=-1", "--save-every=-1"]
    assert "--device-batch-size=32" in arguments[0]


def test_scaling_laws_train_what_they_say(sandbox):
    sweep, calls = series(sandbox, "scaling_laws.sh", SKIP_SETUP="1", FLOPS="1e17  2.15e18", DEPTHS="6 8", LABEL="mine", BASE_TRAIN="--depth=7 --eval-every=9", NPROC_PER_NODE="1")
    assert calls == ["analysis.sweep", "analysis.scaling"] and sweep.ranks == 1
    assert [trial.name for trial in sweep.trials({})] == ["mine_scaling_1e17_d7", "mine_scaling_2.15e18_d7"], "BASE_TRAIN has the last word"
    assert sweep.trials({})[1].arguments()[:-1] == ["--device-type=cpu", "--target-param-data-ratio=-1", "--target-flops=2.15e18", "--depth=7", "--eval-every=9"]


# -----------------------------------------------------------------------------
# Whole recipes at toy size, from an empty folder and without network

TOY_MODEL = ("--head-dim=32 --aspect-ratio=16 --max-seq-len=128 --device-batch-size=2 --total-batch-size=512 --eval-tokens=512 "
             "--core-metric-every=-1 --sample-every=-1")
TOY = {"DATASET": "--source=text", "TOK_TRAIN": "--vocab-size=400", "BASE_TRAIN": f"{TOY_MODEL} --num-iterations=3",
       "BASE_EVAL": "--eval=bpb,sample --device-batch-size=1 --split-tokens=512",
       "CHAT_SFT": "--mixture=spelling --num-iterations=2 --eval-tokens=512 --chatcore-every=-1", "CHAT_EVAL": "-a SimpleSpelling -x 4 -m 8"}


@pytest.fixture
def toy(tmp_path):
    """A project folder with a finished environment (this one), the real code and a text of its own; runs a recipe there."""
    project = tmp_path / "my project"
    shutil.copytree(ROOT / "runs", project / "runs")
    for name in ("nanochat", "scripts", "tasks", "analysis", "pyproject.toml"):
        (project / name).symlink_to(ROOT / name)
    (project / "text").mkdir()
    for path in (ROOT / "nanochat").glob("*.py"):
        shutil.copy(path, project / "text" / f"{path.stem}.txt")
    programs = project / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, module in (("python", ""), ("torchrun", "-m torch.distributed.run")):
        (programs / name).write_text(f"#!/bin/bash\nexec '{sys.executable}' {module} \"$@\"\n")
        (programs / name).chmod(0o755)
    checksum = subprocess.run(["cksum"], stdin=open(ROOT / "pyproject.toml"), capture_output=True, text=True, check=True).stdout.strip()
    (project / ".venv" / "nanochat.stamp").write_text(f"{checksum}  dev gpu\n")
    nowhere = "http://127.0.0.1:9"  # the network, for whatever asks for it

    def run(recipe, **env):
        return subprocess.run(["bash", project / "runs" / recipe], capture_output=True, text=True, cwd=tmp_path, env={
            **os.environ, **tiny.ENV, **TOY, "NANOCHAT_BASE_DIR": str(tmp_path / "base"), "http_proxy": nowhere, "https_proxy": nowhere, **env})

    run.base, run.project = tmp_path / "base", project
    return run


@pytest.mark.slow
@pytest.mark.parametrize("recipe, env", [("speedrun.sh", {"DEVICE_TYPE": "cpu", "NPROC_PER_NODE": "2"}), ("runcpu.sh", {})])
def test_recipe_goes_from_an_empty_folder_to_a_chat_and_a_report(toy, recipe, env):
    done = toy(recipe, DEPTH="2", QUESTION="Spell apple", **env)
    assert done.returncode == 0, done.stderr
    ranks = int(env.get("NPROC_PER_NODE", 1))
    for stage in ("base_checkpoints", "chatsft_checkpoints"):
        assert len(list((toy.base / stage / "d2").glob("optim_*_rank*.pt"))) == ranks
    assert "=== report" in done.stdout.split("=== Spell apple")[1]  # what so small a model answers in between may be nothing but line ends
    report = (toy.project / "report.md").read_text()
    for section in ("Tokenizer training", "Tokenizer evaluation", "Base model evaluation", "Chat SFT", "Chat evaluation sft"):
        assert f"## {section}\n" in report
    assert (toy.project / "report.html").exists() and "chat_web -i sft -g d2" in done.stdout


@pytest.mark.slow
def test_series_leave_tables_and_do_not_train_twice(toy):
    env = {"DEVICE_TYPE": "cpu", "NPROC_PER_NODE": "1"}
    done = toy("miniseries.sh", DEPTHS="2", **env)
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader(open(toy.base / "mini_miniseries_results" / "results.csv"))
    assert (row["depth"], row["model_dim"], row["num_iterations"], row["tokens_trained"], row["core_score"]) == ("2", "32", "3", "1536", "")
    assert float(row["val_bpb"]) > 0 and float(row["param_data_ratio"]) == pytest.approx(1536 / int(row["num_scaling_params"]))
    env |= {"SKIP_SETUP": "1", "BASE_TRAIN": TOY_MODEL, "FLOPS": "5e8", "LABEL": "toy"}
    done = toy("scaling_laws.sh", DEPTHS="2 3 4", **env)
    assert done.returncode == 0, done.stderr
    first = {path: path.read_bytes() for path in toy.base.glob("base_checkpoints/toy_*/log.jsonl")}
    done = toy("scaling_laws.sh", DEPTHS="2 3 4", **env)
    assert done.returncode == 0, done.stderr
    assert len(first) == 3 and all(path.read_bytes() == before for path, before in first.items())
    rows = list(csv.DictReader(open(toy.base / "scaling_laws_results_toy" / "results.csv")))
    assert [(row["flops_budget"], row["depth"]) for row in rows] == [("5e+08", "2"), ("5e+08", "3"), ("5e+08", "4")]
    assert int(rows[0]["num_iterations"]) > int(rows[-1]["num_iterations"])
    assert (toy.base / "scaling_laws_results_toy" / "results.png").exists() and "| 5.00e+08 |" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["speedrun.sh", "miniseries.sh", "scaling_laws.sh"])
def test_recipes_for_gpus_end_at_once_where_there_is_none(toy, recipe):
    done = toy(recipe)
    assert (done.returncode, done.stdout) == (1, "") and not toy.base.exists()
    assert re.fullmatch(rf"{recipe.removesuffix('.sh')}: 8 GPUs are asked for and PyTorch .* can use 0 \(.+\); .*DEVICE_TYPE=cpu.*\n", done.stderr)
