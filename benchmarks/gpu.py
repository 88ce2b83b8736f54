"""``python -m benchmarks.gpu``: what rayfm uses of a GPU, measured with what is installed there.

Each part prints its figures, or why it was not run; without a GPU that is every part, and the exit code is 0 all the
same. An error inside a part is its reason too, and makes the exit code 1. ``--save`` keeps the figures under
``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.saved import save

Figures = dict[str, dict[str, float]]

TRAINING = ("torchrec", "fbgemm_gpu")
"""Without these rayfm does not train."""


@dataclass(frozen=True)
class Part:
    """One measurement."""

    name: str
    what: str
    needs: tuple[str, ...]
    """Packages besides torch."""
    gpus: int
    measure: Callable[[Any], Figures]
    """Given the device."""


def _dense(device: Any) -> Figures:
    from benchmarks.gpu_parts import dense

    return dense(device, rows=16_384, width=1024, repeats=20)


def _copies(device: Any) -> Figures:
    from benchmarks.gpu_parts import copies

    return copies(device, megabytes=256, repeats=20)


def _overlap(device: Any) -> Figures:
    from benchmarks.gpu_parts import overlapped

    return overlapped(device, rows=16_384, width=1024, steps=20, repeats=5)


def _steps(device: Any) -> Figures:
    from benchmarks.gpu_training import steps

    return steps(device, rows=16_384, count=40)


def _memories(device: Any) -> Figures:
    from benchmarks.gpu_training import memories

    return memories(device, rows=16_384, count=40, table_rows=2_000_000)


def _exchange(device: Any) -> Figures:
    import torch

    from benchmarks.gpu_training import exchange

    return exchange(device.type, torch.cuda.device_count(), rows=16_384, count=40)


PARTS = (
    Part("dense", "cross network and MLP of a DCNv2, forward and backward", (), 1, _dense),
    Part("copies", "host to device, from pageable and from page-locked memory", (), 1, _copies),
    Part("overlap", "copy and compute: one after the other, and through rayfm's feed", (), 1, _overlap),
    Part("steps", "DCNv2, 26 tables: steps one by one, and through TrainPipelineSparseDist", TRAINING, 1, _steps),
    Part(
        "memory",
        "the same, tables in the GPU's memory, in the host's, in the host's with a cache",
        TRAINING,
        1,
        _memories,
    ),
    Part("exchange", "the steps on all GPUs of the machine, ids and rows exchanged over NCCL", TRAINING, 2, _exchange),
)


def missing(part: Part, gpus: int) -> str | None:
    """Why a part cannot be run here; None where it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if not gpus:
        return "torch sees no CUDA device"
    if gpus < part.gpus:
        return f"it needs {part.gpus} GPUs, and there is {gpus}"
    absent = [name for name in part.needs if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def machine() -> dict[str, Any]:
    """What is there: versions and GPUs."""
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in ("torch", "torchrec", "fbgemm_gpu"):
        if importlib.util.find_spec(name) is not None:
            module = importlib.import_module(name)
            found[name] = str(getattr(module, "__version__", "?"))
    if "torch" in found:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(count)]
    return found


def rows(figures: Figures) -> Iterable[str]:
    """A part's figures, a line each."""
    for name, values in figures.items():
        yield f"  {name:<20}" + "".join(f" {value:>14,.4g} {unit}" for unit, value in values.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    names = [part.name for part in PARTS]
    parser.add_argument("--only", metavar="PART", nargs="+", choices=names, help=f"of {', '.join(names)}")
    parser.add_argument("--save", action="store_true", help="keep the figures under benchmarks/results/")
    asked = parser.parse_args(arguments)
    here = machine()
    gpus = len(here.get("gpus", ()))
    print(", ".join(f"{name} {value}" for name, value in here.items() if name != "gpus"))
    print("GPUs: " + (", ".join(here.get("gpus", ())) or "none"))
    found: dict[str, Any] = {}
    failed = False
    for part in PARTS:
        if asked.only and part.name not in asked.only:
            continue
        print(f"{part.name}: {part.what}")
        reason = missing(part, gpus)
        if reason is None:
            try:
                import torch

                found[part.name] = part.measure(torch.device("cuda", 0))
                print("\n".join(rows(found[part.name])), flush=True)
                continue
            except ImportError as error:
                reason = str(error)
            except Exception as error:  # whatever it is, the other parts are still worth running
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                failed = True
        found[part.name] = {"not run": reason}
        print(f"  not run: {reason}", flush=True)
    if asked.save:
        save("gpu", {"installed": here, "parts": found})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
