"""Whether products of unsigned by signed 8-bit integers saturate on this CPU.

Without VNNI ONNX Runtime's x86 kernels add neighbouring products in 16 bits (vpmaddubsw): 255 * 127 * 2 does not fit,
and numbers are wrong without a sign of it. Its session entry EXACT makes such products from unsigned weights, whose
kernels multiply in 16 bits and add in 32; it does so whatever the CPU is, and is slower where there is VNNI. Our own
kernels are exact on every CPU (native/kernels/dot.h).
"""

from __future__ import annotations

import functools
import os
import platform

from attn_deploy import environment
from attn_deploy.errors import UnavailableError
from attn_deploy.runtimes import native

EXACT = "session.x64quantprecision"
"""ONNX Runtime's session entry: signed weights become unsigned where one is beyond 64 on either side of zero."""

_VNNI = frozenset({"avx_vnni", "avx512_vnni"})
_X86 = frozenset({"x86_64", "amd64", "i386", "i686", "x86"})


@functools.cache
def saturates() -> bool:
    """True on an x86 CPU without VNNI, and on one that tells nothing of itself. `ATTN_DEPLOY_NATIVE_ISA` forces it as
    it forces our kernels: with avx2 everything runs as it would on a CPU that has no more."""
    if platform.machine().lower() not in _X86:
        return False
    kernels = _kernels()
    if kernels in _VNNI:
        return False
    known = environment.instruction_sets()
    if known and not os.environ.get(native.ISA_VARIABLE):
        return not _VNNI & set(known)
    return kernels != "none" or not _VNNI & set(known)


def _kernels() -> str:
    """What our kernels run with, which the library asks the CPU itself for; `none` without a library."""
    path = native.library_path()
    try:
        return "none" if path is None else native.library_instruction_set(path)
    except UnavailableError:
        return "none"
