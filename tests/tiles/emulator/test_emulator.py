"""The emulator itself, on small hand-written texts: what it computes, and that it finds what it should."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest
import torch
from emulation import WAYS, Emulation, Found, Way

from tiles.compiler.cuda_launcher import Launch, Plan
from tiles.kernels.spec import Argument

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH: the emulator cannot be compiled")

LATE = Way(3, late=True)
MORE = pytest.mark.slow
"""More of a kind that the fast tier has: each case is a text to compile."""


@pytest.fixture
def emulation(emulator, tmp_path):
    """Builds a kernel's body for thread blocks that share `a` and write `b`; tokens are rows of 32 floats in both."""

    def made(body: str, threads: int = 64, shared: int = 8192, blocks: str = "1") -> Emulation:
        text = (
            'extern "C" __global__ void kernel(const float *a, float *b, int tokens) {\n'
            "  extern __shared__ __align__(1024) uchar shared[];\n  int t = threadIdx.x;\n"
            f"  float *floats = (float *)shared;\n{body}\n}}\n"
        )
        arguments = [
            Argument(name, ("tokens", 32), "float32", role) for name, role in (("a", "input"), ("b", "output"))
        ]
        plan = Plan((Launch("kernel", ("a", "b", "tokens"), (blocks, "1", "1"), (threads, 1, 1), shared),))
        return Emulation(tmp_path, emulator, text, plan, arguments)

    return made


@pytest.fixture
def run(emulation):
    """Runs a kernel's body on `a`."""

    def made(body: str, a: torch.Tensor, *, way: Way = LATE, **block: Any) -> torch.Tensor:
        rows = a.view(torch.float32).view(-1, 32)
        return emulation(body, **block).run({"a": rows}, len(rows), way)["b"]

    return made


def numbers(*shape: int) -> torch.Tensor:
    """Small whole numbers, whose sums of products are exact."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(0)).float()


def line_of(number: int) -> str:
    """A line of the body, as a finding names it; the launcher's text begins with one line, the kernel with four."""
    return f"line {number + 5}"


TURN = "floats[t] = a[t];\n__syncthreads();\nb[t] = floats[63 - t];"
COPY = "tl::cp_async_gs<4>(floats + t, a + t);\ntl::cp_async_commit();\ntl::cp_async_wait<0>();\n__syncthreads();\n"


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_threads_share_memory_across_a_barrier(run, way):
    a = numbers(2, 32)
    assert torch.equal(run(TURN, a, way=way).flatten(), a.flatten().flip(0))


def test_a_removed_barrier_is_found_with_both_lines(run):
    with pytest.raises(
        Found, match=r"race in block \(0, 0, 0\): thread \d+ (reads|writes) shared\+\d+ at line \d"
    ) as e:
        run(TURN.replace("__syncthreads();", ""), numbers(2, 32))
    assert set(re.findall(r"line \d+", str(e.value))) == {line_of(1), line_of(3)}


@pytest.mark.parametrize("threads", ["64", "32"])
def test_a_barrier_of_one_warp_orders_that_warp_alone(run, threads):
    body = f"floats[t] = a[t];\ntl::__sync_thread_partial(1 + t / {threads}, {threads});\nb[t] = floats[t ^ 32];"
    if threads == "64":
        run(body, numbers(2, 32))
    else:
        with pytest.raises(Found, match="race"):
            run(body, numbers(2, 32))


def test_a_block_of_a_quarter_of_a_warp_may_synchronise_as_a_whole(run):
    a = numbers(1, 32)
    got = run("floats[t] = a[t];\n__syncthreads();\nb[t] = floats[7 - t];", a, threads=8)
    assert torch.equal(got[0, :8], a[0, :8].flip(0))


def test_a_shuffle_orders_no_memory_but_syncwarp_does(run):
    body = "floats[t] = a[t];\nORDER\nb[t] = floats[t ^ 1];"
    run(body.replace("ORDER", "__syncwarp();"), numbers(2, 32))
    with pytest.raises(Found, match="race"):
        run(body.replace("ORDER", "__shfl_xor_sync(~0u, t, 1);"), numbers(2, 32))


def test_what_comes_after_a_syncwarp_is_not_ordered_by_it(run):
    body = "floats[t] = a[t];\n__syncwarp();\nfloats[64 + t] = floats[t ^ 1];\nb[t] = floats[64 + (t ^ 1)];"
    with pytest.raises(Found, match=rf"race .* {line_of(4)}"):
        run(body, numbers(2, 32))


