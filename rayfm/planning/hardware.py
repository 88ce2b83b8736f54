"""What a device and its links can do, by vendors' published figures, and what share of that training is assumed to get.

Units: GB and GB/s are 1e9 bytes, TFLOP/s 1e12 operations a second. Links are given in one direction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rayfm.config import Config, ConfigError, apply_override, nearest, read_yaml, validate

Precision = Literal["fp32", "tf32", "bf16"]


class Hardware(Config):
    """One kind of device in one kind of node."""

    device: Literal["cuda", "cpu"] = "cuda"
    bf16_tflops: float = Field(gt=0)
    """Peak of dense bfloat16 matrix products (without 2:4 sparsity)."""
    tf32_tflops: float = Field(gt=0)
    """Peak of dense TF32 matrix products."""
    fp32_tflops: float = Field(gt=0)
    """Peak of float32 arithmetic outside of tensor cores, which is torch's default for float32 matrix products."""
    memory_gb: float = Field(gt=0)
    memory_gbs: float = Field(gt=0)
    """Bandwidth of the device's memory."""
    nvlink_gbs: float = Field(gt=0)
    """Of a device to the others of its node, one direction."""
    network_gbs: float = Field(gt=0)
    """Of a device to other nodes, one direction: its own network card."""
    host_gbs: float = Field(gt=0)
    """From host memory to the device (PCIe), one direction."""
    host_memory_gb: float = Field(2000.0, gt=0)
    """Memory of a node's host, shared by its devices. DGX A100, H100, H200 and B200 have 2 TB (their user guides)."""
    source: str
    """Where the figures are from."""

    compute_efficiency: float = Field(0.4, gt=0, le=1)
    """Share of the peak that matrix products get. An assumption."""
    memory_efficiency: float = Field(0.6, gt=0, le=1)
    """Share of the memory's bandwidth that look-ups, optimisers and elementwise operations get. An assumption."""
    link_efficiency: float = Field(0.7, gt=0, le=1)
    """Share of a link's bandwidth that collectives and copies get. An assumption."""
    operator_us: float = Field(5.0, ge=0)
    """Microseconds that starting an operator costs, each. An assumption."""
    hop_us: float = Field(10.0, ge=0)
    """Microseconds a collective needs beside its bytes, times log2 of the ranks. An assumption."""
    id_skew: float = Field(0.8, ge=0, lt=1)
    """Exponent of the power law (Zipf) that ids are taken to follow, for what a cache of rows hits: 0 is all alike. An
    assumption, and of the data rather than of the hardware."""
    reserved: float = Field(0.15, ge=0, lt=1)
    """Share of the memory that is not planned with: the driver, NCCL's buffers, fragmentation. TorchRec's default."""

    def peak_flops(self, precision: Precision) -> float:
        """Operations a second of matrix products at a precision."""
        return 1e12 * {"bf16": self.bf16_tflops, "tf32": self.tf32_tflops, "fp32": self.fp32_tflops}[precision]


HARDWARE: dict[str, dict[str, Any]] = {
    "a100": {
        "bf16_tflops": 312,
        "tf32_tflops": 156,
        "fp32_tflops": 19.5,
        "memory_gb": 80,
        "memory_gbs": 2039,
        "nvlink_gbs": 300,
        "network_gbs": 25,
        "host_gbs": 32,
        "source": "NVIDIA A100 80GB SXM datasheet; DGX A100 user guide (8 x 200 Gb/s)",
    },
    "h100": {
        "bf16_tflops": 989,
        "tf32_tflops": 494,
        "fp32_tflops": 67,
        "memory_gb": 80,
        "memory_gbs": 3350,
        "nvlink_gbs": 450,
        "network_gbs": 50,
        "host_gbs": 64,
        "source": "NVIDIA H100 SXM datasheet; DGX H100 user guide (8 x 400 Gb/s)",
    },
    "h200": {
        "bf16_tflops": 989,
        "tf32_tflops": 494,
        "fp32_tflops": 67,
        "memory_gb": 141,
        "memory_gbs": 4800,
        "nvlink_gbs": 450,
        "network_gbs": 50,
        "host_gbs": 64,
        "source": "NVIDIA H200 SXM datasheet; DGX H200 user guide (8 x 400 Gb/s)",
    },
    "b200": {
        "bf16_tflops": 2250,
        "tf32_tflops": 1100,
        "fp32_tflops": 75,
        "memory_gb": 180,
        "memory_gbs": 8000,
        "nvlink_gbs": 900,
        "network_gbs": 50,
        "host_gbs": 64,
        "source": "NVIDIA Blackwell datasheet (HGX B200); DGX B200 user guide (8 x 400 Gb/s)",
    },
}
"""Datasheets give NVLink and PCIe as the sum of both directions, and peaks with sparsity: each is halved here."""


def load_hardware(name: str, file: Path | None = None, overrides: list[str] | None = None) -> Hardware:
    """A device of the table or of a YAML file, with single figures changed.

    Args:
        name: ``h100``.
        file: a mapping of names to figures; one with ``base: h100`` states only what differs.
        overrides: ``network_gbs=25``.

    Raises:
        ConfigError: no such device, or a figure that cannot be.
    """
    own = read_yaml(file) if file is not None else {}
    known = sorted({*HARDWARE, *own})
    if name not in known:
        if name == "cpu":
            raise ConfigError(
                "--gpu cpu has no published figures: measure this machine's with `python -m benchmarks.plan --write "
                "cpu.yaml`, and pass --hardware cpu.yaml"
            )
        raise ConfigError(f"--gpu {name!r} is not known{nearest(name, known)}; there are {', '.join(known)}")
    figures: Any = own.get(name, HARDWARE.get(name))
    if not isinstance(figures, dict):
        raise ConfigError(f"{file}: {name!r} is not a mapping of figures")
    figures = dict(figures)
    base = figures.pop("base", None)
    if base is not None:
        if base not in HARDWARE:
            raise ConfigError(f"{file}: base {base!r} of {name!r} is not known{nearest(str(base), list(HARDWARE))}")
        figures = {**HARDWARE[base], "source": f"{base}, changed in {file}", **figures}
    for assignment in overrides or []:
        apply_override(figures, assignment)
    return validate(Hardware, figures, f"hardware {name!r}")
