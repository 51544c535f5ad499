"""The SIMT executor itself: what it computes and counts on kernels with known answers, and every fault it finds.

The kernels are in ``simt/sample_kernels.cuh`` and ``simt/faulty_kernels.cuh``. A faulty kernel runs right with
``option=1``; a line that may be reported is marked there with ``// FAULT``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests import simt

np = pytest.importorskip("numpy")

try:
    simt.module()
except simt.Unavailable as reason:
    pytest.skip(f"the SIMT executor cannot be built here: {reason}", allow_module_level=True)

ORDERS = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]
every_order = pytest.mark.parametrize(("order", "seed"), ORDERS, ids=[f"{o}{s}" for o, s in ORDERS])


def run(name: str, x, y, session=None, *, group: str = "samples", **launch):
    """Runs a sample kernel and returns its session."""
    session = simt.Session() if session is None else session
    getattr(getattr(simt.module(), group), name)(session, simt.tensor(x), simt.tensor(y), **launch)
    return session


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-99, 100, shape).astype(np.float32)


def sites(session, access: str) -> list[dict]:
    return [site for site in session.launches()[0]["sites"] if site["access"] == access]


# ---- Results ----


@every_order
@pytest.mark.parametrize("option", [0, 1, 2], ids=["xor", "down", "up"])
@pytest.mark.parametrize("suffix", ["", "_double"])
def test_warp_sum(order, seed, option, suffix):
    x = floats(1000).astype(np.float64 if suffix else np.float32)
    y = np.empty(32, x.dtype)
    session = run(
        f"warp_sum{suffix}", x, y, simt.Session(order=order, seed=seed), grid=[4], block=[256], option=option
    )
    assert not session.unwritten()
    np.testing.assert_array_equal(y, np.pad(x, (0, 24)).reshape(32, 32).sum(1))
    # A warp shuffle moves 4 bytes per lane.
    assert session.counts()["shuffles"] == 32 * 5 * (2 if suffix else 1)


@every_order
def test_block_sum(order, seed):
    x, y = floats(1000), np.empty(4, np.float32)
    session = run("block_sum", x, y, simt.Session(order=order, seed=seed), grid=[4], block=[256])
    np.testing.assert_array_equal(y, np.pad(x, (0, 24)).reshape(4, 256).sum(1))
    counts = session.counts()
    assert counts["barriers"] == 4
    assert counts["shuffles"] == 4 * (8 * 5 + 3)
    assert session.launches()[0]["static_shared_bytes"] == 32


@every_order
@pytest.mark.parametrize("count", [1, 31, 256, 1000])
def test_prefix_sum_by_ballot(order, seed, count):
    x, y = floats(count).astype(np.int32), np.full(count + 1, -7, np.int32)
    session = simt.Session(order=order, seed=seed)
    run("positive_indices", x, y, session, block=[256], shared_bytes=32, keeps_y=True)
    expected = np.flatnonzero(x > 0)
    assert y[count] == len(expected)
    np.testing.assert_array_equal(y[: len(expected)], expected)
    assert np.all(y[len(expected) : count] == -7)
    assert session.counts()["votes"] == 8 * -(-count // 256)


@every_order
def test_histogram_by_atomics(order, seed):
    x = np.random.default_rng(1).integers(0, 1000, 3000).astype(np.int32)
    y = np.zeros(64, np.int32)
    session = simt.Session(order=order, seed=seed)
    run("histogram", x, y, session, grid=[3], block=[256], keeps_y=True)
    np.testing.assert_array_equal(y, np.bincount(x % 64, minlength=64))
    assert session.counts()["shared_atomic"]["lanes"] == 3000
    assert session.counts()["global_atomic"]["lanes"] == 3 * 64


@every_order
def test_exchange_through_syncwarp(order, seed):
    x, y = floats(512), np.empty(512, np.float32)
    session = run("warp_reverse", x, y, simt.Session(order=order, seed=seed), grid=[2], block=[256])
    np.testing.assert_array_equal(y.reshape(-1, 32), x.reshape(-1, 32)[:, ::-1])
    assert session.counts()["warp_barriers"] == 16 * 6
    assert session.counts()["barriers"] == 0


def expected_collectives(v: np.ndarray) -> np.ndarray:
    lane = np.arange(32)
    as_int = v.astype(np.int32)
    unsigned = as_int.astype(np.uint32)
    quarter = np.trunc(v / 4)

    def shuffle(source, ok):
        return v[np.where(ok, source, lane)]

    def whole(value):
        return np.full(32, value, np.float32)

    ballot = int(sum(1 << i for i in range(32) if v[i] > 0))
    return np.stack(
        [
            v[lane * 7 % 32],
            v[lane // 8 * 8 + 3],
            shuffle(lane - 3, lane % 16 >= 3),
            shuffle(lane + 5, lane % 8 + 5 < 8),
            # lane ^ 9 leaves the group of 8: into the group below it may reach, into the one above not.
            shuffle(lane ^ 9, (lane ^ 9) <= (lane | 7)),
            whole(ballot >> 16),
            whole(np.any(v > 1000)),
            whole(np.all(v > -1000)),
            np.array([(quarter == q).sum() for q in quarter]),
            whole(as_int.sum()),
            whole(as_int.max()),
            whole(np.float32(unsigned.min())),
            np.where(lane < 16, v[lane ^ 1], v[lane ^ 2]),
            whole((v > 0).sum()),
            whole(np.any(v > 1000)),
            whole(np.all(v > -1000)),
        ]
    ).astype(np.float32)


@every_order
def test_collectives_lane_by_lane(order, seed):
    x, y = floats(32), np.empty((16, 32), np.float32)
    session = run("collectives", x, y, simt.Session(order=order, seed=seed))
    np.testing.assert_array_equal(y, expected_collectives(x))
    assert not session.unwritten()


@every_order
def test_lanes_may_meet_in_parts(order, seed):
    x, y = floats(32), np.empty((2, 32), np.float32)
    run("meet_in_parts", x, y, simt.Session(order=order, seed=seed))
    lane = np.arange(32)
    first = np.where(lane < 4, x[lane ^ 1], x)
    first = np.where(lane < 8, first[lane ^ 4], first)
    second = first.copy()
    for turn in range(3):
        second = np.where((lane >= 16) & (turn < lane // 8), second + second[lane ^ 1], second)
    np.testing.assert_array_equal(y, np.stack([first, second[lane ^ 31]]))


def test_orders_differ_and_seeds_repeat():
    def tickets(order, seed=0):
        y = np.zeros(513, np.int32)
        session = simt.Session(order=order, seed=seed)
        run("tickets", y[:1].copy(), y, session, grid=[2], block=[256], count=512, keeps_y=True)
        assert sorted(y[:512]) == list(range(512))
        return y[:512].tolist()

    assert tickets("forward") == list(range(512))
    assert tickets("reverse") == list(range(512))[::-1]
    assert tickets("random", 3) == tickets("random", 3)
    assert len({tuple(tickets("random", seed)) for seed in range(4)}) == 4


def test_detectors_and_counters_can_be_switched_off():
    x, y = floats(1000), np.empty(4, np.float32)
    session = run("block_sum", x, y, simt.Session(detect=False, count=False), grid=[4], block=[256])
    np.testing.assert_array_equal(y, np.pad(x, (0, 24)).reshape(4, 256).sum(1))
    assert session.counts()["global_read"]["requests"] == 0
    # Bounds hold all the same.
    with pytest.raises(simt.Fault, match=r"^out-of-bounds: "):
        run("read_before_start", *ints(), simt.Session(detect=False, count=False), group="faulty")


# ---- Counters ----


def test_coalesced_vectors_use_every_byte_of_a_sector():
    x = torch.arange(4096, dtype=torch.float16)
    y = torch.empty_like(x)
    session = run("copy_vectors", x, y, grid=[2], block=[256])
    assert torch.equal(x, y)
    for access in ("global_read", "global_write"):
        counts = session.counts()[access]
        assert counts["bytes"] == counts["unique_bytes"] == 8192
        assert counts["requests"] == 16
        assert counts["sectors"] == 256
        assert counts["sector_efficiency"] == 1
        assert [site["size"] for site in sites(session, access)] == [16]
    assert session.launches()[0]["kernel"] == "copy_vectors"
    assert session.launches()[0]["grid"] == (2, 1, 1)


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (16, 32)])
def test_sectors_of_strided_reads(stride, sectors):
    x, y = floats(64 * stride), np.empty(64, np.float32)
    session = run("gather_strided", x, y, block=[64], count=64, option=stride)
    np.testing.assert_array_equal(y, x[::stride])
    read = session.counts()["global_read"]
    assert (read["requests"], read["sectors"]) == (2, 2 * sectors)
    assert read["sector_efficiency"] == 128 / (32 * sectors)
    assert read["unique_bytes"] == 256


def test_an_offset_costs_a_sector():
    """Storages start at a multiple of 256 bytes wherever the host has put them."""
    x, y = floats(65), np.empty(64, np.float32)
    session = run("gather_strided", x[1:], y, block=[64], count=64, option=1)
    np.testing.assert_array_equal(y, x[1:])
    assert session.counts()["global_read"]["sectors"] == 2 * 5


def test_a_broadcast_is_one_sector():
    x, y = floats(1), np.empty(32, np.float32)
    read = run("gather_strided", x, y, count=32, option=0).counts()["global_read"]
    assert (read["bytes"], read["useful_bytes"], read["sectors"], read["unique_bytes"]) == (128, 4, 1, 4)


def test_requests_of_diverged_lanes_are_matched_by_turn():
    """Lane l reads x[0], ..., x[l]: turn j is one request of one address by the lanes from j on."""
    x, y = floats(32), np.empty(64, np.float32)
    session = run("uneven_loops", x, y, block=[64], count=64)
    np.testing.assert_allclose(y, np.tile(np.cumsum(x), 2))
    (site,) = sites(session, "global_read")
    assert site["lanes"] == 2 * 32 * 33 // 2
    assert site["requests"] == site["sectors"] == 2 * 32
    assert site["useful_bytes"] == 2 * 32 * 4


@pytest.mark.parametrize(
    ("suffix", "padding", "extra"),
    # 4 bytes: a column of 32 words lies in one bank, with padding in 32. 8 bytes, in two halves of a warp: 16 each.
    [("", 0, 31), ("", 1, 0), ("_double", 0, 30), ("_double", 1, 0)],
)
def test_bank_conflicts_of_a_transpose(suffix, padding, extra):
    x = floats(32, 32).astype(np.float64 if suffix else np.float32)
    y = np.empty_like(x)
    session = run(
        f"transpose{suffix}",
        *(x, y),
        block=[32, 32],
        shared_bytes=32 * (32 + padding) * x.itemsize,
        option=padding,
    )
    np.testing.assert_array_equal(y, x.T)
    counts = session.counts()
    phases = 2 if suffix else 1
    assert counts["shared_write"]["extra_wavefronts"] == 0
    assert counts["shared_write"]["wavefronts"] == 32 * phases
    assert counts["shared_read"]["extra_wavefronts"] == 32 * extra
    assert counts["shared_read"]["wavefronts"] == 32 * (phases + extra)


def test_call_sites_are_named():
    x, y = floats(32, 32), np.empty((32, 32), np.float32)
    session = run("transpose", x, y, block=[32, 32], shared_bytes=4096)
    source = (Path(__file__).parent / "sample_kernels.cuh").read_text(encoding="utf-8").splitlines()
    for access, function in [("global_read", "ld_global_nc"), ("shared_read", "ld_shared")]:
        (site,) = sites(session, access)
        assert site["file"] == "tests/simt/sample_kernels.cuh"
        assert function in source[site["line"] - 1]
        assert "transpose" in site["function"]
    assert sum(site["bytes"] for site in session.launches()[0]["sites"]) == 4 * 4096


# ---- Buffers ----


def test_written_tells_element_by_element():
    buffer = torch.zeros(4, 16)
    y = buffer[:, :8]
    session = run("gather_strided", floats(20), y.view(4, 8)[:2], count=8, option=1, block=[8])
    assert session.unwritten() == [("y", 8)]
    assert list(session.written("y")) == [1] * 8 + [0] * 8
    with pytest.raises(RuntimeError, match="no tensor is named 'z'"):
        session.written("z")


def test_outputs_start_poisoned():
    y = torch.zeros(8)
    run("gather_strided", floats(4), y, count=4, option=1, block=[8])
    assert torch.isnan(y[4:]).all()
    assert not torch.isnan(y[:4]).any()


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_the_gaps_of_a_view_are_out_of_bounds(kind):
    storage = torch.zeros(4, 16) if kind == "torch" else np.zeros((4, 16), np.float32)
    y = np.empty(9, np.float32)
    run("gather_strided", storage[1:3, :8], y[:8], count=8, option=1, block=[9])
    for count, view, where in [
        (9, storage[1:3, :8], r"between the rows of 'x' \[2, 8\], 32 bytes after its start"),
        (9, storage[3:, :8], r"0 bytes past the end of 'x' \[1, 8\]"),
        (9, storage[0, :8], r"0 bytes past the end of 'x' \[8\]"),
    ]:
        with pytest.raises(simt.Fault, match=rf"^out-of-bounds: .*{where}"):
            run("gather_strided", view, y, count=count, option=1, block=[9])


def test_two_tensors_of_one_storage():
    storage = torch.arange(64, dtype=torch.float32)
    session = run("gather_strided", storage[:32], storage[32:], count=32, option=1)
    assert torch.equal(storage[:32], storage[32:])
    assert not session.unwritten()
    with pytest.raises(
        RuntimeError, match="'y' shares memory with another tensor, or with itself, and is written"
    ):
        run("gather_strided", storage[:32], storage[31:63], count=32, option=1)
    with pytest.raises(
        RuntimeError, match="'y' shares memory with another tensor, or with itself, and is written"
    ):
        run("gather_strided", storage[:32], storage[32:33].expand(32), count=32, option=1)


def test_a_second_launch_reads_what_the_first_wrote():
    x, y = floats(32), np.empty(32, np.float32)
    session = simt.Session()
    run("gather_strided", x, y, session, count=32, option=1)
    with pytest.raises(RuntimeError, match="two tensors are named 'x'"):
        run("gather_strided", x, y, session, count=32, option=1)
    assert len(session.launches()) == 1


def test_empty_tensors_are_no_address_to_read():
    x, y = np.empty(0, np.float32), np.empty(4, np.float32)
    with pytest.raises(simt.Fault, match=r"^out-of-bounds: .*'x' \[0\], which is empty"):
        run("gather_strided", x, y, count=4, option=1)


def test_offsets_beyond_32_bits():
    """A storage of 5 GiB, of which two pages are touched."""
    step = (1 << 30) + 5
    x = torch.empty(step + 1)
    x[0], x[step] = 1.5, 2.5
    y = np.empty(2, np.float32)
    run("gather_strided", x.as_strided((2,), (step,)), y, count=2, option=step)
    assert y.tolist() == [1.5, 2.5]
    with pytest.raises(simt.Fault, match=rf"^out-of-bounds: .* {4 * step - 4} bytes past the end of 'x'"):
        run("gather_strided", x.as_strided((2,), (step,)), np.empty(3, np.float32), count=3, option=step)


def test_element_sizes_must_agree():
    with pytest.raises(RuntimeError, match="'x' has elements of 8 bytes, the kernel's have 4"):
        run("warp_sum", np.zeros(32), np.zeros(1, np.float32))


# ---- Faults ----


@dataclass
class Planted:
    """A kernel with a fault, the kinds it may be reported as, and how it is launched."""

    name: str
    kinds: str
    launch: dict = field(default_factory=dict)
    right: dict = field(
        default_factory=dict
    )  # the launch of its right twin, where another option alone is not it
    whole: bool = True  # the twin writes all of y


def planted(name, kinds, *, right=None, whole=True, **launch):
    return pytest.param(Planted(name, kinds, launch, right or {}, whole), id=name)


TWO_WARPS = {"block": [64]}
FAULTS = [
    planted("read_past_end", "out-of-bounds", block=[96]),
    planted("read_before_start", "out-of-bounds", whole=False),
    planted("write_past_end", "out-of-bounds", grid=[2], block=[64]),
    planted("dynamic_shared_past_end", "out-of-bounds", shared_bytes=128, whole=False),
    planted("static_shared_past_end", "out-of-bounds", whole=False),
    planted("no_dynamic_shared", "out-of-bounds", right={"shared_bytes": 32}, whole=False),
    planted("misaligned_global", "misaligned", whole=False),
    planted("misaligned_shared", "misaligned", whole=False),
    planted("uninitialised_global", "uninitialised", **TWO_WARPS),
    planted("uninitialised_shared", "uninitialised", whole=False),
    planted("stale_shared", "uninitialised", grid=[2]),
    planted("write_input", "read-only", **TWO_WARPS),
    planted("stale_read_only_path", "read-only-path", **TWO_WARPS),
    planted("early_read_only_path", "read-only-path", keeps_y=True, **TWO_WARPS),
    planted("missing_barrier", "race", **TWO_WARPS),
    planted("missing_barrier_before_overwrite", "race", **TWO_WARPS),
    planted("two_writers", "race", **TWO_WARPS),
    planted("two_writers_of_a_byte", "race", **TWO_WARPS),
    planted("warp_barrier_across_warps", "race", **TWO_WARPS),
    planted("half_warp_barrier", "race", whole=False),
    planted("chain_of_warp_barriers", "race", whole=False),
    planted("shuffle_as_barrier", "race", whole=False),
    planted("plain_access_beside_atomics", "race", **TWO_WARPS),
    planted("global_shift_in_place", "race", keeps_y=True, **TWO_WARPS),
    planted("two_blocks_write", "race-between-blocks", grid=[64]),
    planted("block_reads_what_another_writes", "race-between-blocks", grid=[2], keeps_y=True),
    planted("blocks_add_up", "race-between-blocks", grid=[2], block=[1], keeps_y=True),
    planted("early_exit_before_barrier", "barrier-divergence", **TWO_WARPS),
    planted("barrier_in_branch", "barrier-divergence", **TWO_WARPS),
    planted("two_barriers_in_branches", "barrier-divergence", **TWO_WARPS),
    planted("caller_not_in_mask", "bad-mask", **TWO_WARPS),
    planted("masks_differ", "bad-mask", **TWO_WARPS),
    planted("lane_exited", "bad-mask", **TWO_WARPS),
    planted("lane_exits_later", "bad-mask", **TWO_WARPS),
    planted("lane_waits_at_barrier", "bad-mask", **TWO_WARPS),
    planted("full_mask_in_branch", "bad-mask", **TWO_WARPS),
    planted("circle_of_masks", "deadlock", **TWO_WARPS),
    planted("full_mask_in_partial_warp", "bad-mask", block=[40], whole=False),
    planted("source_not_in_mask", "bad-mask", whole=False),
    planted("odd_width", "bad-mask", **TWO_WARPS),
    planted("plain_global_read", "plain-access", **TWO_WARPS),
    planted("plain_shared_write", "plain-access", whole=False),
    planted("null_pointer", "out-of-bounds", **TWO_WARPS),
    planted("wrong_space", "out-of-bounds", **TWO_WARPS),
    planted("stack_overflow", "plain-access", **TWO_WARPS),
    planted("division_by_zero", "arithmetic", **TWO_WARPS),
    planted("trap", "trap", **TWO_WARPS),
    planted("waits_for_a_flag", "no-progress", **TWO_WARPS),
]
# A wrapper that knows its line does not see what these do.
NO_LINE = {"plain-access", "arithmetic"}
SOURCE = Path(__file__).parent / "faulty_kernels.cuh"


def ints() -> tuple[np.ndarray, np.ndarray]:
    return np.arange(64, dtype=np.int32), np.zeros(64, np.int32)


def marked_lines() -> dict[str, set[int]]:
    """The lines of every faulty kernel that are marked as those to be reported."""
    marked: dict[str, set[int]] = {}
    kernel = ""
    for number, line in enumerate(SOURCE.read_text(encoding="utf-8").splitlines(), start=1):
        found = re.match(r"__global__ void (\w+)\(", line)
        kernel = found.group(1) if found else kernel
        if line.endswith("// FAULT"):
            marked.setdefault(kernel, set()).add(number)
    return marked


@every_order
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, order, seed):
    session = simt.Session(order=order, seed=seed, max_accesses=100_000)
    with pytest.raises(simt.Fault) as found:
        run(fault.name, *ints(), session, group="faulty", **fault.launch)
    message = str(found.value)
    assert message.startswith(f"{fault.kinds}: ")
    assert re.search(
        rf"; kernel {fault.name}, block \(\d+, 0, 0\), thread \(\d+, 0, 0\) \(warp \d, lane \d+\)", message
    )
    if fault.kinds not in NO_LINE:
        cited = [
            int(line)
            for line in re.findall(r"at tests/simt/faulty_kernels.cuh:(\d+) \(void faulty::", message)
        ]
        assert cited, message
        assert set(cited) <= marked_lines()[fault.name], message
    # The executor has got over it.
    x, y = floats(256), np.empty(8, np.float32)
    run("warp_sum", x, y, block=[256])
    np.testing.assert_array_equal(y, x.reshape(8, 32).sum(1))


@every_order
@pytest.mark.parametrize("fault", FAULTS)
def test_its_right_twin_is_not_reported(fault, order, seed):
    results = []
    for chosen in [(order, seed), ("forward", 0)]:
        session = simt.Session(order=chosen[0], seed=chosen[1], max_accesses=100_000)
        x, y = ints()
        run(fault.name, x, y, session, group="faulty", **{**fault.launch, **fault.right, "option": 1})
        assert not (fault.whole and session.unwritten())
        results.append(y)
    np.testing.assert_array_equal(*results)


def test_every_faulty_kernel_is_planted():
    kernels = {name for name in dir(simt.module().faulty) if not name.startswith("_")}
    tested = {parameter.values[0].name for parameter in FAULTS}
    assert kernels - tested == {"leaves_output_unwritten", "throws"}


def test_unwritten_outputs_are_reported():
    session = run("leaves_output_unwritten", *ints(), group="faulty", block=[64])
    assert session.unwritten() == [("y", 1)]
    assert list(session.written("y")) == [1] * 63 + [0]
    assert not run("leaves_output_unwritten", *ints(), group="faulty", block=[64], option=1).unwritten()


def test_exceptions_leave_the_kernel():
    with pytest.raises(RuntimeError, match=r"^thrown inside a kernel$"):
        run("throws", *ints(), group="faulty", block=[64])
    run("throws", *ints(), group="faulty", block=[64], option=1)


def test_races_between_blocks_can_be_allowed():
    session = simt.Session(races_between_blocks=False)
    x, y = ints()
    run("blocks_add_up", x, y, session, group="faulty", grid=[5], block=[1], keeps_y=True)
    assert y[0] == 5


@pytest.mark.parametrize(
    ("launch", "text"),
    [
        ({"grid": [0]}, "a grid has 1 to 2147483647 x 65535 x 65535 blocks, got 0 x 1 x 1"),
        ({"grid": [1, 65536]}, "got 1 x 65536 x 1"),
        ({"block": [0]}, "a block has 1 to 1024 threads, got 0 x 1 x 1"),
        ({"block": [1025]}, "got 1025 x 1 x 1"),
        ({"block": [1, 1, 65]}, "got 1 x 1 x 65"),
        ({"shared_bytes": 227 * 1024 + 1}, "at most 232448 bytes of shared memory, got 232449"),
    ],
)
def test_bad_launches_are_refused(launch, text):
    with pytest.raises(simt.Fault, match=rf"^bad-launch: .*{text}; kernel warp_sum"):
        run("warp_sum", floats(32), np.empty(1, np.float32), **launch)


def test_options_are_checked():
    with pytest.raises(ValueError, match="order must be 'forward', 'reverse' or 'random', got 'backward'"):
        simt.Session(order="backward")


def test_signals_of_other_code_are_left_alone():
    """After a launch a segmentation fault of the process ends it as ever."""
    folder = str(Path(simt.module().__file__).parent)
    script = f"""
import sys; sys.path.insert(0, {folder!r})
import ctypes, lagkv_simt
def tensor():
    memory = ctypes.create_string_buffer(128)
    return lagkv_simt.Tensor(ctypes.addressof(memory), 4, [32], [1], ctypes.addressof(memory), 128, memory)
try: lagkv_simt.faulty.plain_global_read(lagkv_simt.Session(), tensor(), tensor())
except lagkv_simt.Fault: print('found', flush=True)
ctypes.string_at(16)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "found\n"
    assert done.returncode == -11, done.stderr
