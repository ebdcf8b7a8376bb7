"""The repository root is the package: it installs under its name from any folder, and imports go downward only."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "compiler", "passes", "runtime")  # each may import itself and those before it


def sources(root: Path) -> list[Path]:
    return sorted(path for layer in LAYERS for path in (root / layer).rglob("*.py")) + sorted(root.glob("*.py"))


SOURCES = sources(ROOT)


def layer_of(path: Path) -> str:
    """The layer that a file belongs to; the root's own files stand above all."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else "root"


def imported_layers(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, layer or offending absolute module) of every import of the package's own modules."""
    here = ("regraft", *path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ("regraft", *LAYERS):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if (node.module or "").split(".")[0] in ("regraft", *LAYERS):
                yield node.lineno, node.module or ""
        elif isinstance(node, ast.ImportFrom):
            module = (*here[: -node.level], *(node.module or "").split("."))
            names = [module[1]] if len(module) > 1 and module[1] else [alias.name for alias in node.names]
            for name in names:
                yield node.lineno, name if name in LAYERS else "root"


def test_imports_go_downward() -> None:
    order = (*LAYERS, "root")
    wrong = []
    for path in SOURCES:
        own = layer_of(path)
        for line, target in imported_layers(path):
            if target not in order:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: absolute import of {target}")
            elif order.index(target) > order.index(own):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {target}")
    assert wrong == []


def test_import_check_sees_relative_imports() -> None:
    """Guards the guard: the top of the package imports the layer below it."""
    assert "runtime" in {target for _, target in imported_layers(ROOT / "__init__.py")}


@pytest.mark.parametrize("layer", LAYERS)
def test_package_init_imports_nothing(layer: str) -> None:
    assert (ROOT / layer / "__init__.py").read_text() == ""


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    on_disk = {
        ".".join(("regraft", *path.parent.relative_to(ROOT).parts))
        for layer in LAYERS
        for path in (ROOT / layer).rglob("__init__.py")
    }
    assert set(settings["tool"]["setuptools"]["packages"]) == {"regraft"} | on_disk


def test_files_are_short() -> None:
    long = {str(path.relative_to(ROOT)): n for path in SOURCES if (n := path.read_text().count("\n")) > 500}
    assert long == {}


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder without the caller's PYTHONPATH and return its standard output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_kernels_folder_does_not_disturb_transformers() -> None:
    """In the root, `import kernels` finds ours, not the HuggingFace package of that name, which transformers uses."""
    program = """
import kernels, torch, transformers
from transformers.utils import is_kernels_available
print(kernels.__file__)
config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=1)
print(tuple(transformers.AutoModelForCausalLM.from_config(config)(torch.tensor([[1, 2, 3]])).logits.shape))
print(is_kernels_available())
"""
    found, shape, available = run([sys.executable, "-c", program], ROOT).splitlines()
    assert Path(found) == ROOT / "kernels" / "__init__.py"
    assert shape == "(1, 3, 32)"
    assert available == "False"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree in a folder whose name is no identifier."""
    folder = tmp_path_factory.mktemp("layout") / "my-fork.of it"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__"))
    return folder


def build(hook: str, source: Path, target: Path) -> Path:
    """Build a wheel with setuptools' own hook (`build_wheel`, `build_editable`) and unpack it into target."""
    program = f"import setuptools.build_meta as b; b.{hook}({str(target.parent)!r})"
    run([sys.executable, "-c", program], source)
    (wheel,) = target.parent.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


# Imports the package from the folder given, whether or not the running Python has it installed in editable form.
WHERE = """
import site, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
sys.path.insert(0, sys.argv[1])
site.addsitedir(sys.argv[1])
import regraft
import regraft.kernels.rms_norm
print(regraft.__file__)
"""


def test_wheel_from_a_folder_of_another_name(clone: Path, tmp_path: Path) -> None:
    site = build("build_wheel", clone, tmp_path / "site")
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert {path.relative_to(clone).as_posix() for path in sources(clone)} == {
        name.removeprefix("regraft/") for name in files if name.endswith(".py")
    }
    assert "regraft/py.typed" in files
    data = {f"regraft/{path.relative_to(clone).as_posix()}" for path in clone.glob("kernels/tuning/*.json")}
    assert data <= files
    found = run([sys.executable, "-c", WHERE, str(site)], tmp_path).strip()
    assert Path(found) == site / "regraft" / "__init__.py"


def test_editable_from_a_folder_of_another_name(clone: Path, tmp_path: Path) -> None:
    site = build("build_editable", clone, tmp_path / "site")
    found = run([sys.executable, "-c", WHERE, str(site)], tmp_path).strip()
    assert Path(found) == clone / "__init__.py"
