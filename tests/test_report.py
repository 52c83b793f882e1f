import datetime
import os
import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from nanochat import report as report_module
from nanochat import run_report
from nanochat.cli import UsageError
from nanochat.report import DummyReport, Report, estimate_cost, extract, extract_timestamp, generate_header, get_report, main, slugify
from nanochat.run_log import RunLog
from nanochat.run_report import TrainingRun, find_run_log, verbatim

COUNTS = {"wte": 1000, "lm_head": 1000, "transformer_matrices": 3000, "total": 5000}
CONDITIONS = {"data": "stdlib", "tokenizer": "abc", "objective": "next-token"}
NASTY = "a ``` b <script>alert(1)</script> | ![x](http://example.com/x.png) [y](javascript:alert(2))"


@pytest.fixture
def here(base_dir, tmp_path_factory, monkeypatch):
    """A fresh base directory, and another fresh folder as the current one, of no repository."""
    monkeypatch.setattr(report_module, "run_command", lambda cmd: None)
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    return base_dir


def train(base_dir, tag="d4", steps=20, planned=20, device="cpu", device_name=None, world_size=1, grow_at=None, sample=NASTY, model_config=None, conditions=CONDITIONS, **flags):
    """Writes the log of a made-up run that did `steps` of `planned` steps, and returns its records' path."""
    path = base_dir / "base_checkpoints" / tag / "log.jsonl"
    log = RunLog(path)
    log.log("start", 0, config={"depth": 4, "run": "dummy", **flags}, model_config=model_config or {"n_layer": 4}, conditions=conditions, counts=COUNTS, flops_per_token=30000,
            num_iterations=planned, total_batch_size=512, total_tokens=512 * planned, device=device, device_name=device_name or device, dtype="float32", world_size=world_size)
    for step in range(steps + 1):
        if step % 5 == 0:
            log.log("eval", step, val_bpb=2 - step / 40, tokens=512 * step, flops=512 * 30000 * step, time=30 * step)
        if step == grow_at:
            log.log("grow", step, label="d4 to d8", loss_before=3.0, loss_after=3.0, num_iterations=planned, model_config=model_config)
        if step < steps:
            log.log("train", step, loss=5 - step / 20, raw_loss=float("nan") if step == 3 else 5 - step / 20, lrm=1.0, dt=30.0, tok_per_sec=17,
                    mfu=0.0, tokens=512 * (step + 1), flops=512 * 30000 * (step + 1), time=30 * (step + 1), epoch=1)
    if steps == planned:
        log.log("core", steps, core_metric=0.1234, results={"piqa": 0.64, "copa": float("nan")}, centered_results={"piqa": 0.28}, flops=1, time=600)
        log.log("sample", steps, samples=[sample])
        log.log("end", steps, min_val_bpb=1.5, total_training_time=600, total_flops=512 * 30000 * steps, peak_memory_mib=12.0)
    log.close()
    return path


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def written(name):
    with open(name, encoding="utf-8") as f:
        return f.read()


# -----------------------------------------------------------------------------
# Sections


def test_a_section_is_markdown_with_a_timestamp(here):
    path = get_report().log("Base model training", [
        {"lr": 0.5, "steps": 12345, "small": 42, "flag": True, "name": "x"}, None, {}, "", "### Verbatim\n\n| a |\n"])
    assert path == str(here / "report" / "base-model-training.md")
    heading, timestamp, blank, *rest = written(path).splitlines()
    assert (heading, blank) == ("## Base model training", "")
    assert datetime.datetime.strptime(timestamp, "timestamp: %Y-%m-%d %H:%M:%S")
    assert "- lr: 0.5000\n- steps: 12,345\n- small: 42\n- flag: True\n- name: x\n" in "\n".join(rest)
    assert "### Verbatim\n\n| a |" in "\n".join(rest)


def test_extract_reads_bullets():
    section = "## X\ntimestamp: 2026-01-01 00:00:00\n\n- CORE metric: 0.1\n- CORE metric: 0.2: more\n- ChatCORE metric: 0.9\nCORE: 7\n"
    assert extract(section, "CORE") == {"CORE": "0.2"}
    assert extract(section, ["CORE metric", "ChatCORE", "absent"]) == {"CORE metric": "0.2", "ChatCORE": "0.9"}


