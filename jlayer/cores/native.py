"""Compiles small programs in LLVM's language for this processor, with llvmlite."""

from __future__ import annotations

import ctypes
import platform
import threading
from functools import cache

INSTALL = 'pip install "llvmlite>=0.45"'
# The kernel's number of futex(2), which the threads sleep with.
FUTEX = {"x86_64": 202, "aarch64": 98}


class Compiler:
    """Machine code for this processor, or for one with fewer `features` ("-avx512f,...")."""

    def __init__(self, features: str = ""):
        from llvmlite import binding

        _initialize()
        host = ",".join(filter(None, (binding.get_host_cpu_features().flatten(), features)))
        # Names of processors imply features: with some taken away only the list counts.
        cpu = "" if features else binding.get_host_cpu_name()
        self._machine = binding.Target.from_default_triple().create_target_machine(
            cpu=cpu, features=host, opt=3, jit=True
        )
        disabled = set(features.split(","))
        self.has_fma = platform.machine() != "x86_64" or "+fma" in host.split(",")
        has = {name[1:] for name in host.split(",") if name[0] == "+"} - {
            name[1:] for name in disabled if name
        }
        self.has_avx512 = "avx512f" in has
        # Dot products of pairs of bfloat16, and permutations of them.
        self.has_bfloat16 = has >= {"avx512f", "avx512bw", "avx512bf16"}
        self.has_amx = has >= {"amx-tile", "amx-bf16"} and _may_use_tiles()
        self._engine = binding.create_mcjit_compiler(binding.parse_assembly(""), self._machine)
        _KEPT.append(self._engine)

    def compiled(self, text: str, *names: str) -> list[int]:
        """The addresses of functions of a module."""
        from llvmlite import binding

        module = binding.parse_assembly(text)
        module.verify()
        self._engine.add_module(module)
        self._engine.finalize_object()
        return [self._engine.get_function_address(name) for name in names]

    def assembly(self, text: str) -> str:
        """What the processor gets, to count instructions."""
        from llvmlite import binding

        return self._machine.emit_assembly(binding.parse_assembly(text))


# The least that a kernel needs: before llvmlite 0.45, LLVM knew no pointers without a type.
PROBE = "define i32 @probe(ptr %any) {\n ret i32 1\n}"
_LOCK = threading.Lock()
# Code is never freed: addresses of it lie in lists of jobs, and threads are inside.
_KEPT = []


@cache
def _initialize():
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()


@cache
def _may_use_tiles() -> bool:
    """Asks Linux for AMX's tiles, once for all threads: a thread that uses them keeps 8 KiB more.
    158: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)."""
    return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


@cache
def missing() -> str | None:
    """What to do so that kernels can be compiled, in one line; None where they can."""
    if platform.machine() not in FUTEX:
        return f"no kernels for processors of the kind {platform.machine()}"
    try:
        import llvmlite  # noqa: F401
    except ImportError:
        return f"llvmlite is not installed: {INSTALL}"
    try:
        with _LOCK:
            compiler = Compiler()
            if not compiler.has_fma:
                return "no kernels for processors without FMA (x86-64-v3)"
            (address,) = compiler.compiled(PROBE, "probe")
    except (RuntimeError, OSError, AttributeError) as error:
        why = str(error).splitlines()[0]
        return f"llvmlite cannot compile for this processor ({why}): {INSTALL} --upgrade"
    return None if address else f"llvmlite compiled nothing: {INSTALL} --upgrade"
