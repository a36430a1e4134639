"""Inner loops of kernels as the compiler made them: accumulators stay in registers.

GCC 12 at -O3 spilled them inside such loops, at 1.7 times the time of a whole model, and no number showed it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import native_build
import pytest

FLOAT_TILES = {"MultiplyTile", "MultiplyPixels", "QueryKeyTile", "WeightValueTile"}
INT8_TILES = {"MultiplyQuantizedTile", "SumRows"}
TILE = re.compile(rf"\b({'|'.join(FLOAT_TILES | INT8_TILES)})<")
"""Tiles of matrix products, whose accumulators are planned to fill the registers. Others may keep constants of a
polynomial in memory, of which AVX2 has more than registers."""

TILES = {
    "avx2": FLOAT_TILES | INT8_TILES, "avx_vnni": INT8_TILES,
    "avx512": FLOAT_TILES | INT8_TILES, "avx512_vnni": INT8_TILES,
}  # fmt: skip

UNUSED = re.compile(r"avx2::MultiplyPixels<\d, 1, 4>")
"""Blocks of 32 channels: ONNX Runtime has them of 8 and 16."""

MIN_PRODUCTS = 8
"""Smaller tiles have registers to spare."""

VECTOR = re.compile(r"%[yz]mm\d")
BRANCH = re.compile(r"^j\w+\s+([0-9a-f]+)\b")

pytestmark = [
    pytest.mark.skipif(shutil.which("objdump") is None, reason="reads machine code with objdump: apt install binutils"),
    pytest.mark.skipif(not native_build.can_build(), reason="no cmake and c++ to build kernels"),
]


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str


Function = list[Instruction]


def functions_of(disassembly: str) -> Iterator[tuple[str, Function]]:
    """(name, instructions) of each function in what `objdump -d --no-show-raw-insn` prints."""
    name, body = "", []
    for line in disassembly.splitlines():
        if head := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            if body:
                yield name, body
            name, body = head[1], []
        elif code := re.match(r"^\s+([0-9a-f]+):\s+(.*\S)", line):
            body.append(Instruction(int(code[1], 16), code[2]))
    if body:
        yield name, body


def inner_loops(function: Function) -> list[Function]:
    """From the target of each backward jump to the jump, where no other such loop lies within."""
    first = function[0].address
    spans = set()
    for one in function:
        jump = BRANCH.match(one.text)
        if jump and first <= int(jump[1], 16) < one.address:
            spans.add((int(jump[1], 16), one.address))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[one for one in function if start <= one.address <= end] for start, end in sorted(inner)]


def stack_accesses(function: Function, loop: Function) -> list[str]:
    """Vectors that the loop moves to or from the stack. %rbp counts where it is the frame's."""
    framed = any(one.text.endswith("mov    %rsp,%rbp") for one in function[:16])
    stack = re.compile(r"\(%rsp[,)]" + (r"|-0x[0-9a-f]+\(%rbp[,)]" if framed else ""))
    return [one.text for one in loop if VECTOR.search(one.text) and stack.search(one.text)]


def products(loop: Function) -> int:
    return sum(1 for one in loop if re.match(r"(\{vex\} )?(vfn?madd\w+ps|vpdpbusd|vpmaddwd)\b.*%[yz]mm", one.text))


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> list[tuple[str, Function]]:
    """Every function of kernel_runner in the namespace of an instruction set of x86."""
    runner = native_build.runner_in(native_build.build("release"))
    found = [f for f in functions_of(disassemble(runner)) if re.search(r"native::avx(2|512|_vnni|512_vnni)::", f[0])]
    if not found:
        pytest.skip("this machine's kernels are not those of x86")
    return found


def disassemble(program: Path) -> str:
    command = ["objdump", "-d", "--demangle", "--no-show-raw-insn", str(program)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("isa", TILES)
def test_products_keep_their_accumulators_in_registers(kernels: list[tuple[str, Function]], isa: str) -> None:
    seen, spills = set(), []
    for name, function in kernels:
        product = TILE.search(name)
        if product is None or f"native::{isa}::" not in name or UNUSED.search(name):
            continue
        for loop in inner_loops(function):
            if products(loop) >= MIN_PRODUCTS:
                seen.add(product[1])
                accesses = stack_accesses(function, loop)
                spills += [f"{name} at {loop[0].address:x}: {', '.join(accesses[:3])}"] if accesses else []
    assert seen == TILES[isa], "a kernel has other loops, or names"
    assert spills == []


def test_a_loop_that_spills_is_found(tmp_path: Path) -> None:
    """More accumulators than there are registers, in a loop."""
    source = tmp_path / "spilling.cc"
    names = [f"a{i}" for i in range(24)]
    source.write_text(
        "#include <immintrin.h>\n"
        "void Spilling(const float* x, float* y, long n) {\n"
        f"  __m256 {', '.join(f'{a} = _mm256_setzero_ps()' for a in names)};\n"
        "  for (long i = 0; i < n; ++i) {\n    const __m256 v = _mm256_loadu_ps(x + 8 * i);\n"
        + "".join(f"    {a} = _mm256_fmadd_ps(v, _mm256_set1_ps(y[{i}]), {a});\n" for i, a in enumerate(names))
        + "  }\n"
        + "".join(f"  _mm256_storeu_ps(y + {8 * i}, {a});\n" for i, a in enumerate(names))
        + "}\n"
    )
    compiled = tmp_path / "spilling.o"
    command = ["c++", "-O2", "-mavx2", "-mfma", "-c", str(source), "-o", str(compiled)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("the compiler does not make code for x86")
    ((_, function),) = functions_of(disassemble(compiled))
    loops = [loop for loop in inner_loops(function) if products(loop) == len(names)]
    assert loops
    assert all(stack_accesses(function, loop) for loop in loops)
