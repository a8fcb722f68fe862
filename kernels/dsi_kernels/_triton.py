"""`triton` and `tl` where Triton is installed, a stand-in for both where it is not: the references import anywhere.

The stand-in takes every decorator and annotation at import; `require_triton` then refuses the launch with a reason.
"""

from __future__ import annotations

__all__ = ["INSTALLED", "INTERPRETED", "TensorDescriptor", "require_triton", "tl", "triton"]

MISSING = "needs Triton, which is not installed here (Linux with CUDA: pip install 'triton>=3.6')"


class _Absent:
    """Whatever is asked of it, itself; so `@triton.jit`, `tl.constexpr` and `tl.tensor` pass while a module is read."""

    def __getattr__(self, name: str) -> _Absent:
        # inspect follows __wrapped__ until it ends
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **kwargs: object) -> _Absent:
        return self

    def __getitem__(self, grid: object) -> _Absent:
        raise ImportError(f"dsi_kernels: a kernel {MISSING}")


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = _Absent()
    INSTALLED = INTERPRETED = False
else:
    INSTALLED = True
    # read once, as triton.jit does when it decorates; later changes to the variable reach neither
    INTERPRETED = bool(triton.knobs.runtime.interpret)


def require_triton(op: str) -> None:
    """Nothing; where Triton is missing, an ImportError that names the op and what runs instead."""
    if not INSTALLED:
        raise ImportError(f"{op}: {MISSING}; {op}_reference runs anywhere")
