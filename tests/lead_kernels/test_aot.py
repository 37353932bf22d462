"""Every kernel compiles for every GPU without a spill, and the report that says so fails where one does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

KERNELS = """
import sys
from dataclasses import replace
import triton
import triton.language as tl
from lead_kernels import aot
from lead_kernels.backend import KernelBuild

@triton.jit
def spilling(a_ptr, out_ptr, SIDE: tl.constexpr):
    i = tl.arange(0, SIDE)
    a = tl.load(a_ptr + i)  # needed again after the sum, which needs all of it
    tl.store(out_ptr + i, a / tl.sum(a, 0))

@triton.jit
def sharing(a_ptr, out_ptr, num_tiles, SIDE: tl.constexpr):
    i = tl.arange(0, SIDE)
    tile = i[:, None] * SIDE + i[None, :]
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for k in range(num_tiles):
        a = tl.load(a_ptr + 2 * k * SIDE * SIDE + tile)
        b = tl.load(a_ptr + (2 * k + 1) * SIDE * SIDE + tile)
        total = tl.dot(a, b, total)
    tl.store(out_ptr + tile, total)

@triton.jit
def wrong(a_ptr):
    tl.store(a_ptr + tl.arange(0, 3), 0.0)

@triton.jit
def stacking(a_ptr):
    i = a_ptr + tl.arange(0, 128)
    tl.store(i, tl.extra.cuda.libdevice.sin(tl.load(i)))

@triton.jit
def looping(a_ptr, num_turns, SIDE: tl.constexpr):
    for turn in range(num_turns):
        i = a_ptr + turn * SIDE + tl.arange(0, SIDE)
        tl.store(i, tl.exp(tl.load(i)))

@triton.jit
def sized(a_ptr, size):
    tl.store(a_ptr + size.to(tl.int64), 0.0)

def build(kernel, types, threads, stages=1, **constants):
    types = types | dict.fromkeys(constants, "constexpr")
    return KernelBuild(kernel.fn.__name__, kernel, types, constants, threads, stages)

pair = {"a_ptr": "*fp32:16", "out_ptr": "*fp32:16"}
half = {"a_ptr": "*fp16:16", "out_ptr": "*fp32:16", "num_tiles": "i32:16"}
loop = replace(build(looping, {"a_ptr": "*fp32:16", "num_turns": "i32"}, 128, SIDE=512), columns=512)
case, target = sys.argv[1:]
build = {
    "spilling": build(spilling, pair, 64, SIDE=32768 if target == "gfx942" else 16384),
    "sharing": build(sharing, half, 128, 6 if target == "gfx942" else 17, SIDE=64),
    "wrong": build(wrong, {"a_ptr": "*fp32"}, 128),
    "looping": replace(loop, instructions=4.0),
    "few": replace(loop, instructions=40.0),
    "sized": build(sized, {"a_ptr": "*fp32", "size": "i32"}, 128),
    "size 1": aot.with_sizes_of_one([build(sized, {"a_ptr": "*fp32", "size": "i32"}, 128)])[0],
    "stacking": build(stacking, {"a_ptr": "*fp64:16"}, 128),
}[case]
sys.exit(aot.report([build], [target]))
"""

COUNT = """
import os

os.environ.update(TRITON_DUMP_PTXAS_LOG="1", TRITON_ALWAYS_COMPILE="1")
from lead_kernels import aot, row_pass

counted = aot.elements
def elements(loop, columns, threads):
    found, exponentials = counted(loop, columns, threads), sum("MUFU.EX2" in text for text in loop)
    if exponentials:  # not in the loop that fills an ignored row with zeros
        print(found, exponentials)  # the first sweep has up to two more, of its running maximum
    return found

aot.elements = elements
for build in row_pass.builds():
    if build.name in ("row_pass fp32 gradient 4096", "row_pass bf16 gradient 16384"):
        aot._compile(build, aot.TARGETS["sm_90"], True)
