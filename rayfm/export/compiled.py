"""Native code of a model's architecture by AOTInductor: compiled once on a machine, filled with a version's weights.

The package depends on the model's config and code, its schema, torch and the processor, and on no weight. It lies in a
folder that the service alone may write, under a name that is the hash of all of these, and is compiled in a process of
its own: tracing holds Python's lock for seconds, which would stop the requests that the old version is answering.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import platform
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import rayfm.models.base
from rayfm.config import ConfigError
from rayfm.export.calibrator import Calibrator
from rayfm.export.config import CompileConfig
from rayfm.export.ports import DensePart, cut
from rayfm.export.served import ServedModel
from rayfm.models.base import MODELS, Model, ModelConfig
from rayfm.models.build import build_model
from rayfm.schema import Schema

SOURCES = tuple(Path(file).parent for file in (rayfm.models.base.__file__, __file__))
"""Folders of the code that is compiled, whatever the model."""
MOST_ROWS = 65_536
_LOADING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a package depends on, apart from the machine."""

    model: ModelConfig
    schema: Schema
    tasks: tuple[str, ...]
    calibrated: bool

    def text(self) -> str:
        """All of it as one line of JSON."""
        return json.dumps(
            {
                "model": self.model.dump(),
                "schema": self.schema.dump(),
                "tasks": list(self.tasks),
                "calibrated": self.calibrated,
            },
            sort_keys=True,
        )

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """What ``text`` gave."""
        found = json.loads(text)
        config = MODELS[found["model"]["type"]].Config.model_validate(found["model"])
        return cls(config, Schema.model_validate(found["schema"]), tuple(found["tasks"]), found["calibrated"])

    def digest(self) -> str:
        """Names the package: of the architecture, its code and torch's version, and the processor."""
        code = source_digest(MODELS[vars(self.model)["type"]])
        machine = (torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability())
        return hashlib.sha256("\x1f".join((self.text(), code, *machine)).encode()).hexdigest()[:32]

    def part(self) -> DensePart:
        """The part to compile, with weights that mean nothing."""
        model = build_model(self.model, self.schema, self.tasks, embedding_device=torch.device("meta"))
        calibrator = Calibrator(self.schema, self.tasks) if self.calibrated else None
        served = ServedModel(model, calibrator).requires_grad_(False).eval()
        return bf16(cut(served)[2])


@functools.cache
def source_digest(model: type[Model]) -> str:
    """Hash of the Python files that a model is compiled from.

    They are rayfm's models and exports, and for a model of another package all files below the folder of its module
    and of those of its bases (a module that is in no package: its file alone).
    """
    files = {file for folder in SOURCES for file in folder.rglob("*.py")}
    for part in model.__mro__:
        module = sys.modules.get(part.__module__)
        if issubclass(part, Model) and module is not None and module.__file__ is not None:
            file = Path(module.__file__)
            files |= set(file.parent.rglob("*.py")) if module.__package__ else {file}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def bf16(part: DensePart) -> DensePart:
    """The same part under bfloat16 autocast; the weights are shared."""
    return DensePart(part.served, part.ports, bf16=True).eval()


