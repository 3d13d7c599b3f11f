"""What the compiler makes of the kernels for GPUs that are not here: it spills nothing.

The fast tests compile, for each architecture, the largest block that each way of use is given; the
slow ones all of them, other numbers of Gaussians and 16-bit storage as well. Triton keeps what it
has compiled, so that a second run is quick.
"""

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed: nothing compiles the kernels")

from bench import static  # noqa: E402

# Bytes, of 64 KiB (gfx942) to 227 KiB (sm_90): several programs have to fit at a time. A product
# keeps its operands there, on sm_100 with a few bytes of barriers besides; the decoder those of
# three steps.
SHARED = {
    "packed": 0, "splat": 16 << 10, "points": 16 << 10, "windows": (32 << 10) + 64,
    "decode": (96 << 10) + 64,
}  # fmt: skip
KERNELS = (
    "splat_forward", "splat_backward", "points_forward", "points_backward",
    "packed_gaussians", "packed_splat",
    "windows_weights", "windows_forward", "windows_backward_features", "windows_backward_weights",
    "decode_features", "decode_colours",
)  # fmt: skip
TARGETS = pytest.mark.parametrize("target", static.TARGETS)


def size_of_block(constants):
    return constants.get("PY", 1) * constants.get("PX", 1) * constants.get("CELLS", 1)


def largest_blocks(target):
    """One configuration of each kernel, use and pass."""
    found = {}
    for name, constants, warps in static.shipped(target):
        # K is but the end of a loop, on which the packed kernels' code hardly depends.
        keys = ("C", "R", "PREPARE", "WIDE", "SPLIT", "TYPE")
        keys += ("K",) * (not name.startswith("packed"))
        use = name, *(constants.get(x) for x in keys)
        if use not in found or size_of_block(constants) > size_of_block(found[use][1]):
            found[use] = name, constants, warps
    return list(found.values())


def over_the_ceilings(target, configurations, values="fp32"):
    """Those that spill, keep anything on the stack or take much shared memory, and how much."""
    assert configurations
    wrong = []
    for name, constants, warps in configurations:
        found = static.resources(static.compile_kernel(name, constants, target, warps, values))
        limit = SHARED[name.split("_")[0]]
        if static.spills(name, found) or found["shared"] > limit:
            wrong.append((name, constants, warps, found))
    return wrong


@pytest.mark.parametrize("kernel", KERNELS)
@TARGETS
def test_largest_blocks(target, kernel):
    assert over_the_ceilings(target, [c for c in largest_blocks(target) if c[0] == kernel]) == []


