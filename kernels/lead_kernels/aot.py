"""Compile every kernel for real GPUs, on a machine without one, and print the resources that each takes.

    python -m lead_kernels.aot [--target sm_90 ...] [--jobs 2] [--sizes-of-one]

Each module of the package that launches kernels lists its configurations in `builds()`. Every one is compiled twice, as
Triton does at run time: with pointers and sizes that are multiples of 16, which allows vector loads and asynchronous
copies, and with none that is, except where the type in the signature ends in ":16" (as for triton.tools.compile): what
the launch makes sure of. With --sizes-of-one they are compiled as Triton does where every size is 1.

Fails (exit status 1, the lines repeated at the end) where a kernel does not compile, spills registers, needs more
shared memory than the target gives one program, or has more instructions an element than it may. What counts as a
spill: on NVIDIA the bytes of spill stores and loads that ptxas itself reports; a stack frame alone is none (libdevice's
float64 sine has one of 40 bytes and spills nothing). On AMD spilled vector registers, scalar ones, which go to lanes of
vector registers, and bytes of scratch memory.

Instructions an element ("instr"): those of a kernel's innermost loops on an NVIDIA GPU, disassembled, over the elements
that a thread takes in one turn of them; for kernels that state how many these are. A warp's scheduler issues one
instruction a clock: this says whether a kernel waits for memory. Where ptxas unrolled a loop, its elements are those of
all copies; it is the loop's counter that tells how many. For sm_90, aligned, there may be a limit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import lead_kernels
from lead_kernels.backend import KernelBuild, warps
from lead_kernels.compiled_code import elements, innermost_loops, usage_on_cuda, usage_on_hip

ALIGNED = ":16"
MATRIX_INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync", "v_mfma")
MAX_TENSOR_MEMORY = 512
"""Columns that a program may allocate on sm_100."""


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and the shared memory (AMD: LDS) that it gives one program."""

    backend: str
    arch: int | str
    wave: int
    shared_limit: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}
"""Limits: CUDA C++ Programming Guide, table of technical specifications; AMD CDNA3 ISA, section 2.2."""


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs."""

    registers: int
    spills: int
    """NVIDIA: bytes of spill stores and loads; AMD: spilled registers and bytes of scratch."""
    stack: int
    """Bytes of a thread's stack frame."""
    shared: int
    tensor_memory: int
    matrix: str
    """The matrix instruction in the code, "-" without one."""
    instructions: float | None = None
    """Of the innermost loops, an element; None: not counted."""


@dataclass(frozen=True)
class Result:
    build: str
    target: str
    num_warps: int
    aligned: bool
    usage: Usage | None
    error: str | None

    def line(self) -> str:
        head = f"{self.build:<58} {self.target:<7} {16 if self.aligned else 1:>5} {self.num_warps:>5}"
        if self.usage is None:
            return f"{head}  {self.error}"
        u, limit = self.usage, TARGETS[self.target].shared_limit
        instructions = "-" if u.instructions is None else f"{u.instructions:.1f}"
        counts = f"{u.registers:>9} {u.spills:>6} {u.stack:>5} {u.shared:>7} / {limit:<6} {instructions:>5}"
        return f"{head} {counts} {u.matrix:<11} {self.error or ''}".rstrip()


HEADER = f"{'kernel':<58} {'target':<7} align warps registers spills stack {'shared':>7} / limit  instr matrix"


def all_builds() -> list[KernelBuild]:
    """The builds of every module of the package, each name led by its module's."""
    builds: list[KernelBuild] = []
    for module in pkgutil.iter_modules(lead_kernels.__path__):
        if module.name in ("aot", "backend"):
            continue
        imported = importlib.import_module(f"lead_kernels.{module.name}")
        if hasattr(imported, "builds"):
            builds += imported.builds()
    return builds


def with_sizes_of_one(builds: Sequence[KernelBuild]) -> list[KernelBuild]:
    """The builds as Triton compiles them where every size is 1: an integer argument of 1 is a constant to it.

    Such a constant is no tensor: `size.to(tl.int64)`, say, does not compile. Arguments that the kernel keeps from being
    specialised stay as they are, as do those that the launch makes multiples of 16; builds without others are left out.
    """
    found = []
    for build in builds:
        fixed = {parameter.name for parameter in build.kernel.params if parameter.do_not_specialize}
        ones = [name for name, kind in build.signature.items() if re.fullmatch(r"[iu]\d+", kind) and name not in fixed]
        if ones:
            signature = dict(build.signature)
            for name, kind in build.signature.items():
                if kind[0] == "*" and ALIGNED not in kind:
                    signature[name] = f"{kind}{ALIGNED}"
            signature |= dict.fromkeys(ones, "constexpr")
            constants = dict(build.constants) | dict.fromkeys(ones, 1)
            found.append(
                replace(build, name=f"{build.name}, sizes 1", signature=signature, constants=constants, columns=0)
            )
    return found


def _may_be_aligned(kind: str) -> bool:
    return kind[0] in "*iu"


def _alignments(build: KernelBuild) -> list[bool]:
    """Aligned and not; only the first where the launch aligns every argument."""
    free = [kind for kind in build.signature.values() if _may_be_aligned(kind) and not kind.endswith(ALIGNED)]
    return [True, False] if free else [True]