def cache_folder(configured: str | None) -> Path:
    """The folder of compiled code, made if it is not there.

    Raises:
        ConfigError: it cannot be made, or others than this user may write to it.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayfm" / "compiled"
    folder = Path(configured) if configured else default
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.lstat()
    except OSError as error:
        raise ConfigError(f"cache: {folder} cannot be used ({error.strerror}); name another folder") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise ConfigError(
            f"cache: {folder} holds code that the service runs, so it must be a folder of its own user, and nobody "
            "else may write to it; 'chmod 700' it, or name another"
        )
    return folder


def load_compiled(
    part: DensePart, architecture: Architecture, config: CompileConfig
) -> Callable[..., tuple[Tensor, ...]]:
    """``part`` as native code in bf16, with its own weights.

    Raises:
        ConfigError: the cache cannot be used.
        RuntimeError: it cannot be compiled, or does not finish within the limit.
    """
    package = package_path(architecture, config)
    if not package.exists():
        compile_package(architecture, package, config.compile_limit)
    from torch._inductor import aoti_load_package

    with _LOADING:
        loaded: Any = aoti_load_package(str(package))
    names = set(loaded.get_constant_fqns())
    values = {name: value.detach().contiguous() for name, value in bf16(part).state_dict().items() if name in names}
    if len(values) < len(names):
        raise RuntimeError(f"{package}: has constants that the model has not ({min(names - values.keys())!r})")
    # A full update: the package keeps copies of its own, and no value of another version stays.
    loaded.load_constants(values, check_full_update=True)

    def predict(*tensors: Tensor) -> tuple[Tensor, ...]:
        rows = int(tensors[0].shape[0])
        if rows > 1:
            return cast("tuple[Tensor, ...]", loaded(*(x.contiguous() for x in tensors)))
        # torch.export takes one row for a constant, so the package is of two or more.
        return tuple(x[:rows] for x in loaded(*(torch.cat([x, x]) for x in tensors)))

    return predict


def package_path(architecture: Architecture, config: CompileConfig) -> Path:
    """Where the package lies, whether or not it is there."""
    return cache_folder(config.cache) / f"{vars(architecture.model)['type']}-{architecture.digest()}.pt2"


def compile_package(architecture: Architecture, package: Path, limit_s: float) -> None:
    """Compile in another process; processes that want the same package wait for the first.

    Raises:
        RuntimeError: the compiler failed or took longer than ``limit_s`` seconds.
    """
    with _alone(package.with_suffix(".lock")):
        if package.exists():
            return
        environment = {
            **os.environ,
            # Inductor's own cache holds pickles: it stays in the folder that nobody else may write to.
            "TORCHINDUCTOR_CACHE_DIR": str(package.parent / "inductor"),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, "-m", "rayfm.export.compiled", str(package)]
        try:
            done = subprocess.run(
                command,
                input=architecture.text(),
                env=environment,
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"AOTInductor took longer than {limit_s:g} s; raise compile_limit") from None
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(f"AOTInductor failed: {said[-1] if said else f'exit code {done.returncode}'}")


def write_package(architecture: Architecture, package: Path) -> None:
    """Compile here; what ``compile_package`` runs in the other process.

    Raises:
        RuntimeError: a weight became a part of the code, so that another version could not replace it.
    """
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    part = architecture.part()
    examples = part.examples()
    rows = torch.export.Dim("rows", min=2, max=MOST_ROWS)
    with torch.no_grad():
        program = torch.export.export(part, examples, dynamic_shapes={"tensors": tuple({0: rows} for _ in examples)})
        temporary = package.with_name(f".{package.stem}-{os.getpid()}.pt2")
        try:
            # By default constants of up to 8 numbers, such as a bias, are written into the code.
            aoti_compile_and_package(
                program, package_path=str(temporary), inductor_configs={"always_keep_tensor_constants": True}
            )
            used = {
                spec.target
                for spec, node in zip(program.graph_signature.input_specs, _placeholders(program), strict=True)
                if spec.target is not None and node.users
            }
            loaded: Any = aoti_load_package(str(temporary))
            fixed = used - set(loaded.get_constant_fqns())
            if fixed:
                raise RuntimeError(f"weight {min(fixed)!r} became a part of the code")
            os.replace(temporary, package)
        finally:
            temporary.unlink(missing_ok=True)


def _placeholders(program: Any) -> list[Any]:
    return [node for node in program.graph.nodes if node.op == "placeholder"]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file lets the lock go


if __name__ == "__main__":
    os.nice(10)  # requests come first
    torch.set_num_threads(1)
    write_package(Architecture.parse(sys.stdin.read()), Path(sys.argv[1]))
