"""The package as a whole: what is public, what an import costs, and which way imports go."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import autobatch
from autobatch import store
from autobatch.cli import _build_parser
from autobatch.options import ProbeOptions

PACKAGE = Path(autobatch.__file__).parent
ROOT = PACKAGE.parent
HEAVY = {"torch", "pynvml", "rich", "numpy", "sqlalchemy", "alembic"}

PUBLIC = [
    "Accumulator",
    "Alternative",
    "AutobatchError",
    "Bound",
    "BuiltinWorkload",
    "BusyError",
    "Candidate",
    "Card",
    "Cause",
    "DeviceFacts",
    "EmulatorError",
    "EquivalenceReport",
    "Evidence",
    "LengthEntry",
    "LengthTable",
    "MemoryBreakdown",
    "MemoryEvent",
    "NoGpuError",
    "Noted",
    "NothingFitsError",
    "Outcome",
    "Placement",
    "PlacementTable",
    "Plan",
    "PlanBatchSampler",
    "PlanError",
    "Presence",
    "PresentCard",
    "ProbeEvent",
    "ProbeOptions",
    "Report",
    "SizeFailure",
    "Snapshot",
    "StoredAnswer",
    "TrainingJob",
    "Trial",
    "TrialEnded",
    "TrialStarted",
    "UnavailableError",
    "UsageError",
    "Verdict",
    "WindowResult",
    "WorkloadError",
    "WorkloadName",
    "__version__",
    "builtin_workloads",
    "check_equivalence",
    "check_plot_path",
    "draw_placements",
    "draw_report",
    "draw_throughput",
    "find_card",
    "find_presence",
    "from_json_form",
    "load_catalogue",
    "make_plan",
    "make_rank_plan",
    "placement_key",
    "placements",
    "plan_from_env",
    "plan_variables",
    "probe",
    "probe_command",
    "probe_lengths",
    "probe_workload",
    "remember_out_of_memory",
    "render_page",
    "report_svg",
    "state_hash",
    "throughput_svg",
    "to_json_form",
    "write_page",
]

# Floors from the ground up; a module may import its own floor and those below. Where two names fit, the longer counts.
FLOORS: list[tuple[str, ...]] = [
    (
        "_version",
        "errors",
        "units",
        "trial",
        "breakdown",
        "jsonform",
        "plan",
        "rankplan",
        "options",
        "report",
        "lengths",
        "facts",
        "search",
        "throughput",
        "evidence",
        "known",
        "placement",
        "variables",
    ),
    ("store",),
    ("gpu", "emulator"),
    ("workload",),
    ("snapshot",),
    ("training",),
    (
        "probing",
        "emulation",
        "isolation",
        "worker",
        "lastwords",
        "library",
        "ranks",
        "command",
        "child_probe",
        "alternatives",
        "ranking",
        "handover",
        "doctor",
        "cache",
    ),
    ("present", "client", "reporting", "placing", "cli", "integrations", "__init__", "__main__"),
]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def floor_of(module: str) -> int:
    head = module.split(".", maxsplit=1)[0]
    found = [index for index, names in enumerate(FLOORS) if head in names]
    assert found, f"{module} stands on no floor: give it one in FLOORS"
    return found[0]


def imports(tree: ast.AST) -> set[str]:
    """Every module of ours that is imported anywhere but for types alone."""
    found: set[str] = set()
    for node in _run_time_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "autobatch")
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name.removeprefix("autobatch.") for name in found if name.startswith("autobatch.")}


def _run_time_nodes(tree: ast.AST) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        nodes += [child, *_run_time_nodes(child)]
    return nodes


def module_level_imports(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_the_public_names_are_frozen() -> None:
    """What is public is a promise: a change to it is made here, on purpose."""
    assert autobatch.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC
    assert dir(autobatch) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_imported(name: str) -> None:
    """A name in `__all__` that its module does not have would fail for the first user only."""
    assert getattr(autobatch, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Names are looked up lazily: what is not there says so as for any module."""
    with pytest.raises(AttributeError, match="no attribute 'prob'"):
        _ = autobatch.prob


@pytest.mark.parametrize(
    "code",
    [
        "import autobatch",
        "from autobatch import ProbeOptions, make_plan, Report",
        "from autobatch.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from autobatch.cli import main\ntry: main(['probe', '--help'])\nexcept SystemExit: pass",
        "from autobatch.cli import main\nmain(['plan', '--target', '8', '--max-micro-batch', '2', '--format', 'json'])",
    ],
)
def test_light_uses_import_nothing_heavy(code: str) -> None:
    """The import, the help and the arithmetic load neither torch nor NVML's bindings nor rich."""
    script = f"{code}\nimport sys\nprint('LOADED', *({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.splitlines()[-1] == "LOADED"


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_no_module_imports_anything_heavy_at_its_top(path: Path) -> None:
    """torch, pynvml, rich and numpy are imported where they are used; SQLAlchemy in the store, which is imported so itself."""
    allowed = {"sqlalchemy", "alembic"} if dotted(path).startswith(("store.", "cache.remembered")) else set()
    assert not module_level_imports(ast.parse(path.read_text())) & HEAVY - allowed


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_go_downwards_only(path: Path) -> None:
    """Pure, gpu, workloads, probe, faces: no module knows one of a floor above its own."""
    own = dotted(path)
    if own == "__init__":
        return  # the package's face names everything, by name and on demand
    too_high = {name for name in imports(ast.parse(path.read_text())) if floor_of(name) > floor_of(own)}
    assert not too_high


def test_the_walk_sees_an_import_within_a_function() -> None:
    """The walk above would pass anything if it looked at the top of modules only."""
    source = "if TYPE_CHECKING:\n    import autobatch.cli\ndef f():\n    from autobatch.probing import x\n"
    assert imports(ast.parse(source)) == {"probing"}
    assert module_level_imports(ast.parse("import torch.nn\nfrom rich import box")) == {"torch", "rich"}


def test_every_option_is_a_flag_of_probe() -> None:
    """`ProbeOptions` is the one list of knobs: the command line has each, by its name, and no other but its own."""
    probe = next(action.choices for action in _build_parser()._actions if isinstance(action.choices, dict))["probe"]
    flags = {flag for flag in probe.flags() if flag.startswith("--")}
    fields = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(ProbeOptions)}
    of_faces = {"--plan-file", "--plot", "--plot-throughput", "--chart", "--report", "--breakdown", "--what-if"}
    of_faces |= {"--report-to", "--report-as", "--set", "--sizes", "--cache", "--no-cache"}
    assert flags - {"--help", "--format", "--verbose"} - of_faces == fields


def test_the_package_says_that_it_is_typed() -> None:
    """Without the marker file type checkers ignore every annotation."""
    assert (PACKAGE / "py.typed").is_file()


SERVICE = ROOT / "server" / "autobatch_server"


@pytest.mark.parametrize("path", sorted(SERVICE.rglob("*.py")), ids=lambda path: str(path.relative_to(SERVICE)))
def test_the_service_uses_public_names_only(path: Path) -> None:
    """The service stands on the library as anyone else's would; starting the command line is all that it does beside."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.split(".")[0] == "autobatch"]
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "autobatch":
            continue
        if path.name == "__main__.py":
            assert node.module == "autobatch.cli"
        else:
            public = {"autobatch": PUBLIC, "autobatch.store": store.__all__}
            assert node.module in public
            assert {alias.name for alias in node.names} <= set(public[node.module])