def _compile(build: KernelBuild, target: Target, aligned: bool) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {name: kind.removesuffix(ALIGNED) for name, kind in build.signature.items()}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(build.signature.values())
        if kind.endswith(ALIGNED) or (aligned and _may_be_aligned(kind))
    }
    source = ASTSource(build.kernel, kinds, dict(build.constants), divisible)
    options = {"num_warps": warps(build.threads, target.wave), "num_stages": build.stages, **build.options}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # ptxas's report, and on an error the whole program
        kernel = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.wave), options=options)
    code = kernel.asm["ptx"] if target.backend == "cuda" else kernel.asm["amdgcn"]
    registers, spills, stack = usage_on_cuda(log.getvalue()) if target.backend == "cuda" else usage_on_hip(code)
    matrix = next((name for name in MATRIX_INSTRUCTIONS if name in code), "-")
    instructions = None
    if build.columns and target.backend == "cuda":
        loops = innermost_loops(_disassembled(kernel.asm["cubin"]))
        instructions = sum(len(loop) / elements(loop, build.columns, build.threads) for loop in loops)
    tensor_memory = getattr(kernel.metadata, "tmem_size", None) or 0
    return Usage(registers, spills, stack, kernel.metadata.shared, tensor_memory, matrix, instructions)


def _disassembled(cubin: bytes) -> str:
    """SASS, by the disassembler that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


def _fault(usage: Usage, target: Target, most: float = float("inf")) -> str | None:
    """`most`: the limit of instructions an element."""
    faults = []
    if usage.instructions is not None and usage.instructions > most:
        faults.append(f"MORE THAN {most:g} INSTRUCTIONS AN ELEMENT ({usage.instructions:.1f})")
    if usage.spills:
        faults.append(f"SPILLS {usage.spills}")
    if usage.shared > target.shared_limit:
        faults.append("TOO MUCH SHARED MEMORY")
    if usage.tensor_memory > MAX_TENSOR_MEMORY:
        faults.append(f"TOO MUCH TENSOR MEMORY ({usage.tensor_memory} columns)")
    return ", ".join(faults) or None


_builds: list[KernelBuild] = []
"""Handed to the forked workers: a kernel cannot be pickled."""


def _task(job: tuple[int, str, bool]) -> Result:
    index, name, aligned = job
    build, target = _builds[index], TARGETS[name]
    usage, error = None, None
    try:
        usage = _compile(build, target, aligned)
        error = _fault(usage, target, build.instructions if name == "sm_90" and aligned else float("inf"))
    except Exception as failure:  # whatever the compiler raises is this line's result: the other kernels are compiled
        error = f"DOES NOT COMPILE: {type(failure).__name__}: {' '.join(str(failure).split())[:400]}"
    return Result(build.name, name, warps(build.threads, target.wave), aligned, usage, error)


def compile_builds(
    builds: Sequence[KernelBuild], targets: Sequence[str] = tuple(TARGETS), jobs: int = 2
) -> Iterator[Result]:
    """Compile `builds` for `targets`, aligned and not, in `jobs` processes and an empty cache; results in order."""
    global _builds
    _builds = list(builds)
    names = [build.name for build in _builds]
    if len(set(names)) < len(names):
        raise ValueError(f"builds with one name: {sorted({name for name in names if names.count(name) > 1})}")
    work = [
        (i, target, aligned) for i, build in enumerate(_builds) for target in targets for aligned in _alignments(build)
    ]
    with tempfile.TemporaryDirectory(prefix="lead_kernels_aot_") as cache:
        os.environ.update(TRITON_CACHE_DIR=cache, TRITON_DUMP_PTXAS_LOG="1", TRITON_ALWAYS_COMPILE="1")
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
            yield from pool.map(_task, work)


def report(builds: Sequence[KernelBuild], targets: Sequence[str] = tuple(TARGETS), jobs: int = 2) -> int:
    """Print a line for every result and the faults again at the end; returns the exit status."""
    start, results = time.monotonic(), []
    print(HEADER)
    try:
        for result in compile_builds(builds, targets, jobs):
            results.append(result)
            print(result.line(), flush=True)
    except BrokenProcessPool:
        print(f"a compiler process died after {len(results)} results: an assertion of LLVM's, or out of memory")
        return 1
    faults = [result for result in results if result.error]
    seconds = time.monotonic() - start
    counts = f"{len(results)} compilations, {len(faults)} faults, {seconds:.0f} s"
    print(f"{len(builds)} kernels and configurations, {counts}")
    for result in faults:
        print(f"FAULT {result.line()}")
    return 1 if faults else 0


def _refusal() -> str | None:
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed: pip install triton (its compilers need no GPU)"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lead_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="compiling processes (default: 2)")
    parser.add_argument("--sizes-of-one", action="store_true", help="compile as for sizes of 1 instead")
    chosen = parser.parse_args(arguments)
    refusal = _refusal()
    if refusal is not None:
        print(refusal, file=sys.stderr)
        return 2
    builds = with_sizes_of_one(all_builds()) if chosen.sizes_of_one else all_builds()
    return report(builds, chosen.target, chosen.jobs)


if __name__ == "__main__":
    sys.exit(main())
