"""Generates lesft/v1 from proto/. With --check it writes nothing and fails when they differ."""

import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = '"""Generated from proto/ by `make generate`. Do not edit."""\n'


def generate(into: Path) -> None:
    protos = sorted(str(path) for path in (ROOT / "proto").rglob("*.proto"))
    (into / "lesft/v1").mkdir(parents=True, exist_ok=True)
    scripts = Path(sys.executable).parent
    plugins = [
        f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    kinds = ("python", "grpc_python", "mypy", "mypy_grpc")
    outputs = [f"--{kind}_out={into}" for kind in kinds]
    includes = [f"-I{ROOT / 'proto'}", f"-I{resources.files('grpc_tools') / '_proto'}"]
    if protoc.main(["protoc", *plugins, *includes, *outputs, *protos]) != 0:
        raise SystemExit("protoc failed")
    (into / "lesft/v1/__init__.py").write_text(PACKAGE)


def main() -> None:
    if sys.argv[1:] != ["--check"]:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {p.name: p.read_text() for p in (Path(folder) / "lesft/v1").glob("*.py*")}
    committed = {p.name: p.read_text() for p in (ROOT / "lesft/v1").glob("*.py*")}
    drifted = sorted(name for name in fresh | committed if fresh.get(name) != committed.get(name))
    if drifted:
        raise SystemExit(f"lesft/v1 differs from proto/ ({', '.join(drifted)}): make generate")


if __name__ == "__main__":
    main()