@pytest.mark.parametrize("seed", range(4))
def test_a_writer_must_be_ordered_with_every_reader(run, seed):
    body = "floats[t] = a[t];\n__syncthreads();\nb[t] = floats[0];\n__syncwarp();\nif (t == 0) floats[0] = 9;"
    with pytest.raises(Found, match=r"thread 0 writes shared\+\d .* which thread (3[2-9]|[45]\d|6[0-3]) read"):
        run(body, numbers(2, 32), way=Way(seed, late=False))


def test_the_same_value_written_twice_is_no_race_but_another_one_is(run):
    body = "floats[t / 2] = VALUE;\n__syncthreads();\nb[t] = floats[t / 2];"
    run(body.replace("VALUE", "a[0]"), numbers(2, 32))
    with pytest.raises(Found, match=r"writes shared.* wrote"):
        run(body.replace("VALUE", "a[t]"), torch.arange(64.0))


def test_blocks_may_not_write_what_another_one_reads_or_writes(run):
    a = torch.arange(64.0)
    with pytest.raises(Found, match="another block wrote"):
        run("b[t] = a[blockIdx.x];", a, blocks="2")
    with pytest.raises(Found, match="another block"):
        run("b[32 * blockIdx.x + t] = a[t];\nfloats[t] = b[32 - 32 * blockIdx.x + t];", a, blocks="2", threads=32)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("b[t + 1] = a[t];", r"invalid access .* writes 4 bytes, 4 bytes past the end of b, at line 6"),
        ("b[t] = a[t - 1];", r"invalid access .* reads 4 bytes, 4 bytes before a, at line 6"),
        ("b[t] = floats[2048];", r"invalid access .* past the end of shared"),
        ("((float *)a)[t] = 0;", r"invalid access .* writes a\+\d+, an input"),
        ("((float4 *)floats)[t] = ((float4 *)(a + t))[0];", r"misaligned access .* reads 16 bytes"),
        ("((float4 *)(floats + 1))[0] = ((float4 *)a)[0];", r"misaligned access .* writes 16 bytes"),
        ("tl::cp_async_gs<16>(floats + t, a + t);", r"misaligned access"),
        ("tl::cp_async_gs<4>(b + t, a + t);", r"invalid access .* copies to no shared memory"),
        ("if (t < 33) __syncthreads();", r"deadlock .*wait in barrier 0 at line 6.* have ended"),
        ("if (t < 32) __syncthreads();\nelse\n__syncthreads();", r"divergence .* line \d"),
        ("if (t != 5) __shfl_sync(~0u, t, 0);", r"deadlock .*wait in a shuffle at line 6"),
        ("if (t & 1) __shfl_xor_sync(0xaaaaaaaa, t, 1);", r"shuffles from lane \d+, which does not take part"),
        ("tl::__sync_thread_partial(1, 48);", r"invalid barrier"),
    ],
)
def test_what_a_kernel_must_not_do_is_found(run, body, found):
    with pytest.raises(Found, match=found):
        run(body, numbers(2, 32))


def test_more_shared_memory_than_asked_for_is_refused(run):
    with pytest.raises(AssertionError, match="status 1"):
        run("b[t] = a[t];", numbers(2, 32), shared=2**20)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_copies_arrive_and_a_missing_wait_or_barrier_is_found(run, way):
    a = numbers(2, 32)
    body = COPY + "b[t] = floats[63 - t];"
    assert torch.equal(run(body, a, way=way).flatten(), a.flatten().flip(0))
    with pytest.raises(Found, match="no wait"):
        run(body.replace("wait<0>", "wait<1>"), a, way=way)
    with pytest.raises(Found, match="race"):
        run(body.replace("__syncthreads();", ""), a, way=way)
    with pytest.raises(Found, match="no wait"):
        run(body.replace("tl::cp_async_wait<0>();\n", ""), a, way=way)


def test_a_copy_without_source_fills_with_zeros(run):
    body = COPY.replace("gs<4>(floats + t, a + t)", "gs_conditional<4>(floats + t, a + t + 64 * (t >= 8), t < 8)")
    got = run(body + "b[t] = floats[t];", torch.arange(1.0, 65.0)).flatten()
    assert torch.equal(got, torch.where(torch.arange(64) < 8, torch.arange(1.0, 65.0), 0))


