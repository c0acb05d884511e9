"""What the compiler makes of a Triton launch for an architecture, found out without a GPU.

Registers, spills, shared memory and tensor-core instructions: what tests and `kernels/tune.py` go
by. Nothing is run, and nothing here is imported by what serves.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from kernels.launching import Call

__all__ = ["ARCHITECTURES", "Architecture", "Compiled", "compiled", "source"]

Architecture = Literal["sm_80", "sm_86", "sm_89", "sm_90"]
ARCHITECTURES: dict[Architecture, int] = {  # and the most bytes of shared memory a program may have
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
}
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
_WARP_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What one program of a compiled kernel needs, and what it computes with.

    Attributes:
        registers: of each thread.
        spilled_bytes: what each thread keeps in memory for lack of registers.
        shared_bytes: of the program.
        wgmma: how often a tensor-core instruction of a warp group is in the code (HGMMA, sm_90).
        mma: the same of a single warp (HMMA).
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int

    def fits(self, architecture: Architecture) -> bool:
        """Whether nothing is spilled and the shared memory is there."""
        return not self.spilled_bytes and self.shared_bytes <= ARCHITECTURES[architecture]


def compiled(kernel: Any, call: Call, architecture: Architecture) -> Compiled:
    """Compile the kernel as a launch on that architecture would, and read what came out.

    Raises:
        ValueError: the kernel is interpreted (TRITON_INTERPRET=1) and nothing would be compiled, or
            an argument is of a type that has no name here.
        RuntimeError: Triton came without cuobjdump or nvdisasm, or one of them failed.
    """
    if not isinstance(kernel, JITFunction):
        raise ValueError(f"{kernel} is not for a compiler; is TRITON_INTERPRET set?")
    options = {
        "num_warps": call.launch.num_warps,
        "num_stages": call.launch.num_stages,
        "enable_fp_fusion": True,
    }
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), _WARP_SIZE)
    binary = triton.compile(source(kernel, call), target=target, options=options)
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(binary.asm["cubin"])
        usage = _output("cuobjdump", "--dump-resource-usage", file)
        code = _output("nvdisasm", file)
    return Compiled(
        registers=_number("REG", usage),
        spilled_bytes=_number("STACK", usage),
        shared_bytes=binary.metadata.shared,
        wgmma=len(re.findall(r"\bHGMMA\b", code)),
        mma=len(re.findall(r"\bHMMA\b", code)),
    )


def source(kernel: Any, call: Call) -> Any:
    """Return what a launch would give the compiler: types, constants, which numbers 16 divides.

    It is Triton's `ASTSource`. Two launches whose sources have one `hash()` share a program, so the
    second of them compiles nothing.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(call.constants)
    attributes: dict[tuple[int], list[list[object]]] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = call.arguments[name]
        special = not parameter.do_not_specialize
        # As a launch does: nothing and one are constants.
        if value is None or (special and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type(value)
        if isinstance(value, Tensor) or (special and type(value) is int and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _type(value: Tensor | float) -> str:
    if isinstance(value, Tensor) and value.dtype in _TYPES:
        return f"*{_TYPES[value.dtype]}"
    if type(value) is int:
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if type(value) is float:
        return "fp32"
    raise ValueError(f"a launch cannot take {value!r}")


def _output(tool: Literal["cuobjdump", "nvdisasm"], *arguments: str | Path) -> str:
    try:
        path = getattr(knobs.nvidia, tool).path
        return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
    except RuntimeError as error:  # Triton's, if it finds none that runs
        raise RuntimeError(f"{tool} ships with Triton for Linux and is not here") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{tool} failed: {error.stderr.strip()}") from error


def _number(name: str, usage: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump says nothing of {name}: {usage.strip()}")
    return int(found[1])
