"""What the LM head's loss must compute and move, by arithmetic alone: FLOPs, bytes, least times, memory.

    python bench/head_counts.py [--rate TFLOP/s] [--bandwidth TB/s] [--chunk-rows N]

Inputs are bf16: hidden [T, H], weight [V, H]. The algorithm counted is that of `lead_kernels.linear_cross_entropy`: for
a chunk of C rows

    logits    z = h W^T             reads h, W; writes z (2 or 4 bytes an element)
    row pass  losses; g over z      reads z twice, second from L2 if the rows in flight fit there; writes g in bf16
    dh        g W                   reads g, W; writes dh
    dW        += g^T h in fp32      reads g, h; reads (but in the first chunk) and writes [V, H]
                                    (in bf16 where there is one chunk)

and once, in the backward pass, dh and dW times the upstream gradient, dW from fp32, or of one chunk bf16, to bf16.
Each operand is counted once, to which a product whose tiles are well ordered comes close. A part takes at least the
larger of FLOPs / rate and bytes / bandwidth; parts follow each other, so their floors add up. "No overlap" adds the two
terms instead, a product that waits for its operands: small chunks lose there.

The row pass also takes two exponentials an element: 132 SMs x 16 a clock at 1.98 GHz make 4.2e12 a second, 0.48 ps an
element against 0.93 ps for 4 bytes at 4.3 TB/s. Memory decides.

Rates by default, measured on an H200: a bf16 8192^3 product on random data 780 TFLOP/s, a copy 4.3 TB/s (data sheet:
990 and 4.8).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import NamedTuple

BUDGET = 1.15
"""Forward and backward shall take at most this many times the three products."""


class Shape(NamedTuple):
    """T, H, V."""

    rows: int
    hidden: int
    vocabulary: int

    def __str__(self) -> str:
        return " x ".join(map(str, self))


SHAPES = tuple(
    Shape(*s)
    for s in (
        (4096, 2048, 128256),
        (16384, 4096, 128256),
        (16384, 2048, 151936),
        (8192, 3584, 152064),
        (8192, 2304, 256000),
    )
)
CHUNK_ROWS = (1024, 2048, 4096, 8192)


MEMORY = 150e9
"""Bytes of an H200's memory."""


