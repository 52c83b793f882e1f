"""The structure that docs/architecture.md promises."""
from dev.draw_imports import FOLDERS, imports, modules, rows

ALL = [*FOLDERS, "analysis"]


def test_imports_point_down():
    """No circles; nobody knows a script but the studies, which nobody knows, and what others stand on knows nothing of growth."""
    graph = imports(ALL)
    rows(graph)  # raises at a circle
    assert not [(name, other) for name, others in graph.items() for other in others if not name.startswith("analysis.") and other.startswith(("scripts.", "analysis."))]
    for name in ("nanochat.train_loop", "nanochat.gpt", "nanochat.optim", "nanochat.checkpoint_manager", "nanochat.objectives", "nanochat.schedules"):
        assert not any(other.startswith("nanochat.growth") for other in graph[name]), name


def test_no_file_is_too_long_to_read():
    assert {name: lines for name, path in modules(ALL).items() if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 450} == {}
