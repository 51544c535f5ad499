"""csrc/cuda/simt.cuh on the device: wrappers compile to what plain accesses compile to, hints to their instructions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """
#include "cuda/simt.cuh"
using namespace lagkv;
using V = Vec<__half, 8>;
template <class T>
struct P { const T* x; T* y; };
template <class T>
__global__ void wrapped(const P<T> p) {
  LAGKV_SHARED(T, tile, 64);
  LAGKV_DYNAMIC_SHARED(raw);
  T* const more = reinterpret_cast<T*>(raw);
  st_shared(&tile[threadIdx.x], ld_global(p.x + threadIdx.x));
  st_shared(&more[threadIdx.x], ld_global_nc(p.x + 64 + threadIdx.x));
  __syncthreads();
  st_global(p.y + threadIdx.x, ld_shared(&tile[threadIdx.x ^ 1]));
  st_global(p.y + 64 + threadIdx.x, ld_shared(&more[threadIdx.x ^ 1]));
}
struct __align__(16) Word16 { unsigned x, y, z, w; };
template <class T, class W>
__global__ void plain(const P<T> p) {
  __shared__ W tile[64];
  extern __shared__ __align__(16) unsigned char raw[];
  W* const more = reinterpret_cast<W*>(raw);
  const W* x = reinterpret_cast<const W*>(p.x);
  W* y = reinterpret_cast<W*>(p.y);
  tile[threadIdx.x] = x[threadIdx.x];
  more[threadIdx.x] = __ldg(x + 64 + threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x ^ 1];
  y[64 + threadIdx.x] = more[threadIdx.x ^ 1];
}
template <class T>
__global__ void hinted(const P<T> p) {
  st_global(p.y + threadIdx.x, ld_global_nc_stream(p.x + threadIdx.x));
}
#define MAKE(T, W) \
  template __global__ void wrapped<T>(const P<T>); \
  template __global__ void plain<T, W>(const P<T>); \
  template __global__ void hinted<T>(const P<T>);
MAKE(unsigned char, unsigned char)
MAKE(__half, unsigned short)
MAKE(__nv_bfloat16, unsigned short)
MAKE(float, unsigned)
MAKE(double, uint2)
MAKE(V, uint4)
"""
# Name of the type in mangled names, the width of its accesses in PTX.
TYPES = {"h": "u8", "6__half": "u16", "13__nv_bfloat16": "u16", "f": "u32", "d": "v2.u32", "Vec": "v4.u32"}


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    inside = Path(home) / "bin" / "nvcc"
    return str(inside) if inside.exists() else shutil.which("nvcc")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[tuple[str, str], list[str]]:
    """(kernel, type) -> its memory instructions in PTX, in order, without operands."""
    compiler = nvcc()
    if compiler is None:
        pytest.skip("no nvcc was found (set CUDA_HOME)")
    folder = tmp_path_factory.mktemp("header")
    (folder / "kernels.cu").write_text(SOURCE, encoding="utf-8")
    command = [
        compiler,
        "-std=c++17",
        "-arch=sm_80",
        "-ptx",
        f"-I{ROOT / 'csrc'}",
        "-o",
        "kernels.ptx",
        "kernels.cu",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for entry in re.split(r"\.entry ", (folder / "kernels.ptx").read_text(encoding="utf-8"))[1:]:
        name = re.match(
            r"_Z\d+(wrapped|plain|hinted)I(?:N5lagkv)?(?:\d*)(Vec|6__half|13__nv_bfloat16|h|f|d)", entry
        )
        assert name, entry[:80]
        accesses = re.findall(r"^\s+((?:ld|st)\.(?!param)[^\s;]+|bar\.[^\s;]+)", entry, flags=re.MULTILINE)
        found[name.group(1), name.group(2)] = accesses
    assert len(found) == 3 * len(TYPES)
    return found


def widths(accesses: list[str]) -> list[str]:
    """A 4-byte load may be .u32, .b32 or .f32, whatever it is used for."""
    return [re.sub(r"\.[bfsu](8|16|32|64)$", r".u\1", access) for access in accesses]


@pytest.mark.parametrize("kind", TYPES)
def test_wrappers_are_free(kernels, kind):
    assert widths(kernels["wrapped", kind]) == widths(kernels["plain", kind])
    assert len(kernels["plain", kind]) == 9


@pytest.mark.parametrize("kind", TYPES)
def test_hints_are_in_the_instruction(kernels, kind):
    width = TYPES[kind]
    accesses = widths(kernels["hinted", kind])
    assert accesses == [
        "ld.global.nc.u8" if width == "u8" else f"ld.global.nc.L1::no_allocate.L2::128B.{width}",
        f"st.global.{width}",
    ]