def test_extract_timestamp():
    assert extract_timestamp("a\ntimestamp: 2026-01-02 03:04:05\n", "timestamp:") == datetime.datetime(2026, 1, 2, 3, 4, 5)
    assert extract_timestamp("timestamp: soon\n", "timestamp:") is None
    assert extract_timestamp("", "timestamp:") is None


def test_slugify():
    assert slugify("Chat evaluation sft") == "chat-evaluation-sft"


@pytest.mark.parametrize("title", ["SFT", "Chat SFT"])
def test_the_sft_section_is_in_the_report_in_its_place(here, title):
    report = get_report()
    for name in ("Chat evaluation sft", title, "Tokenizer training", "Midtraining"):
        report.log(name, [{"marker": name}])
    report.generate()
    headings = re.findall(r"^## (.+)", written("report.md"), re.MULTILINE)
    assert headings == ["Environment", "Tokenizer training", title, "Chat evaluation sft", "Midtraining", "Summary"]


def test_summary_table(here):
    report = get_report()
    report.log("Base model evaluation", [{"model": "d4", "CORE metric": 0.2626}, {"sample 0": "CORE metric: 9\n- CORE metric: 9"}])
    report.log("Chat evaluation sft", [{"MMLU": 0.3, "ARC-Easy": 0.5}, {"ChatCORE metric": 0.21}])
    report.log("Chat evaluation rl", [{"GSM8K": 0.1, "MMLU": 0.9}])
    report.generate()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in written("report.md").splitlines() if line.startswith("|")]
    assert rows[0] == ["Metric", "BASE", "SFT", "RL"]
    assert rows[2:] == [["CORE", "0.2626", "-", "-"], ["ARC-Easy", "-", "0.5000", "-"], ["GSM8K", "-", "-", "0.1000"],
                        ["MMLU", "-", "0.3000", "-"], ["ChatCORE", "-", "0.2100", "-"]]


def test_the_summary_is_of_the_run_that_is_reported(here):
    """base_eval was perhaps asked about other models since, or about other steps."""
    train(here, "d12")
    report = get_report()
    for models, core in (([("d6", 20, 0.5)], "0.1234"), ([("d12", 10, 0.5)], "0.1234"), ([("d12", 20, 0.25), ("d6", 20, 0.5)], "0.2500")):
        report.log("Base model evaluation", [{"model": f"{tag} (step {step})", "CORE metric": value} for tag, step, value in models])
        report.generate("d12")
        assert f"| CORE            | {core}   |" in written("report.md")


def test_wall_clock_runs_from_reset_to_the_last_section_before_rl(here, monkeypatch):
    report = get_report()
    for title, now in ((None, "10:00:00"), ("Tokenizer training", "10:30:00"), ("SFT", "12:05:59"), ("Chat RL", "23:00:00")):
        monkeypatch.setattr(report_module, "_now", lambda now=now: f"2026-01-01 {now}")
        report.log(title, [{"x": 1}]) if title else report.reset()
    report.generate()
    assert "Total wall clock time: 2h5m\n" in written("report.md")


def test_wall_clock_is_unknown_without_reset(here):
    get_report().log("SFT", [{"x": 1}])
    get_report().generate()
    assert "Total wall clock time: unknown" in written("report.md")


def test_reset_forgets_sections_and_keeps_other_files(here):
    report = get_report()
    report.log("SFT", [{"x": 1}])
    report.log("Midtraining", [{"x": 1}])
    report.generate()
    (here / "report" / "notes.md").write_text("mine")
    report.reset()
    assert sorted(os.listdir(here / "report")) == ["header.md", "notes.md"]
    header = written(here / "report" / "header.md")
    assert header.startswith("# nanochat training report\n") and header.endswith("\n---\n\n")
    assert extract_timestamp(header, "Run started:")


def test_only_rank_0_reports(here, monkeypatch):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    report = get_report()
    assert isinstance(report, DummyReport)
    report.log("SFT", [{"x": 1}])
    report.reset()
    assert main([]) == 0
    assert not (here / "report").exists() and os.listdir() == []


