"""The wheel: whole, and usable outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of what git tracks, so that the checkout stays clean."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            path.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).exists():
            path.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = target.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_callback_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    expected = {f"sppo_lightning/callbacks/{path.name}" for path in (ROOT / "callbacks").glob("*.py")}
    package = ROOT / "sppo_lightning"
    for path in package.rglob("*.py"):
        relative = path.relative_to(package)
        expected.add(f"sppo_lightning/{relative.as_posix()}")
    expected.add("sppo_lightning/py.typed")
    page = package / "report" / "page"
    expected |= {
        f"sppo_lightning/{path.relative_to(package).as_posix()}" for path in page.rglob("*") if path.is_file()
    }
    shipped = [name for name in names if ".dist-info/" not in name]
    assert sorted(shipped) == sorted(expected)


def test_wheel_imports_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import sppo_lightning.callbacks as c, sppo_lightning as p; "
        "assert p.__file__.startswith(sys.argv[1]) and c.__file__.startswith(sys.argv[1]), c.__file__; "
        "from sppo_lightning.callbacks import DifficultyReestimation, PolicyExport; print('fine')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "fine\n", done.stderr
