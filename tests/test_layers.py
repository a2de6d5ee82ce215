"""Imports in jaxft point down the layers only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxft

ROOT = Path(jaxft.__file__).parent
VERBS = ("train", "evaluate", "generate", "plan", "preview", "export", "report")
LAYERS = {
    **{f"jaxft.{verb}": 5 for verb in VERBS},
    "jaxft": 5,  # the Python API and its start, `python -m jaxft`
    "jaxft.learn": 4, "jaxft.evals": 4, "jaxft.reports": 4, "jaxft.previews": 4,
    "jaxft.plans": 4,
    "jaxft.weights": 3, "jaxft.data": 3, "jaxft.tiny": 3,
    "jaxft.models": 2,
    "jaxft.parallel": 1, "jaxft.models.ops": 1, "jaxft.analysis": 1,
    "jaxft.command_line": 0,
    "jaxft.config": 0, "jaxft.errors": 0, "jaxft.disk": 0, "jaxft.bounds": 0, "jaxft.chips": 0,
    "jaxft.models.arch": 0, "jaxft.models.families": 0,
}  # fmt: skip
NEVER = [("jaxft.data", "jaxft.models"), ("jaxft.tiny", "jaxft.models"), ("jaxft.learn", "jaxft.evals"),
         ("jaxft.evals", "jaxft.learn"), ("jaxft.data", "jaxft.weights"), ("jaxft.weights", "jaxft.data"),
         ("jaxft.reports", "jaxft.learn"), ("jaxft.reports", "jaxft.evals"),
         ("jaxft.previews", "jaxft.learn"), ("jaxft.previews", "jaxft.evals"), ("jaxft.reports", "jaxft.previews"),
         ("jaxft.plans", "jaxft.evals"), ("jaxft.learn", "jaxft.plans"), ("jaxft.reports", "jaxft.plans")]  # fmt: skip


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer(module: str) -> int | None:
    """The layer of the longest name in LAYERS that holds `module`; `jaxft` holds only itself and its start."""
    if module in ("jaxft", "jaxft.__main__"):
        return LAYERS["jaxft"]
    holders = [package for package in LAYERS if package != "jaxft" and within(module, package)]
    return LAYERS[max(holders, key=len)] if holders else None


def imports(source: str, *, top_level: bool = False) -> Iterator[str]:
    """What a module imports, anywhere in it or at its top level; `from a import b` counts as a.b."""
    tree = ast.parse(source)
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources() -> dict[str, str]:
    """Module name -> text."""
    files = {file: file.relative_to(ROOT.parent).with_suffix("").parts for file in sorted(ROOT.rglob("*.py"))}
    return {".".join(parts).removesuffix(".__init__"): file.read_text("utf-8") for file, parts in files.items()}


def faults(modules: dict[str, str]) -> list[str]:
    """Each import within jaxft that breaks a rule, as a sentence."""
    found = []
    for module, source in modules.items():
        if layer(module) is None:
            found.append(f"{module} has no layer; give it one in LAYERS")
            continue
        for name in imports(source):
            if not within(name, "jaxft"):
                continue
            target = name if name in modules else name.rpartition(".")[0]  # a module, or a name in one
            if target not in modules or layer(target) is None:
                found.append(f"{module} imports {name}, which is nowhere")
            elif layer(target) > layer(module):
                found.append(f"{module} (layer {layer(module)}) imports {target} (layer {layer(target)})")
            elif any(within(module, a) and within(target, b) for a, b in NEVER):
                found.append(f"{module} never imports {target}")
    return found


def test_imports_point_down():
    assert faults(sources()) == []


@pytest.mark.parametrize(
    ("module", "line", "shown"),
    [
        (
            "jaxft.models.ops",
            "from jaxft.models.decoder import Decoder",
            "(layer 1) imports jaxft.models.decoder (layer 2)",
        ),
        (
            "jaxft.weights.peft",
            "def f():\n    from jaxft.learn import step",
            "(layer 3) imports jaxft.learn.step (layer 4)",
        ),
        ("jaxft.data.rows", "import jaxft.models.arch", "jaxft.data.rows never imports jaxft.models.arch"),
        ("jaxft.learn.loop", "from jaxft.evals import decode", "jaxft.learn.loop never imports jaxft.evals.decode"),
        ("jaxft.config", "import jaxft", "(layer 0) imports jaxft (layer 5)"),
        ("jaxft.utils", "", "jaxft.utils has no layer"),
    ],
)
def test_an_import_that_points_up_is_found(module, line, shown):
    (fault,) = faults({**dict.fromkeys(sources(), ""), module: line})
    assert shown in fault


def test_the_lowest_layer_loads_with_the_standard_library_alone():
    for module, source in sources().items():
        if layer(module) == 0:
            roots = {name.partition(".")[0] for name in imports(source, top_level=True)} - {"jaxft"}
            assert roots <= sys.stdlib_module_names, module


def test_what_is_computed_from_plain_numbers_needs_no_jax():
    for module, source in sources().items():
        if within(module, "jaxft.analysis"):
            roots = {name.partition(".")[0] for name in imports(source)} - {"jaxft", "numpy", "scipy"}
            assert roots <= sys.stdlib_module_names, module


def test_torch_is_needed_nowhere():
    for module, source in sources().items():
        assert not {"torch", "peft"} & {name.partition(".")[0] for name in imports(source)}, module


@pytest.mark.parametrize("verb", ["report", "preview"])
def test_a_report_and_a_preview_need_no_jax(verb):
    modules = sources()
    pending, seen = [f"jaxft.{verb}"], set()
    while pending:
        module = pending.pop()
        seen.add(module)
        for name in imports(modules[module]):
            assert name.partition(".")[0] not in ("jax", "flax", "optax", "orbax"), (module, name)
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target not in seen:
                pending.append(target)
    script = f"import jaxft.{verb}, jaxft.config, sys; print([m for m in ('jax', 'torch', 'transformers') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