# -----------------------------------------------------------------------------
# Environment


def test_header_without_git_and_with_it(monkeypatch):
    monkeypatch.setattr(report_module, "run_command", lambda cmd: None)
    header = generate_header()
    assert "- Commit: unknown (clean)" in header and "### Bloat" not in header
    answers = {"ls-files": "nanochat/cli.py\nnanochat/gone.py", "--short": "abc1234", "abbrev-ref": "main", "--porcelain": " M x", "log": "Subject"}
    monkeypatch.setattr(report_module, "run_command", lambda cmd: next(answer for word, answer in answers.items() if word in cmd))
    header = generate_header()
    assert "- Branch: main\n- Commit: abc1234 (dirty)\n- Message: Subject\n" in header
    lines = written(report_module._PROJECT / "nanochat" / "cli.py").count("\n")
    assert f"- Lines: {lines:,}\n- Files: 1\n" in header


def test_run_command():
    assert report_module.run_command("printf ' a '") == "a"
    assert report_module.run_command("true") == ""
    assert report_module.run_command("echo x; false") is None


def test_estimate_cost():
    gpus = {"available": True, "count": 8, "names": ["NVIDIA H100 80GB HBM3"] * 8}
    assert estimate_cost(gpus, 2) == {"hourly_rate": 24.0, "gpu_type": "NVIDIA H100 80GB HBM3", "estimated_total": 48.0}
    assert estimate_cost({"available": True, "count": 1, "names": ["RTX"]})["hourly_rate"] == 2.0
    assert estimate_cost({"available": False}) is None


# -----------------------------------------------------------------------------
# Runs


