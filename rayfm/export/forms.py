"""The forms that the part of a model behind its look-ups can run in: each a function from tensors to predictions.

Nothing is read from a snapshot but tensors: a frozen TorchScript archive holds pickled code and an AOTInductor package
native code, so neither is ever stored with a model. TorchScript and int8 are made in memory where the model is served,
in a fraction of a second. AOTInductor needs a compiler and many seconds; its package depends on the architecture
alone, so it is compiled once (`rayfm.export.compiled`) and every later version of the model loads its weights into it.
"""

from __future__ import annotations

import copy
import logging
import shutil
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from rayfm.config import ConfigError
from rayfm.export.compiled import Architecture, load_compiled
from rayfm.export.config import CompileConfig, Form
from rayfm.export.ports import DensePart

log = logging.getLogger(__name__)

Predict = Callable[..., tuple[Tensor, ...]]
"""The ports' tensors (of at least one row) to a tensor ``[B]`` a task."""

INT8_WIDTH = 8
"""Narrower linear layers stay in fp32: a task's logit costs next to nothing and shows every rounding."""


def available_forms(config: CompileConfig) -> tuple[Form, ...]:
    """The forms that this machine can try, those that compute in fp32 first; the one that the config names, if any.

    Raises:
        ConfigError: the named form cannot be made here.
    """
    lacks = _lacks()
    if config.compile != "auto":
        if config.compile in lacks:
            raise ConfigError(f"compile: {config.compile} {lacks[config.compile]}")
        return (config.compile,)
    forms: tuple[Form, ...] = ("eager", "torchscript", "int8")
    if config.native:
        if "aot_bf16" in lacks:
            log.warning("compile.native: aot_bf16 %s", lacks["aot_bf16"])
        forms = (*forms, "aot_bf16")
    return tuple(form for form in forms if form not in lacks)


def _lacks() -> dict[str, str]:
    """Form -> why it cannot be made here, and what to do."""
    lacks = {}
    if compiler() is None:
        lacks["aot_bf16"] = "needs a C++ compiler, and there is no g++ or clang++; install g++, or name another form"
    if torch.backends.quantized.engine == "none":
        lacks["int8"] = "needs a quantized engine, which this build of torch has not; take 'auto'"
    return lacks


def compiler() -> str | None:
    """The C++ compiler that AOTInductor would call; None where there is none."""
    return shutil.which("g++") or shutil.which("clang++")


def make_form(form: Form, part: DensePart, architecture: Architecture, config: CompileConfig) -> Predict:
    """``part`` in one form.

    Raises:
        ConfigError: the folder of compiled code cannot be used.
        RuntimeError: torch cannot trace or compile the model.
    """
    if form == "eager":
        return cast(Predict, part)
    if form == "torchscript":
        return scripted(part)
    if form == "int8":
        return scripted(quantized(part))
    return load_compiled(part, architecture, config)


def scripted(part: nn.Module) -> Predict:
    """Traced with its weights frozen in, for any number of rows."""
    examples: Any = part.examples() if isinstance(part, DensePart) else None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # constants that a trace rightly takes for constants, and deprecations
        traced = torch.jit.trace(part.eval(), examples, check_trace=False)
        return cast(Predict, torch.jit.freeze(traced))


def quantized(part: DensePart) -> DensePart:
    """A copy whose linear layers multiply in int8 (weights once, inputs at every call by their range in the batch).

    A row's prediction so depends a little on the rows that are scored with it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated in favour of torchao, another package
        wide = {
            name: torch.ao.quantization.default_dynamic_qconfig
            for name, module in part.named_modules()
            if isinstance(module, nn.Linear) and min(module.in_features, module.out_features) >= INT8_WIDTH
        }
        return cast(DensePart, torch.ao.quantization.quantize_dynamic(copy.deepcopy(part), wide, dtype=torch.qint8))