"""


def run(*arguments: str, cwd: Path, interpreted: bool = False) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles_without_a_spill(tmp_path: Path, target: str) -> None:
    report = run("-m", "lead_kernels.aot", "--target", target, cwd=tmp_path)
    lines = report.stdout.splitlines()
    assert report.returncode == 0, "\n".join(line for line in lines if line.startswith("FAULT")) or report.stderr
    for kernel in (
        "segment_reduce.sum_piece ",
        "gradient_signature.outer_piece ",
        "grad_inner_product.row_products ",
        "row_pass ",
    ):
        assert any(line.startswith(kernel) and f" {target} " in line for line in lines), (
            f"{kernel} is not in the report"
        )
    # 16-bit products are made for the matrix units; Hopper's full rate needs warp-group instructions.
    instruction = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}[target]
    assert any(line.startswith("grad_inner_product.row_products bf16") and instruction in line for line in lines)


@pytest.mark.parametrize(
    ("case", "target", "message", "faults"),
    [
        ("spilling", "sm_90", "SPILLS", 1),
        ("spilling", "gfx942", "SPILLS", 1),
        ("sharing", "sm_80", "TOO MUCH SHARED MEMORY", 1),
        ("sharing", "sm_90", "TOO MUCH SHARED MEMORY", 1),
        ("sharing", "gfx942", "TOO MUCH SHARED MEMORY", 1),
        ("wrong", "sm_90", "power of 2", 2),  # aligned and not
        ("looping", "sm_90", "MORE THAN 4 INSTRUCTIONS AN ELEMENT", 1),
    ],
)
def test_a_kernel_that_runs_badly_fails_the_report(
    tmp_path: Path, case: str, target: str, message: str, faults: int
) -> None:
    (tmp_path / "kernels_to_judge.py").write_text(KERNELS)
    report = run("kernels_to_judge.py", case, target, cwd=tmp_path)
    assert report.returncode == 1, report.stdout + report.stderr
    lines = [line for line in report.stdout.splitlines() if line.startswith("FAULT")]
    assert len(lines) == faults
    assert all(message in line for line in lines)


def test_instructions_an_element_are_counted(tmp_path: Path) -> None:
    """Within the limit, and at least what each element needs: its exponential and a product."""
    (tmp_path / "kernels_to_judge.py").write_text(KERNELS)
    report = run("kernels_to_judge.py", "few", "sm_90", cwd=tmp_path)
    assert report.returncode == 0, report.stdout + report.stderr
    assert 2.0 < float(report.stdout.splitlines()[1].split()[10]) < 40.0


COPIES = [f"MUFU.EX2 R{i}, R{i}" for i in range(32)]
LOADS = [f"LDG.E.EF.128 R8, desc[UR8][R30.64+{hex(0x4000 * i)}]" for i in range(8)]


@pytest.mark.parametrize(
    ("loop", "copies"),
    [
        (["UIADD3 UR4, UP0, UR4, 0x1000, URZ", "IADD3 R6, P4, R6, 0x4000, RZ", *LOADS[:2], *COPIES[:8]], 1),
        (["UIADD3 UR5, UR4, 0x3000, URZ", "UIADD3 UR4, UP0, UR4, 0x4000, URZ", *LOADS, *COPIES], 4),
        (["VIADD R3, R3, 0x4000", "IADD3 R6, P4, R6.reuse, 0x10000, RZ", *LOADS, *COPIES], 4),
        (["IADD3 R6, P4, R6, 0x4000, RZ", *LOADS[:1], *COPIES[:8]], 1),  # an address alone, and one load
        (["IADD3 R6, P4, R6, 0x30, RZ", *LOADS[:2], *COPIES[:8]], 1),
    ],
)
def test_copies_that_ptxas_made_of_a_loop_are_counted(loop: list[str], copies: int) -> None:
    """4096 columns and 512 threads: 8 elements a copy, each with its exponential."""
    from lead_kernels.aot import elements

    assert elements(loop, 4096, 512) == 8 * copies == sum("EX2" in text for text in loop)


def test_a_sweep_over_logits_has_one_exponential_an_element(tmp_path: Path) -> None:
    """In real code, where ptxas unrolls some of the loops of fp32 logits fourfold."""
    (tmp_path / "count.py").write_text(COUNT)
    found = run("count.py", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    sweeps = [tuple(map(float, line.split())) for line in found.stdout.splitlines()]
    assert len(sweeps) == 4  # two of each dtype
    assert all(exponentials - 2 <= elements <= exponentials for elements, exponentials in sweeps)


def test_no_kernel_needs_sizes_above_one(tmp_path: Path) -> None:
    """A vocabulary of 1 token, a pool of 1 sample: what Triton makes a constant of has no methods of a tensor."""
    (tmp_path / "kernels_to_judge.py").write_text(KERNELS)
    assert run("kernels_to_judge.py", "sized", "sm_90", cwd=tmp_path).returncode == 0
    told = run("kernels_to_judge.py", "size 1", "sm_90", cwd=tmp_path)
    assert told.returncode == 1
    assert "DOES NOT COMPILE" in told.stdout
    report = run("-m", "lead_kernels.aot", "--target", "sm_90", "--sizes-of-one", cwd=tmp_path)
    assert report.returncode == 0, report.stdout[-2000:] + report.stderr
    assert "grad_inner_product.row_products bf16, sizes 1" in report.stdout  # of 1 row; its width is padded to 16


def test_a_stack_frame_is_no_spill(tmp_path: Path) -> None:
    (tmp_path / "kernels_to_judge.py").write_text(KERNELS)
    report = run("kernels_to_judge.py", "stacking", "sm_90", cwd=tmp_path)
    assert report.returncode == 0, report.stdout + report.stderr
    registers, spills, stack = map(int, report.stdout.splitlines()[1].split()[4:7])
    assert (registers > 0, spills, stack > 0) == (True, 0, True)


def test_refusals(tmp_path: Path) -> None:
    report = run("-m", "lead_kernels.aot", cwd=tmp_path, interpreted=True)
    assert report.returncode == 2
    assert "TRITON_INTERPRET is set" in report.stderr
    without = "import sys; sys.modules['triton'] = None; from lead_kernels import aot; sys.exit(aot.main([]))"
    report = run("-c", without, cwd=tmp_path)
    assert report.returncode == 2
    assert "Triton is not installed" in report.stderr
    report = run("-m", "lead_kernels.aot", "--target", "sm_75", cwd=tmp_path)
    assert report.returncode == 2
    assert "invalid choice" in report.stderr