def test_copies_are_waited_for_by_groups_oldest_first(run):
    group = "tl::cp_async_gs<4>(floats + {} + t, a + t);\ntl::cp_async_commit();\n"
    body = "".join(map(group.format, (0, 64, 128))) + "tl::cp_async_wait<1>();\nb[t] = floats[PLACE + t];"
    a = numbers(2, 32)
    for place in ("0", "64"):
        assert torch.equal(run(body.replace("PLACE", place), a), a)
    with pytest.raises(Found, match="no wait"):
        run(body.replace("PLACE", "128"), a)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16_t", torch.bfloat16), ("half_t", torch.float16)])
def test_numbers_are_rounded_as_torch_rounds_them(run, name, dtype):
    """Ties, what is too large or too small, and NaN, also one whose upper 16 bits alone would be infinite."""
    chance = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (64,), generator=chance).to(torch.int32)
    bits[:32] = (torch.randint(0x3C00, 0x4400, (32,), generator=chance) << 16).int() + 0x8000 * (
        torch.arange(32) % 4 == 0
    )
    bits[32:37] = torch.tensor([0x7F800001, 0x7FC00000, 0x7F800000, 0x7F7FFFFF, 1])
    a = bits.int().view(torch.float32)
    got = run(f"b[t] = {name}(a[t]);", a).flatten()
    torch.testing.assert_close(got, a.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("shuffle", "source"),
    [
        ("__shfl_xor_sync(~0u, v, 5)", lambda t: t ^ 5),
        ("__shfl_sync(~0u, v, 3, 8)", lambda t: t // 8 * 8 + 3),
        ("__shfl_up_sync(~0u, v, 2)", lambda t: t - 2 * (t % 32 >= 2)),
        ("__shfl_down_sync(~0u, v, 3, 16)", lambda t: t + 3 * (t % 16 < 13)),
    ],
)
def test_shuffles(run, shuffle, source):
    got = run(f"float v = t;\nb[t] = {shuffle};", numbers(2, 32)).flatten()
    assert torch.equal(got, source(torch.arange(64)).float())


def test_sums_over_a_warp_and_over_the_block(run):
    a = numbers(2, 32)
    body = "b[t] = tl::AllReduce<tl::SumOp, {}, 1, 0, tl::NamedBarrier<64>>::run(a[t], floats);"
    assert torch.equal(run(body.format(32), a), a.sum(1, keepdim=True).expand(2, 32))
    assert torch.equal(run(body.format(64), a), a.sum().expand(2, 32))


@pytest.mark.parametrize(
    ("kind", "dtype", "turned"),
    [
        ("kBFloat16", torch.bfloat16, False),
        ("kFloat16", torch.float16, True),
        pytest.param("kBFloat16", torch.bfloat16, True, marks=MORE),
        pytest.param("kFloat16", torch.float16, False, marks=MORE),
    ],
)
def test_a_warps_product_of_loaded_matrices(run, kind, dtype, turned):
    """b = x·yᵀ, x and y of 16 × 16; the second operand is stored as yᵀ where it is turned when loaded."""
    x, y = numbers(16, 16), numbers(16, 16).flip(0)
    a = torch.cat([x, y.T if turned else y]).to(dtype).contiguous()
    ways = "row = t % 16, column = t / 16 * 8", "row = t % 8 + t / 16 * 8, column = t / 8 % 2 * 8"
    load, of_b = ("x4_trans", ways[0]) if turned else ("x4", ways[1])
    body = f"""
  typedef unsigned short number;
  for (int i = t; i < 512; i += 32) ((number *)shared)[i] = ((number *)a)[i];
  __syncwarp();
  unsigned x[4], y[4];
  float sums[8] = {{}};
  {{ int {ways[0]}; tl::ptx_ldmatrix_x4((number *)shared + row * 16 + column, x); }}
  {{ int {of_b}; tl::ptx_ldmatrix_{load}((number *)shared + 256 + row * 16 + column, y); }}
  for (int j = 0; j < 2; ++j)
    tl::mma_sync<tl::DataType::{kind}, tl::DataType::{kind}, tl::DataType::kFloat32, 16, 8, 16, false, true>(
        sums + 4 * j, x, y + 2 * j);
  for (int i = 0; i < 8; ++i) b[(t / 4 + i / 2 % 2 * 8) * 16 + i / 4 * 8 + t % 4 * 2 + i % 2] = sums[i];"""
    assert torch.equal(run(body, a.view(torch.float32), threads=32).view(16, 16), x @ y.T)


def laid_out(matrix: torch.Tensor, chunks: int, turned: bool) -> tuple[torch.Tensor, int, int]:
    """Rows × 16 elements of 16 bits as wgmma wants them in shared memory, 8 KiB; leading and stride offset in bytes.

    `chunks` of 16 bytes lie side by side, eight times below each other; a swizzle (chunks > 1) exchanges them by the
    128 bytes that they are in. `turned`: along the rows, not along the inner elements.
    """
    image = torch.zeros(4096, dtype=torch.bfloat16)
    leading, stride = (1024 * chunks, 128 * chunks) if chunks > 1 else (2048, 128)
    for row in range(matrix.shape[0]):
        for k in range(16):
            along, across = (row, k) if turned else (k, row)
            chunk, atom = along // 8 % chunks, along // (8 * chunks)
            swizzled = chunk ^ (across % 8 * chunks // 8)
            step, jump = (leading, stride) if chunks > 1 or not turned else (stride, leading)
            place = atom * step + across // 8 * jump + across % 8 * 16 * chunks + swizzled * 16 + along % 8 * 2
            image[place // 2] = matrix[row, k]
    return image, leading, stride


WGMMA = """
  float sums[32] = {};
  for (int i = 0; i < 32; ++i) floats[128 * i + t] = a[128 * i + t];
  __syncthreads();
  tl::GmmaDescriptor x, y;
  tl::initialize_wgmma_descriptor<OF_X>(x, shared);
  tl::initialize_wgmma_descriptor<OF_Y>(y, shared);
  tl::increase_descriptor_offset<int>(y, 8192);
  tl::warpgroup_arrive();
  tl::fence_proxy_async();
  tl::wgmma_ss<tl::DataType::kBFloat16, tl::DataType::kBFloat16, tl::DataType::kFloat32, 64, 64, 16, TURNED, 1, 1>(
      uint64_t(x), uint64_t(y), (uint32_t *)sums, 1);
  tl::warpgroup_commit_batch();
  tl::warpgroup_wait<0>();
  for (int i = 0; i < 32; ++i)
    b[(t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * 64 + i / 4 * 8 + t % 4 * 2 + i % 2] = sums[i];"""


def wgmma(chunks: int = 8, turned: tuple[bool, bool] = (False, False)) -> tuple[str, torch.Tensor, torch.Tensor]:
    """A kernel's body, its input, and x·yᵀ of 64 × 64."""
    x, y = numbers(64, 16), numbers(64, 16).flip(0)
    images, body = [], WGMMA.replace("TURNED", ", ".join(map(str, turned)).lower())
    for name, matrix, along_rows in (("OF_X", x, turned[0]), ("OF_Y", y, turned[1])):
        image, leading, stride = laid_out(matrix, chunks, along_rows)
        body = body.replace(name, f"{ {8: 1, 4: 2, 2: 3, 1: 0}[chunks] }, {leading // 16}, {stride // 16}")
        images.append(image)
    return body, torch.cat(images).view(torch.float32), x @ y.T


TURNED = ((False, False), (False, True), (True, False), (True, True))
LAYOUTS = (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("chunks", "turned"),
    [
        pytest.param(chunks, turned, marks=() if number == place else MORE)
        for place, chunks in enumerate(LAYOUTS)
        for number, turned in enumerate(TURNED)
    ],
    ids=str,
)
def test_a_warpgroups_product_from_shared_memory(run, chunks, turned):
    body, a, wanted = wgmma(chunks, turned)
    assert torch.equal(run(body, a, threads=128, shared=16384).view(64, 64), wanted)


def test_what_is_missing_around_a_warpgroups_product_is_found(run):
    body, a, wanted = wgmma()

    def broken(old: str, new: str = "", way: Way = LATE) -> torch.Tensor:
        assert old in body
        return run(body.replace(old, new), a, threads=128, shared=16384, way=way).view(64, 64)

    with pytest.raises(Found, match=r"without fence\.proxy\.async"):
        broken("tl::fence_proxy_async();")
    with pytest.raises(Found, match="race"):
        broken("__syncthreads();")
    with pytest.raises(Found, match=r"which a wgmma from .* still reads"):
        broken("tl::warpgroup_wait<0>();", "floats[t] = 0;")
    with pytest.raises(Found, match="deadlock"):
        broken("tl::wgmma_ss", "if (t < 96) tl::wgmma_ss")
    assert not torch.equal(broken("tl::warpgroup_wait<0>();"), wanted)
    assert torch.equal(broken("tl::warpgroup_wait<0>();", way=WAYS[0]), wanted)


CHAIN = """KERNELvoid first(const float *a, float *b, int tokens) {
  b[threadIdx.x] = b[threadIdx.x + 64] = a[threadIdx.x];
}
KERNELvoid second(const float *a, float *b, int tokens) {
  int t = threadIdx.x;
  WAIT
  b[t + 32] = b[31 - t] + a[t];
}
""".replace("KERNEL", 'extern "C" __global__ ')


@pytest.mark.parametrize(
    ("wait", "found"),
    [
        ("cudaGridDependencySynchronize();", None),
        pytest.param("float early = a[t];\n  cudaGridDependencySynchronize();\n  b[t + 32] = early;", None, marks=MORE),
        ("", r"race .*: thread \d+ reads b\+\d+ at line \d+ before it waits for a kernel that wrote there at line \d"),
        ("b[t + 64] = 9;\n  cudaGridDependencySynchronize();", r"race .* writes b\+\d+ .* that wrote there"),
        ("if (t == 0) cudaGridDependencySynchronize();\n  else return;", "thread [1-9]+ ends, but has not waited"),
    ],
)
def test_a_kernel_that_may_start_early_waits_before_it_touches_what_others_did(emulator, tmp_path, wait, found):
    arguments = [Argument(name, ("tokens", 32), "float32", role) for name, role in (("a", "input"), ("b", "output"))]
    first, second = (Launch(name, ("a", "b", "tokens"), ("1", "1", "1"), (32, 1, 1), 0) for name in ("first", "second"))
    for use_pdl in (0, 1):
        plan = Plan((first, second), use_pdl=use_pdl)
        chain = Emulation(tmp_path, emulator, CHAIN.replace("WAIT", wait), plan, arguments)
        if found and use_pdl:
            with pytest.raises(Found, match=found):
                chain.run({"a": numbers(3, 32)}, 3)
        else:
            chain.run({"a": numbers(3, 32)}, 3)


@pytest.mark.parametrize(
    ("access", "bytes_", "least", "taken"),
    [
        ("floats[t]", 4, 1, 1),
        pytest.param("floats[0]", 4, 1, 1, marks=MORE),
        ("floats[2 * t]", 4, 1, 2),
        ("floats[32 * t]", 4, 1, 32),
        pytest.param("floats[33 * t]", 4, 1, 1, marks=MORE),
        pytest.param("((float2 *)floats)[t].x", 4, 1, 2, marks=MORE),
        pytest.param("*(double *)(floats + 2 * t)", 8, 2, 2, marks=MORE),
        pytest.param("*(double *)(floats + 32 * (t / 8) + 2 * (t % 8))", 8, 2, 4, marks=MORE),
        ("*(double *)(floats + 40 * (t / 4) + 2 * (t % 4))", 8, 2, 2),
        ("((uint4 *)floats)[t].x", 4, 1, 4),
        ("__shfl_sync(~0u, ((ushort *)floats)[t], 0)", 2, 1, 1),
        pytest.param("a[t]", 4, 4, 4, marks=MORE),
        ("a[8 * (t % 8)]", 4, 1, 8),
        pytest.param("*(double *)(a + 4 * (t / 2))", 8, 4, 8, marks=MORE),
    ],
)
def test_banks_and_sectors_are_counted(emulation, access, bytes_, least, taken):
    body = f"for (int i = t; i < 2048; i += 32) floats[i] = 0;\n__syncthreads();\nb[t] = {access};"
    a = numbers(2, 32)
    moved = [move for move in emulation(body, threads=32).movements({"a": a}, 2) if move.line == line_of(3)]
    (read,) = [move for move in moved if not move.writes]
    assert read.tensor == ("a" if "a" in re.findall(r"\ba\b", access) else "shared")
    assert (read.requests, read.lanes, read.bytes, read.least, read.taken) == (1, 32, 32 * bytes_, least, taken)
    (written,) = [move for move in moved if move.writes]
    assert (written.tensor, written.requests, written.least, written.taken) == ("b", 1, 4, 4)


def test_a_matrix_is_loaded_in_four_rounds_unless_its_rows_meet_in_a_bank(emulation):
    load = "uint r[4];\ntl::ptx_ldmatrix_x4((ushort *)shared + ROW, r);\nb[t] = r[0];"
    for row, taken in (("8 * t", 4), ("64 * t", 32), ("64 * t + 8 * (t % 8)", 4)):
        body = "for (int i = t; i < 2048; i += 32) floats[i] = 0;\n__syncthreads();\n" + load.replace("ROW", row)
        movements = emulation(body, threads=32).movements({"a": numbers(2, 32)}, 2)
        (read,) = [move for move in movements if move.line == line_of(4) and move.tensor == "shared"]
        assert (read.requests, read.least, read.taken) == (1, 4, taken)
