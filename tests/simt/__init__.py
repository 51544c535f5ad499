"""The SIMT executor: CUDA kernels on the CPU, thread by thread, every access seen. ``session.h`` shows how to bind one.

>>> session = simt.Session(order="random", seed=3)
>>> simt.module().samples.block_sum(session, simt.tensor(x), simt.tensor(y), grid=[4], block=[256])
>>> session.unwritten(), session.counts()["global_read"]["sector_efficiency"]

``Session(*, order="forward", seed=0, detect=True, count=True, races_between_blocks=True, max_accesses=...)``: ``order``
is the order in which blocks and the runnable threads of a block take their turns, "forward", "reverse" or "random" (by
``seed``). ``detect=False`` leaves out initialisation, roles and races (not bounds, alignment, barriers and masks),
``count=False`` the requests of warps. A fault in a kernel raises ``Fault``, an AssertionError: "kind: what; kernel,
block, thread, at file:line (function)".
"""

from __future__ import annotations

from typing import Any

from .build import Unavailable, build_module, module

__all__ = ["Fault", "Session", "Unavailable", "build_module", "module", "tensor"]


def __getattr__(name: str) -> Any:
    if name in ("Session", "Fault"):
        return getattr(module(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def tensor(x: Any) -> Any:
    """Form in which a binding takes a CPU tensor of torch or an array of numpy: place, shape, strides, storage.

    The kernel works on the caller's memory. Bytes of the storage that are not elements of ``x`` are out of bounds.
    """
    if hasattr(x, "untyped_storage"):
        if x.device.type != "cpu":
            raise ValueError(f"the executor works on CPU memory, got a tensor on {x.device}")
        storage = x.untyped_storage()
        strides, begin, size = list(x.stride()), storage.data_ptr(), storage.nbytes()
        data, itemsize = x.data_ptr(), x.element_size()
    else:
        base = x
        while getattr(base, "base", None) is not None and hasattr(base.base, "__array_interface__"):
            base = base.base
        if not (base.flags.c_contiguous or base.flags.f_contiguous):
            raise ValueError("the array at the bottom of the views must be contiguous")
        itemsize = x.itemsize
        if any(stride % itemsize for stride in x.strides):
            raise ValueError(
                f"strides must be multiples of the element size {itemsize}, got {x.strides} bytes"
            )
        strides, begin, size = [stride // itemsize for stride in x.strides], base.ctypes.data, base.nbytes
        data = x.ctypes.data
    if size == 0:
        data = begin = 0
    return module().Tensor(data, itemsize, list(x.shape), strides, begin, size, x)
