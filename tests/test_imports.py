"""Imports point one way, and what answers before torch is imported does not import it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    "train_network",
    *(f"{name}_train_network" for name in ("anima", "sdxl", "sd3", "lumina")),
    *(f"{name}_minimal_inference" for name in ("anima", "sd", "sdxl", "sd3", "lumina")),
)
FORBIDDEN = {
    "library/**/*.py": (*SCRIPTS, "networks"),
    "networks/*.py": SCRIPTS,
    "library/anima/*.py": ("library.options", "library.training", "library.sampling"),
    "library/sd/*.py": ("library.options", "library.sampling"),
    "library/sdxl/*.py": ("library.options", "library.sampling"),
    "library/dataset/**/*.py": ("library.anima", "library.training", "library.sampling"),
    "library/nn/*.py": ("library.anima", "library.dataset", "library.training", "library.options", "library.sampling"),
    "library/memory/*.py": ("library.anima", "library.dataset", "library.training", "library.options", "library.sampling"),
    "library/files/*.py": (
        "library.nn",
        "library.anima",
        "library.dataset",
        "library.training",
        "library.options",
        "library.sampling",
    ),
    "library/options/*.py": ("library.nn", "library.anima", "library.dataset", "library.training", "library.sampling"),
}
MODEL_FILES = ("denoiser", "adapter", "vae", "text", "sampling", "checkpoint")  # of an architecture: no dataset, no options


def imported_names(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_imports_point_down(pattern):
    paths = list(ROOT.glob(pattern))
    assert paths
    bad = [f"{p.relative_to(ROOT)}: {n}" for p in paths for n in imported_names(p) if n.startswith(FORBIDDEN[pattern])]
    assert not bad, bad


def test_models_do_not_know_the_dataset():
    paths = [
        p
        for p in ROOT.glob("library/*/*.py")
        if p.stem in MODEL_FILES and p.parent.name not in ("dataset", "sampling", "training")
    ]
    assert paths
    bad = [f"{p.relative_to(ROOT)}: {n}" for p in paths for n in imported_names(p) if n.startswith("library.dataset")]
    assert not bad, bad


@pytest.mark.parametrize(
    "module",
    [
        "library.options.anima",
        "library.training.preflight",
        "library.anima.architecture",
        "library.lumina.architecture",
        "library.lumina.reference_caches",
        "library.sampling.sd_inference_checks",
        "library.dataset.caches.latent_cache",
        "library.dataset.caches.text_cache",
        "library.dataset.token_use",
        "library.dataset.caches.reference_caches",
        "library.anima.reference_caches",
        "library.training.cache_job",
        "tools.cache_tool",
    ],
)
def test_what_checks_a_run_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