def default_rows(vocabulary: int, logit_bytes: int, memory: float = MEMORY) -> int:
    """Most rows of a chunk on a GPU by default: 1/32 of its memory within 1 and 4 GiB, and at least 2048 rows."""
    return max(2048, int(min(2**32, max(2**30, memory // 32))) // (logit_bytes * vocabulary))


@dataclass(frozen=True)
class Machine:
    """By default an H200."""

    flops: float = 780e12
    bandwidth: float = 4.3e12
    cache: float = 60e6
    units: int = 132
    """Streaming multiprocessors; each works on `programs` rows at a time in the row pass."""
    programs: int = 2

    def holds_rows(self, vocabulary: int, logit_bytes: int) -> bool:
        """Whether the rows being worked on stay in the L2 cache until their second read."""
        return self.units * self.programs * vocabulary * logit_bytes <= self.cache


class Part(NamedTuple):
    """One step of the algorithm, on one chunk or on all."""

    name: str
    flops: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)

    def seconds_in_turn(self, machine: Machine) -> float:
        return self.flops / machine.flops + self.bytes / machine.bandwidth


def product_flops(shape: Shape, products: int) -> int:
    """1: the logits; 2: and the hidden gradient (frozen head); 3: and the weight gradient."""
    return products * 2 * shape.rows * shape.hidden * shape.vocabulary


def chunk_sizes(rows: int, most: int) -> list[int]:
    """Equal chunks of at most `most` rows."""
    count = -(-rows // most)
    return [rows * (i + 1) // count - rows * i // count for i in range(count)]


def chunk_parts(
    shape: Shape,
    rows: int,
    logit_bytes: int,
    products: int = 3,
    first: bool = False,
    machine: Machine | None = None,
    only: bool = False,
) -> list[Part]:
    """The parts of one chunk of `rows` rows; `only`: there is no other."""
    _, hidden, vocabulary = shape
    # Elements of the chunk's logits, of the weight and of the chunk's hidden states.
    block, weight, states = rows * vocabulary, vocabulary * hidden, rows * hidden
    matmul = 2 * rows * hidden * vocabulary
    # The second sweep finds the logits in the L2 cache, if the rows in flight fit there; the loss alone has none.
    reads = 1 if products == 1 or (machine or Machine()).holds_rows(vocabulary, logit_bytes) else 2
    gradient_bytes = 2 * block if products > 1 else 0
    if only:
        sum_bytes = 2  # written in bf16
    elif first:
        sum_bytes = 4  # written in fp32
    else:
        sum_bytes = 8  # read and written in fp32
    parts = [
        Part("logits", matmul, 2 * states + 2 * weight + logit_bytes * block),
        Part("row pass", 0, reads * logit_bytes * block + gradient_bytes),
        Part("dh", matmul, 2 * block + 2 * weight + 2 * states),
        Part("dW", matmul, 2 * block + 2 * states + sum_bytes * weight),
    ]
    return parts[: 2 if products == 1 else products + 1]


class Sum(NamedTuple):
    """A part over all chunks: bytes, and seconds with and without overlap of arithmetic and memory."""

    name: str
    bytes: float
    seconds: float
    seconds_in_turn: float


def all_parts(
    shape: Shape, chunk_rows: int, logit_bytes: int, products: int = 3, machine: Machine | None = None
) -> list[Sum]:
    """Each part over the chunks, and last the scaling by the upstream gradient."""
    machine = machine or Machine()
    sizes = chunk_sizes(shape.rows, chunk_rows)
    only = len(sizes) == 1
    chunks = [chunk_parts(shape, n, logit_bytes, products, i == 0, machine, only) for i, n in enumerate(sizes)]
    parts = [list(same) for same in zip(*chunks, strict=True)]
    if products > 1:
        weight, states = shape.vocabulary * shape.hidden, shape.rows * shape.hidden
        # dh in bf16, read and written; dW read in fp32, or of one chunk in bf16, and written in bf16.
        moved = 4 * states
        if products == 3:
            moved += (4 if only else 6) * weight
        parts.append([Part("scaling", 0, moved)])
    return [
        Sum(
            same[0].name,
            sum(p.bytes for p in same),
            sum(p.seconds(machine) for p in same),
            sum(p.seconds_in_turn(machine) for p in same),
        )
        for same in parts
    ]


def expected_seconds(
    shape: Shape, chunk_rows: int, logit_bytes: int, products: int = 3, machine: Machine | None = None
) -> float:
    """The algorithm's own floor: all its parts."""
    return sum(part.seconds for part in all_parts(shape, chunk_rows, logit_bytes, products, machine))


def floor_seconds(shape: Shape, products: int = 3, machine: Machine | None = None) -> float:
    """The products alone at the machine's rate: what is compared against."""
    return product_flops(shape, products) / (machine or Machine()).flops


def chunk_memory(shape: Shape, chunk_rows: int, logit_bytes: int) -> int:
    return max(chunk_sizes(shape.rows, chunk_rows)) * shape.vocabulary * logit_bytes


def our_memory(shape: Shape, chunk_rows: int, logit_bytes: int) -> int:
    """Bytes beyond hidden and weight at the peak.

    That is dh, dW (fp32; of one chunk bf16) and the chunk; or, in the backward pass, both gradients and both scaled.
    """
    weight, states = shape.vocabulary * shape.hidden, shape.rows * shape.hidden
    size = 2 if chunk_rows >= shape.rows else 4
    chunk = chunk_memory(shape, chunk_rows, logit_bytes)
    return max(size * weight + 2 * states + chunk, (size + 2) * weight + 4 * states)


def allowed_memory(shape: Shape, chunk_rows: int, logit_bytes: int) -> int:
    """Inputs + gradients + one chunk, all but the chunk in bf16."""
    return 4 * (shape.rows + shape.vocabulary) * shape.hidden + chunk_memory(shape, chunk_rows, logit_bytes)


def naive_memory(shape: Shape) -> int:
    """Bytes beyond the inputs at the peak of `cross_entropy((h @ W.T).float(), y)`.

    That is in its backward pass: log-softmax, gradient at it, gradient at the logits, fp32 [T, V] each (forward: two
    such tensors).
    """
    return 12 * shape.rows * shape.vocabulary


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def floors_table(machine: Machine) -> str:
    rows = []
    for shape in SHAPES:
        teraflops = [f"{product_flops(shape, n) / 1e12:.2f}" for n in (1, 2, 3)]
        floors = [_ms(floor_seconds(shape, n, machine)) for n in (1, 2, 3)]
        rows.append([str(shape), *teraflops, *floors, _ms(BUDGET * floor_seconds(shape, 3, machine))])
    columns = ["1 product, TFLOP", "2 (frozen head)", "3", "floor of 1, ms", "of 2", "of 3", f"{BUDGET} x floor of 3"]
    return markdown(["T x H x V", *columns], rows)


def parts_table(machine: Machine, chunk_rows: int | None, logit_bytes: int) -> str:
    names = [part.name for part in all_parts(SHAPES[0], 1024, logit_bytes)]
    rows, given = [], chunk_rows
    for shape in SHAPES:
        chunk_rows = given or default_rows(shape.vocabulary, logit_bytes)
        parts = all_parts(shape, chunk_rows, logit_bytes, machine=machine)
        total = sum(part.seconds for part in parts)
        cells = [f"{_ms(part.seconds)} ({_gb(part.bytes)})" for part in parts]
        frozen = expected_seconds(shape, chunk_rows, logit_bytes, 2, machine)
        ratios = [total / floor_seconds(shape, 3, machine), frozen / floor_seconds(shape, 2, machine)]
        both = f"{_ms(total)} ({_gb(sum(part.bytes for part in parts))})"
        largest = max(chunk_sizes(shape.rows, chunk_rows))
        rows.append([str(shape), str(largest), *cells, both, f"{ratios[0]:.3f}", _ms(frozen), f"{ratios[1]:.3f}"])
    return markdown(["T x H x V", "rows", *names, "all", "/ floor of 3", "frozen head, ms", "/ floor of 2"], rows)


def chunk_table(machine: Machine) -> str:
    rows = []
    for shape in SHAPES:
        for size in (size for size in CHUNK_ROWS if size <= shape.rows):
            cells = []
            for logit_bytes in (2, 4):
                parts = all_parts(shape, size, logit_bytes, machine=machine)
                floor = floor_seconds(shape, 3, machine)
                cells += [_ms(sum(p.seconds for p in parts)), f"{sum(p.seconds for p in parts) / floor:.3f}"]
                cells += [
                    f"{sum(p.seconds_in_turn for p in parts) / floor:.3f}",
                    _gb(chunk_memory(shape, size, logit_bytes)),
                ]
                cells += [_gb(our_memory(shape, size, logit_bytes))]
            rows.append([str(shape), str(size), *cells, _gb(allowed_memory(shape, size, 2)), _gb(naive_memory(shape))])
    names = ("ms", "/ floor", "/ floor, no overlap", "chunk, GB", "extra, GB")
    columns = [f"{dtype}: {name}" for dtype in ("bf16", "fp32") for name in names]
    return markdown(["T x H x V", "rows", *columns, "allowed, GB", "naive, GB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=Machine.flops / 1e12, help="TFLOP/s of large bf16 products")
    parser.add_argument("--bandwidth", type=float, default=Machine.bandwidth / 1e12, help="TB/s")
    parser.add_argument("--chunk-rows", type=int, help="of the tables by part; by default the operator's own choice")
    flags = parser.parse_args()
    machine = Machine(flops=flags.rate * 1e12, bandwidth=flags.bandwidth * 1e12)
    print(f"## Products alone, at {flags.rate:g} TFLOP/s\n\n{floors_table(machine)}\n")
    for logit_bytes, dtype in ((2, "bf16"), (4, "fp32")):
        print(f"## By part, logits in {dtype}, {flags.bandwidth:g} TB/s; ms (GB moved)\n")
        print(f"{parts_table(machine, flags.chunk_rows, logit_bytes)}\n")
    print("## By rows of a chunk, with logits in bf16 and in fp32; memory beyond the inputs\n")
    print(chunk_table(machine))


if __name__ == "__main__":
    main()
