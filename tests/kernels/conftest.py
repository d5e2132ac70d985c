"""Here the fused kernels run: on a GPU where there is one, otherwise in Triton's interpreter, in a process of its own (test_kernels.py).

Two faults of the interpreter with bfloat16 (Triton 3.9 and before) are repaired: tl.dot multiplies the bits as if they were whole numbers,
and float32 becomes bfloat16 by cutting bits off, where GPUs round to the nearest even.
"""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else ["test_inner.py"]

if INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def _widened(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return handle

    _dot = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: _dot(self, _widened(a), _widened(b), *rest)

    _cast = interpreter.InterpreterBuilder.cast_impl

    def _rounding(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = np.ascontiguousarray(src.data, dtype=np.float32).view(np.uint32)
            rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
            return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)
        return _cast(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = _rounding