@pytest.mark.slow
@pytest.mark.parametrize("values", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kernel", KERNELS)
@TARGETS
def test_all_blocks(target, kernel, values):
    shipped = [c for c in static.shipped(target) if c[0] == kernel]
    assert over_the_ceilings(target, shipped, values) == []


@pytest.mark.slow
@TARGETS
def test_most_channels_of_a_launch(target):
    from gsr.kernels import splat

    use = static.Use("most", K=4, C=splat.CHANNELS, R=1, offset=True)
    # But for 64-bit positions: on sm_80 that backward, which no model uses, spills 16 bytes.
    found = [c for c in static.configurations(target, use) if "WIDE" not in c[1]]
    assert over_the_ceilings(target, found) == []


@pytest.mark.slow
@pytest.mark.parametrize("gaussians", [1, 9])
@TARGETS
def test_other_numbers_of_gaussians(target, gaussians):
    of_direct = [
        (name, constants | {"K": gaussians}, warps)
        for name, constants, warps in largest_blocks(target)
        if constants.get("C") == 3 and constants["R"] == 1
    ]
    assert over_the_ceilings(target, of_direct) == []


def test_no_compilation_for_particular_numbers():
    """Of rows, sizes and strides, which change from strip to strip and from image to image."""
    for kernel in KERNELS:
        parameters = static.kernel_of(kernel).params
        pointers = {
            *static.STORED, *static.POINTERS, *static.SCALARS, *static.DECODED, *static.MATRICES
        }  # fmt: skip
        numbers = [p for p in parameters if not p.is_constexpr and p.name not in pointers]
        assert numbers
        assert [p.name for p in numbers if not p.do_not_specialize] == []


def test_all_kernels_are_shipped_to_every_target():
    for target in static.TARGETS:
        assert {name for name, _, _ in static.shipped(target)} == set(KERNELS)


@pytest.fixture(scope="module")
def ptx():
    """PTX of one configuration of each kernel."""
    chosen = {name: (name, *rest) for name, *rest in largest_blocks("sm_90")}
    return {
        name: static.compile_kernel(name, constants, "sm_90", warps).asm["ptx"]
        for name, constants, warps in chosen.values()
    }


def test_products_of_official_are_float32():
    """As three of tf32: one would lose 13 bits, which the interpreter does not show."""
    for target in ("sm_80", "sm_90", "sm_100"):
        name, constants, warps = next(
            c for c in static.shipped(target) if c[0] == "windows_forward"
        )
        count = {}
        for precision in ("tf32", constants["PRECISION"]):
            compiled = static.compile_kernel(
                name, constants | {"PRECISION": precision}, target, warps
            )
            count[precision] = static._hot(static.disassemble(compiled))
        one, all_ = (sum(n for op, n in c.items() if "MMA" in op) for c in count.values())
        assert len(count) == 2 and one > 0 and all_ == 3 * one


def test_instructions_of_the_decoder():
    """Of warps, for a pixel; of matrices as many as 557,056 multiply-adds take."""
    most = {"sm_80 bf16": 2200, "sm_80 fp32": 18_000, "sm_90 bf16": 1400, "sm_90 fp32": 9_500}
    mma = {"sm_80 bf16": 272, "sm_80 fp32": 1632}  # those of sm_90 depend on the blocks
    for target in ("sm_80", "sm_90"):
        for name, constants, warps in static.decoders(target):
            if name == "decode_colours":
                compiled = static.compile_kernel(name, constants, target, warps)
                found = static.decoder_counts(constants, warps, static.disassemble(compiled))
                use = f"{target} {constants['TYPE']}"
                assert found["instructions"] < most[use], use
                assert round(found["MMA"]) == mma.get(use, round(found["MMA"])), use


def test_products_of_the_decoder_are_float32():
    """As three of tf32, as those of `official`: four for the waves, and one for the layers."""
    for target in ("sm_80", "sm_90"):
        for name, constants, warps in static.decoders(target):
            if name == "decode_colours" and constants["TYPE"] == "fp32":
                text = static.compile_kernel(name, constants, target, warps).asm["ttgir"]
                assert len(re.findall(r"= (?:tt|ttng)\.(?:dot|warp_group_dot) ", text)) == 3 * 5


def test_the_decoder_waits_for_its_threads():
    """What one thread leaves in `scratch` another reads: the interpreter knows no threads."""
    for name, constants, warps in static.decoders("sm_90"):
        if name == "decode_colours":
            text = static.compile_kernel(name, constants, "sm_90", warps).asm["ttgir"]
            assert len(re.findall(r"^ *(?:gpu|ttg)\.barrier", text, re.MULTILINE)) == 2


def test_no_atomics(ptx):
    """One writer for each output is why a result repeats bit by bit."""
    for name, text in ptx.items():
        assert not re.search(r"\b(atom|red)\.", text), name


def test_multiplications_and_additions_are_fused(ptx):
    """Triton 3.10 stops doing so unless it is told; `gsr/kernels.py` tells it."""
    for name in ("splat_forward", "splat_backward", "points_forward", "points_backward"):
        text = ptx[name]
        fused, apart = (len(re.findall(rf"\b{op}\S*\.f32", text)) for op in ("fma", "add"))
        assert fused > apart, name


@pytest.mark.parametrize("kernel", KERNELS)
def test_arguments_that_are_1(kernel):
    """Triton makes a constant of a number that is 1, and a Python number has no `.to(tl.int64)`.

    The interpreter knows nothing of this. What is meant to be widened must not be specialized.
    """
    name, constants, warps = next(c for c in largest_blocks("sm_90") if c[0] == kernel)
    function = static.kernel_of(name)
    others = {
        *static.STORED, *static.POINTERS, *static.SCALARS, *static.DECODED, *static.MATRICES
    }  # fmt: skip
    numbers = {
        p.name: 1
        for p in function.params
        if not p.is_constexpr and not p.do_not_specialize and p.name not in others
    }
    static.compile_kernel(name, constants | numbers, "sm_90", warps)
    if "WIDE" in function.arg_names:
        static.compile_kernel(name, constants | numbers | {"WIDE": True}, "sm_90", warps)


def test_fractional_scales_cost_what_their_weights_cost():
    """At x4.1 at most 1.15 times the instructions a weight of x4 (sm_90, the bundled model)."""
    from bench.cost import Shape

    def instructions(py, px):
        """Of one cell of py x px pixels, setting up and storing included."""
        config = static.configs.choose_packed("sm_90", (py, px), cells=(10_000, 10_000))
        config |= {"PY": py, "PX": px}
        constants = {"K": 9, "R": 1, "NORMALIZE": True, "LEVELS": False, **config}
        warps = constants.pop("num_warps")
        code = static.disassemble(static.compile_kernel("packed_splat", constants, "sm_90", warps))
        s = Shape(9, 3, 1, h=8, w=32, H=8 * py, W=32 * px)
        return static.count("packed_splat", constants, code, s)["issue"] / 8 / 81

    blocks = {s: static.configs.choose_packed_block((s, s), (10_000, 10_000), 32) for s in (4, 4.1)}
    assert blocks == {4: (4, 4), 4.1: (5, 5)}
    whole = instructions(4, 4) / 16
    split = (0.9 * instructions(4, 5) + 0.1 * instructions(5, 5)) / 4.1**2
    assert 7 < whole < 12 and split < 1.15 * whole


def test_small_images_fill_a_gpu():
    from gsr.kernels import configs

    for side, scale in ((96, 4), (96, 2.5), (48, 4), (720, 4)):
        py, px = configs.choose_packed_block((scale, scale), (side, side), 32)
        n = -(-scale // 1)
        programs = side * -(-side // 32) * -(-n // py) * -(-n // px)
        assert programs >= configs.BUSY, (side, scale)
    assert configs.choose_packed_block((4, 4), (720, 1280), 32) == (4, 4)
    assert configs.choose_packed_block((4, 4), (4, 4), 32) == (1, 1)