def test_report_of_a_finished_run_alone(here):
    train(here)
    assert main([]) == 0
    text = written("report.md")
    for part in ("Status | finished after 20 steps", "1.5000 at step 20, lowest 1.5000", "| piqa | 0.6400 | 0.2800 |", "| copa | n/a | n/a |",
                 "**0.1234**", "| `transformer_matrices` | 3,000 | 60.0% |", "- depth: 4", "![Loss curves](report.png)", "Training time | 10.0 min",
                 "2.56 per scaling parameter", "Cost estimate | none", "| CORE            | 0.1234   |", "- PyTorch: "):
        assert part in text
    for folder in (here / "report", "."):
        assert {"report.md", "report.html", "report.png"} <= set(os.listdir(folder))
    assert open("report.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"


def test_report_of_a_run_still_going_on(here):
    path = train(here, steps=12, planned=20)
    with open(path, "ab") as f:
        f.write(b'{"kind": "tra')
    get_report().generate()
    text = written("report.md")
    assert "running: step 12 of 20 (60%), ETA 4.0 min; the last record is" in text
    assert "| CORE  " not in text and "finished" not in text


def test_a_silent_run_counts_as_stopped(here):
    path = train(here, steps=12, planned=20)
    os.utime(path, (1e9, 1e9))
    assert TrainingRun(path).status().startswith("stopped: step 12 of 20")


def test_a_resumed_run_is_running_again(here):
    path = train(here)
    log = RunLog(path, resume_step=21)  # the same run, prolonged
    log.log("start", 20, num_iterations=40)
    log.log("train", 20, loss=4.0, raw_loss=4.0, dt=30.0, tokens=11000, flops=1, time=630)
    assert TrainingRun(path).status().startswith("running: step 21 of 40")


@pytest.mark.slow
def test_every_beginning_of_a_run_has_a_report(here):
    path = train(here, steps=6, planned=6, grow_at=3)
    lines = path.read_bytes().splitlines(keepends=True)
    for end in range(1, len(lines) + 1):
        path.write_bytes(b"".join(lines[:end]))
        run = TrainingRun(path)
        assert "## Pretraining run d4" in run.markdown("")
        if end % 6 in (1, 3):
            assert len(run.picture()) > 1000


def test_growth_is_marked(here):
    run = TrainingRun(train(here, grow_at=10))
    text = run.markdown("")
    assert "### Growth" in text and "Why it ended" in text and "| 3.0000 |" in text
    without = TrainingRun(train(here))
    assert run.picture() != without.picture()


def test_the_first_stage_of_a_resumed_run_is_what_it_began_with(here):
    path = train(here, steps=12, grow_at=10)
    log = RunLog(path, resume_step=12)
    log.log("start", 12, counts={"total": 80000}, num_iterations=20)
    log.close()
    rows = TrainingRun(path).stages_table().splitlines()
    assert [line.split("|")[1].strip() for line in rows[2:]] == ["0", "1"] and rows[2].split("|")[3].strip() == "5,000"


@pytest.mark.parametrize("device, name, world_size, cost", [
    ("cuda:0", "NVIDIA H100 80GB HBM3", 8, "$4.00 (1.33 GPU-hours of training at $3.00)"), ("cpu", "cpu", 1, "none (no rented GPU)"), ("mps", "mps", 1, "none (no rented GPU)")])
def test_cost_of_a_run(here, device, name, world_size, cost):
    run = TrainingRun(train(here, device=device, device_name=name, world_size=world_size))
    assert run.cost() == cost and f"| Device | {world_size} × {name}, float32 |" in run.markdown("")


def test_the_newest_run_or_the_one_asked_for(here):
    for age, tag in enumerate(("d4", "d12", "d6")):
        os.utime(train(here, tag=tag), (1e9 - age, 1e9 - age))
    assert find_run_log(here).parent.name == "d4"
    assert main(["--model-tag=d12"]) == 0
    assert "## Pretraining run d12" in written("report.md")
    with pytest.raises(UsageError, match="d12, d4, d6"):
        find_run_log(here, "d7")


def test_runs_that_branch_off_each_other_have_a_report(here, monkeypatch):
    for tag, other in (("d4", "d6"), ("d6", "d4"), ("d8", "d8")):
        path = train(here, tag, branch_from=f"{other}@20")
        os.utime(path, (2e9 + int(tag[1:]), 2e9 + int(tag[1:])))
        looks = iter(range(10))  # not for ever
        monkeypatch.setattr(run_report, "TrainingRun", lambda path: [TrainingRun(path), next(looks)][0])
        assert find_run_log(here).parent.name in (tag, other)


def test_nothing_to_report_is_a_usage_error(here, capsys):
    assert main([]) == 2
    assert "nothing to report yet" in capsys.readouterr().err
    assert os.listdir() == []


def test_a_broken_log_is_named(here, capsys):
    path = train(here)
    path.write_bytes(b"broken\n" + path.read_bytes())
    assert main([]) == 2
    assert "line 1" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# Page


def test_the_page_loads_and_runs_nothing(here):
    train(here)
    get_report().log("Base model evaluation", [{"sample 0": NASTY, "sample 1": "two lines\n" + NASTY}, f"{NASTY}\n"])
    get_report().generate()
    page = Page(written("report.html"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'; img-src data:"}) in page.tags
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert not attributes.get("href", "").startswith("javascript:")
    embedded = [attributes["src"] for tag, attributes in page.tags if tag == "img" and attributes["src"].startswith("data:image/png;base64,")]
    assert len(embedded) == 2
    assert page.text.count("<script>alert(1)</script>") == 4
    assert "report.png" not in written("report.html")


@pytest.mark.slow
def test_the_page_fits_a_phone_and_the_dark(here):
    train(here)
    get_report().generate()
    html = written("report.html")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in Page(html).tags
    assert "prefers-color-scheme: dark" in html
    assert Page(html).text.index("Pretraining run d4") < Page(html).text.index("Environment")


@pytest.mark.parametrize("text", ["plain", "```", "````python\nx\n````", "~~~", ""])
def test_verbatim_text_cannot_leave_its_block(text):
    tokens = MarkdownIt("commonmark").parse(verbatim(text) + "\nafter")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    assert tokens[0].content == text + "\n"


def test_sections_and_runs_together(here):
    report = Report(here / "report")
    report.reset()
    report.log("Tokenizer training", [{"vocab_size": 4096}])
    train(here)
    path = report.generate()
    text = written(path)
    assert text.index("## Environment") < text.index("## Pretraining run d4") < text.index("## Tokenizer training") < text.index("## Summary")
    assert text.count("## Environment") == 1


def test_control_characters_are_shown(here):
    """They would make report.md a binary file to git and grep, and steer the terminal that shows it."""
    assert verbatim("a\tb\nc\x00\x1b[31m\rd") == "```text\na\tb\nc␀␛[31m␍d\n```\n"
    path = get_report().log("Samples", [{"sample": "\x1bc"}])
    assert "␛c" in open(path, encoding="utf-8").read()


def test_the_same_model_from_scratch_is_drawn_beside_a_grown_one(here):
    shape = {"sequence_len": 64, "vocab_size": 512, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32, "window_pattern": "L"}
    grown = TrainingRun(train(here, "grown", grow_at=10, model_config=shape))
    assert grown.axes == ("flops", "time") and grown.from_scratch() is None
    alone = grown.picture()
    train(here, "wider", model_config=shape | {"n_embd": 64})
    train(here, "unfinished", steps=10, model_config=shape)
    train(here, "branch", model_config=shape, branch_from="larger@15")
    assert grown.from_scratch() is None and grown.picture() == alone
    scratch = TrainingRun(train(here, "scratch", model_config=shape))
    assert grown.from_scratch().tag == "scratch"
    assert grown.picture() != alone
    assert scratch.axes == ("tokens", "time") and scratch.from_scratch() is None


def test_what_is_drawn_beside_is_of_the_same_text_and_of_about_as_many_flops(here):
    """The longest run ends lowest, and on other text any loss may be lower."""
    shape = {"sequence_len": 64, "vocab_size": 512, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32, "window_pattern": "L"}
    grown = TrainingRun(train(here, "grown", grow_at=10, model_config=shape))
    for tag, differs in (("text", {"data": "tinystories"}), ("words", {"tokenizer": "def"}), ("hidden", {"objective": "mlm"}), ("untold", {"data": None})):
        train(here, tag, model_config=shape, conditions=CONDITIONS | differs)
    assert grown.from_scratch() is None
    for tag, steps in (("longer", 40), ("near", 25), ("shorter", 5)):
        train(here, tag, steps=steps, planned=steps, model_config=shape)
    assert grown.from_scratch().tag == "near"
    assert TrainingRun(train(here, "silent", grow_at=10, model_config=shape, conditions=None)).from_scratch() is None


def test_branches_lie_within_the_picture(here, monkeypatch):
    """They go on where the trunk ended, some to lower losses, and some begin higher."""
    trunk = TrainingRun(train(here, "trunk", steps=100, planned=100))
    for tag, rise in (("longer", -1.5), ("higher", 0.5)):
        log = RunLog(here / "base_checkpoints" / tag / "log.jsonl")
        log.log("start", 50, config={"branch_from": "trunk@50"}, counts=COUNTS)
        for step in range(50, 350, 25):
            log.log("eval", step, val_bpb=2 + rise - (step - 50) / 1000, tokens=512 * step, flops=512 * 60000 * step, time=60 * step)
        log.close()
    figures = []
    monkeypatch.setattr(run_report, "as_png", lambda figure, panels: figures.append(figure) or figure.canvas.draw())
    trunk.picture()
    for panel in figures[0].axes[2:4]:
        (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
        for line in panel.lines:
            xs, ys = line.get_data()
            skipped = line.get_label() == "trunk"  # its first step falls out of sight
            assert left <= min(xs) and max(xs) <= right and bottom <= min(ys) and max(ys[skipped:]) <= top, line.get_label()
    assert len(panel.lines) == 3


def test_the_current_folder_need_not_take_a_copy(here, monkeypatch, capsys):
    train(here)
    atomic_path = report_module.atomic_path

    def refuse(path):
        if here not in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return atomic_path(path)

    monkeypatch.setattr(report_module, "atomic_path", refuse)
    assert main([]) == 0
    assert "No copy of the report in the current folder (Permission denied)" in capsys.readouterr().out and (here / "report" / "report.html").exists()


def test_where_no_report_can_be_written(base_dir):
    (base_dir / "report").write_text("a file")
    with pytest.raises(UsageError, match="cannot write to .*report"):
        get_report()
