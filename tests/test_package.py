"""The package as a whole: public names, lazy imports, no pickle, errors, the message without the extension."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tfb_ext

ROOT = Path(__file__).resolve().parents[1]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )


def test_every_public_name_is_there() -> None:
    assert set(dir(tfb_ext)) == set(tfb_ext.__all__)
    for name in tfb_ext.__all__:
        assert getattr(tfb_ext, name) is not None
    assert {"bayesianize", "load", "search_sigma", "predict", "encode", "Example", "evaluate"} <= set(tfb_ext.__all__)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "tfb_ext" / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imported = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(tfb_ext.__all__) - {"__version__"}


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'tfb_ext' has no attribute 'sigma'"):
        _ = tfb_ext.sigma


def test_version_is_the_projects() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == tfb_ext.__version__


def test_import_is_light() -> None:
    done = run("import sys, tfb_ext; print(sorted({'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_missing_extension_names_the_command() -> None:
    code = "import sys; sys.modules['tfb_ext._C'] = None\nimport tfb_ext\ntfb_ext.bayesianize"
    done = run(code)
    assert done.returncode != 0
    assert "ImportError" in done.stderr and "pip install --no-build-isolation -e ." in done.stderr


def test_errors_are_the_builtin_kinds_too() -> None:
    assert issubclass(tfb_ext.errors.UnsupportedModelError, tfb_ext.TFBError) and issubclass(
        tfb_ext.TFBError, Exception
    )
    assert issubclass(tfb_ext.errors.UnsupportedModelError, ValueError)
    assert issubclass(tfb_ext.errors.SamplingError, RuntimeError)
    assert issubclass(tfb_ext.errors.ConfigError, ValueError)


@pytest.mark.slow
def test_no_pickle_and_no_global_generator() -> None:
    """Files are safetensors and JSON; what torch draws comes from a generator of its own, or from a fork of the global one."""
    forbidden = {"pickle", "torch.save", "torch.load", "torch.normal"}
    for path in (ROOT / "tfb_ext").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        used = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute | ast.Name)}
        assert not used & forbidden, path
        assert "torch.manual_seed" not in used or "torch.random.fork_rng" in used, path
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            if ast.unparse(call.func) in {"torch.rand", "torch.randn", "torch.randint", "torch.randperm"}:
                assert "generator" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"
