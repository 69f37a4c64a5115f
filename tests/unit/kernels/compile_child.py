"""Compiles Triton kernels for an H100, where there need be none, in a process in which no kernel was interpreted.

Interpreting one changes Triton's language for the rest of a process. The jobs come pickled by standard input: module,
kernel, constants, the pointers' types, warps, names of wide integers; so do the results by standard output.
"""

import importlib
import pickle
import sys


def compiled(module, name, constants, pointers, warps, wide):
    """A kernel's TTGIR and PTX, whether it has a binary, its scratch: pointers divisible by 16, numbers of 32 bits."""
    compiler = importlib.import_module("triton.compiler")
    backend = importlib.import_module("triton.backends.compiler")
    kernel = getattr(importlib.import_module(module), name)
    kinds = {one: "i64" if one in wide else "i32" for one in kernel.arg_names}
    kinds |= pointers | dict.fromkeys(constants, "constexpr")
    place = kernel.arg_names.index
    source = compiler.ASTSource(
        kernel,
        kinds,
        constexprs={(place(one),): value for one, value in constants.items()},
        attrs={(place(one),): [["tt.divisibility", 16]] for one in pointers},
    )
    target = backend.GPUTarget("cuda", 90, 32)
    built = importlib.import_module("triton").compile(source, target=target, options={"num_warps": warps})
    return {
        "ptx": built.asm["ptx"],
        "ttgir": built.asm["ttgir"],
        "binary": bool(built.asm["cubin"]),
        "scratch": built.metadata.global_scratch_size,
    }


if __name__ == "__main__":
    results = [compiled(*job) for job in pickle.load(sys.stdin.buffer)]
    sys.stdout.buffer.write(pickle.dumps(results))
