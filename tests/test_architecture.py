"""Imports point down only: what each floor may import is held here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mnist_diffusion"

FLOORS = {
    "pipelines": 0,
    "config": 0,
    "data": 2,
    "model": 3,
    "objective": 3,
    "hub_errors": 1,
    "sampling": 2,
    "visualize": 2,
    "records": 2,
    "launch": 5,
    "evaluation": 3,
    "checkpoint": 3,
    "export": 3,
    "drawing": 5,
    "hub": 7,
    "figures": 2,
    "product": 4,
    "denoising": 4,
    "gallery": 7,
    "comparison": 8,
    "commands": 10,
    "distillation": 4,
    "folder": 4,
    "signals": 2,
    "together": 2,
    "learner": 4,
    "planning": 5,
    "run": 6,
    "resuming": 7,
    "summary": 7,
    "training": 8,
    "cli": 9,
    "train_cfg": 10,
    "distill_cfg": 10,
}


def _floor(module: str) -> int:
    return FLOORS[module.split(".")[1]]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "mnist_diffusion":
                found |= {f"mnist_diffusion.{alias.name}" for alias in node.names}
            elif node.module:
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("mnist_diffusion.") and not name.endswith(".__version__")}


MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down(path: Path) -> None:
    own = path.with_suffix("").parts[0]
    for imported in _imports(PACKAGE / path):
        same_folder = imported.split(".")[1] == own
        assert same_folder or _floor(imported) < FLOORS[own], (
            f"{own} (floor {FLOORS[own]}) imports {imported} (floor {_floor(imported)})"
        )


def test_every_module_has_a_floor() -> None:
    assert {path.with_suffix("").parts[0] for path in MODULES} == set(FLOORS)


def test_pipeline_file_stands_alone() -> None:
    assert not _imports(PACKAGE / "pipelines" / "pipeline_mnist_diffusion.py")


def test_root_links_lead_into_the_package() -> None:
    root = PACKAGE.parent
    assert (root / "pipelines").resolve() == PACKAGE / "pipelines"
    assert (root / "model_card.md").resolve() == PACKAGE / "model_card.md"
    assert (PACKAGE / "train_cfg.py").resolve() == root / "train_cfg.py"
