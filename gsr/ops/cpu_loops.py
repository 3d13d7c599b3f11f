"""The loops of the CPU splat, compiled by Numba; `gsr.ops.cpu` prepares their arguments.

The HR pixels (or query points) nearest to one LR pixel are its cell, and all of them sum over the
same Gaussians. The loops put LANES neighbouring cells side by side in vectors, whose LLVM IR this
module emits itself: plain Numba was 6 to 11 times slower.
"""

# Numba and llvmlite have no types, and an intrinsic is called with other arguments than it is
# defined with, which no checker understands:
# pyright: basic, reportCallIssue=false, reportPrivateImportUsage=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import operator
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

LANES = 16  # one AVX-512 register of float32; with AVX2 two of 8, 10 to 15 % behind LANES = 8 there
PARAMETERS = 6  # centre (y, x), l_yy, l_xx, l_yx, opacity; the values follow
ROOT = np.sqrt(np.log2(np.e) / 2)  # exp(-q / 2) = 2^-(ROOT^2 q)
BATCH = 64  # passes placed at a time (an even number): they stay in the first cache

# ---- vectors -------------------------------------------------------------------------------------
# A Numba type, so that sums stay in registers. The vectors that LLVM finds by itself in loops over
# arrays keep them in memory.


class Lanes(types.Type):
    """LANES numbers of one type in a register."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        number = ir.FloatType() if lanes.dtype == types.float32 else ir.DoubleType()
        super().__init__(manager, lanes, ir.VectorType(number, LANES))


FUSED = ("contract",)  # allows a fused multiply-add and nothing else: NaN and infinity stay


def _define(symbol, instruction):
    @intrinsic
    def apply(context, a, b):
        def generate(context, builder, signature, args):
            return getattr(builder, instruction)(*args, flags=FUSED)

        return a(a, b), generate

    @overload(symbol)
    def _(a, b):
        if isinstance(a, Lanes) and a == b:
            return lambda a, b: apply(a, b)


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define(_symbol, _instruction)


def _constant(vector, number):
    return ir.Constant(vector, [number] * LANES)


def _multiply_add(builder, a, b, c):
    """a + b c"""
    return builder.fadd(a, builder.fmul(b, c, flags=FUSED), flags=FUSED)


def _function(builder, name, lanes, x):
    name = f"llvm.{name}.v{LANES}f{lanes.dtype.bitwidth}"
    function = ir.FunctionType(x.type, [x.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), [x])


def _address(context, builder, array_type, array, index, vector):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _load(context, builder, array_type, array, index):
    vector = context.get_value_type(Lanes(array_type.dtype))
    address = _address(context, builder, array_type, array, index, vector)
    return builder.load(address, align=array_type.dtype.bitwidth // 8)


@intrinsic
def load(context, array, index):
    """array[index : index + LANES]"""

    def generate(context, builder, signature, args):
        return _load(context, builder, array, *args)

    return Lanes(array.dtype)(array, types.intp), generate


@intrinsic
def store(context, array, index, lanes):
    """array[index : index + LANES] = lanes"""

    def generate(context, builder, signature, args):
        address = _address(context, builder, array, *args[:2], args[2].type)
        builder.store(args[2], address, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, lanes), generate


@intrinsic
def fill(context, array, number):
    """The number in every lane, in the type of the array."""
    lanes = Lanes(array.dtype)

    def generate(context, builder, signature, args):
        vector = context.get_value_type(lanes)
        one = builder.insert_element(
            ir.Constant(vector, ir.Undefined), args[1], ir.Constant(ir.IntType(32), 0)
        )
        order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), order)

    return lanes(array, array.dtype), generate


@intrinsic
def root(context, lanes):
    """The square root of every lane."""

    def generate(context, builder, signature, args):
        return _function(builder, "sqrt", lanes, args[0])

    return lanes(lanes), generate


# 2^-x on [-1/2, 1/2]: a minimax fit whose coefficients are float32 numbers, each found with those
# before it fixed. In float32 the error stays below 7e-8; one degree less makes it 1.5e-7.
_POWERS = (
    1.0,
    -0.6931471824645996,
    0.24022647738456726,
    -0.05550359934568405,
    0.009618505835533142,
    -0.0013390806270763278,
    0.0001532647293061018,
)


@intrinsic
def decay(context, lanes):
    """2^-x for x >= 0, 0 below the smallest normal number, NaN for NaN."""

    def generate(context, builder, signature, args):
        (x,) = args
        if lanes.dtype == types.float64:
            x = builder.fmul(x, _constant(x.type, -np.log(2.0)))
            return _function(builder, "exp", lanes, x)

        # 2^-x = 2^n 2^-(x + n) with n the integer nearest to -x. Adding 1.5 2^23 rounds to n, and
        # leaves n in the lowest bits; with 127 more they are the exponent of 2^n once shifted. None
        # of these three may be reordered, so they carry no flags.
        shift = _constant(x.type, 12582912.0 + 127.0)
        limit = _constant(x.type, 127.0)
        x = builder.select(builder.fcmp_ordered(">", x, limit), limit, x)  # NaN is not above it
        biased = builder.fsub(shift, x)
        rest = builder.fadd(builder.fsub(biased, shift), x)
        bits = ir.VectorType(ir.IntType(32), LANES)
        power = builder.shl(builder.bitcast(biased, bits), _constant(bits, 23))
        series = _constant(x.type, _POWERS[-1])
        for coefficient in _POWERS[-2::-1]:
            series = _multiply_add(builder, _constant(x.type, coefficient), series, rest)
        return builder.fmul(series, builder.bitcast(power, x.type))

    return lanes(lanes), generate


# Tuples of vectors, one a channel. `channels` is any tuple of as many numbers: its length is part
# of its type, so the loops over channels are unrolled and the sums stay in registers.


def _tuple_of(array, channels):
    return types.UniTuple(Lanes(array.dtype), len(channels))


@intrinsic
def load_all(context, array, index, stride, channels):
    """(array[index + c stride : ... + LANES] for c)"""
    result = _tuple_of(array, channels)

    def generate(context, builder, signature, args):
        where, lanes = args[1], []
        for _ in range(result.count):
            lanes.append(_load(context, builder, array, args[0], where))
            where = builder.add(where, args[2])
        return context.make_tuple(builder, result, lanes)

    return result(array, types.intp, types.intp, channels), generate


@intrinsic
def zeros(context, array, channels):
    """A zero vector for every channel."""
    result = _tuple_of(array, channels)

    def generate(context, builder, signature, args):
        zero = _constant(context.get_value_type(result.dtype), 0.0)
        return context.make_tuple(builder, result, [zero] * result.count)

    return result(array, channels), generate


@intrinsic
def add_products(context, sums, factors, factor):
    """(sums[c] + factors[c] factor for c)"""

    def generate(context, builder, signature, args):
        pairs = zip(*(cgutils.unpack_tuple(builder, args[n]) for n in (0, 1)), strict=True)
        lanes = [_multiply_add(builder, a, b, args[2]) for a, b in pairs]
        return context.make_tuple(builder, sums, lanes)

    return sums(sums, factors, factor), generate


@intrinsic
def add_dot(context, start, a, b):
    """start + sum_c a[c] b[c]"""

    def generate(context, builder, signature, args):
        result = args[0]
        for x, y in zip(*(cgutils.unpack_tuple(builder, args[n]) for n in (1, 2)), strict=True):
            result = _multiply_add(builder, result, x, y)
        return result

    return start(start, a, b), generate


@intrinsic
def scale_all(context, lanes, factor):
    """(lanes[c] factor for c)"""

    def generate(context, builder, signature, args):
        products = [builder.fmul(x, args[1]) for x in cgutils.unpack_tuple(builder, args[0])]
        return context.make_tuple(builder, lanes, products)

    return lanes(lanes, factor), generate


@intrinsic
def store_all(context, array, index, stride, lanes):
    """array[index + c stride : ... + LANES] = lanes[c] for c"""

    def generate(context, builder, signature, args):
        where = args[1]
        for x in cgutils.unpack_tuple(builder, args[3]):
            address = _address(context, builder, array, args[0], where, x.type)
            builder.store(x, address, align=array.dtype.bitwidth // 8)
            where = builder.add(where, args[2])
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp, lanes), generate


# ---- compilation ---------------------------------------------------------------------------------

_inlined = numba.njit(error_model="numpy", forceinline=True)
_called = numba.njit(error_model="numpy")  # inlining these would double the time of compiling


def _entry(function):
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(**options)(function)


# ---- arguments -----------------------------------------------------------------------------------


class Shape(NamedTuple):
    k: int
    h: int
    w: int
    radius: int


class Cells(NamedTuple):
    """Which pixels belong to which cell: of a grid, or of points if `order` is not empty.

    Coordinates are LR pixels from the centre of the cell's LR pixel. Pixels are numbered within
    their image.
    """

    top: np.ndarray  # grid: [h + 1], where the HR rows of each row of cells start
    left: np.ndarray  # grid: [w + 1], where the HR columns of each column of cells start
    start: np.ndarray  # points: [B h w + 1], where each cell's points start
    order: np.ndarray  # points: [B Q], number of the point
    y: np.ndarray  # grid: [H]; points: [B Q]
    x: np.ndarray  # grid: [W]; points: [B Q]


class Layout(NamedTuple):
    """Strides of an image [B, C, rows, W], or of points [B, Q, C]."""

    image: int
    channel: int
    pixel: int


# ---- cells ---------------------------------------------------------------------------------------


@_entry
def group(cell, start, order):
    """Sort points by cell, those of one cell in their order: fills start [cells + 1] and order."""
    start[:] = 0
    for n in range(cell.size):
        start[cell[n] + 1] += 1
    for c in range(start.size - 1):
        start[c + 1] += start[c]
    place = start.copy()
    for n in range(cell.size):
        order[place[cell[n]]] = n
        place[cell[n]] += 1


@_inlined
def _passes(cells, shape, b, i, j):
    """The most pixels that one of the cells (i, j ... j + LANES - 1) has."""
    most = 0
    if cells.order.size > 0:
        row = (b * shape.h + i) * shape.w
        for column in range(j, min(j + LANES, shape.w)):
            most = max(most, cells.start[row + column + 1] - cells.start[row + column])
        return most
    for column in range(j, min(j + LANES, shape.w)):
        most = max(most, cells.left[column + 1] - cells.left[column])
    return most * (cells.top[i + 1] - cells.top[i])


@_inlined
def _place(cells, shape, b, i, j, skip, n, y, x, pixel):
    """Coordinates and numbers of n pixels from `skip` on of LANES cells, pass by pass.

    y, x, pixel: [n, LANES]; where a cell has no more pixels, 0, 0 and -1.
    """
    # Lane l is the cell of LR pixel j + l, and a pass takes the next pixel of every cell.
    points = cells.order.size > 0
    for lane in range(LANES):
        column, put, stop = j + lane, lane, n * LANES + lane
        if column < shape.w and points:
            c = (b * shape.h + i) * shape.w + column
            begin = cells.start[c] + skip
            for at in range(begin, min(begin + n, cells.start[c + 1])):
                y[put], x[put], pixel[put] = cells.y[at], cells.x[at], cells.order[at]
                put += LANES
        elif column < shape.w:
            left, right = cells.left[column], cells.left[column + 1]
            if left < right:
                row, at = cells.top[i] + skip // (right - left), left + skip % (right - left)
                while put < stop and row < cells.top[i + 1]:
                    y[put], x[put] = cells.y[row], cells.x[at]
                    pixel[put] = (row - cells.top[0]) * cells.left[shape.w] + at
                    put += LANES
                    at += 1
                    if at == right:
                        row, at = row + 1, left
        for free in range(put, stop, LANES):
            y[free], x[free], pixel[free] = 0, 0, -1


# ---- Gaussians -----------------------------------------------------------------------------------
# A Gaussian is kept as its centre, the whitening (a, b) of d = point - centre, and what it carries:
#
#     a = l_yy d_y + l_yx d_x    b = l_xx d_x    weight = opacity 2^-(a a + b b)
#
# which is the formula of `gsr.ops.reference.splat_at` with the Cholesky factor of its quadratic
# form. The sum of two squares does not cancel, as the form does when |rho| is near 1.


@_inlined
def _width(shape):
    """Lanes of a row of Gaussians with `radius` empty ones, of no weight, on either side."""
    return (shape.w + LANES - 1) // LANES * LANES + (2 * shape.radius + LANES - 1) // LANES * LANES


# The parameters come as `planes`, the addresses of [B, K, PARAMETERS + C] planes [h, w] (flat;
# offset, sigma, rho, opacity, values; 0 for none), so that views into one tensor need no copy. A
# tuple of arrays would be safer, but Numba counts references to them in the middle of the loops.


@intrinsic
def _pointer(context, address, array):
    """An address as a pointer to numbers of the array's type."""
    pointer = types.CPointer(array.dtype)

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(types.intp, array), generate


@_inlined
def _row(planes, shape, n, i, array):
    """Row i of the n-th plane [h, w]."""
    plane = numba.carray(_pointer(planes[n], array), (shape.h * shape.w,))
    return plane[i * shape.w : (i + 1) * shape.w]


@_called
def _prepare(table, start, planes, channels, shape, b, i, times_opacity):
    """One LR row of Gaussians: [K, PARAMETERS + C, width] from table[start] on.

    The values are multiplied by the opacity if wanted.
    """
    width, whole = _width(shape), shape.w // LANES * LANES
    zero, one, scale = fill(table, 0), fill(table, 1), fill(table, ROOT)
    parameters = PARAMETERS + len(channels)
    at = start
    for n in range(b * shape.k * parameters, (b + 1) * shape.k * parameters):
        # Beside the image a sigma of 0 would make the whitening infinite.
        outside = one if 2 <= n % parameters < 4 else zero
        for j in range(at, at + width, LANES):
            store(table, j, outside)
        if planes[n] != 0:
            row = _row(planes, shape, n, i, table)
            for j in range(0, whole, LANES):
                store(table, at + shape.radius + j, load(row, j))
            for j in range(whole, shape.w):
                table[at + shape.radius + j] = row[j]
        at += width
    step = parameters * width
    for k in range(shape.k):
        for g in range(start + k * step, start + k * step + width, LANES):
            sigma_y, rho = load(table, g + 2 * width), load(table, g + 4 * width)
            l_yy = scale / (root((one - rho) * (one + rho)) * sigma_y)
            l_xx = one / load(table, g + 3 * width)
            store(table, g + 2 * width, l_yy)
            store(table, g + 3 * width, scale * l_xx)
            store(table, g + 4 * width, zero - rho * sigma_y * l_yy * l_xx)
            if times_opacity:
                values = load_all(table, g + PARAMETERS * width, width, channels)
                values = scale_all(values, load(table, g + 5 * width))
                store_all(table, g + PARAMETERS * width, width, values)


# ---- forward -------------------------------------------------------------------------------------


@_inlined
def _weight(y, x, centre_y, centre_x, l_yy, l_yx, l_xx):
    d_x = x - centre_x
    a, b = l_yy * (y - centre_y) + l_yx * d_x, l_xx * d_x
    return decay(a * a + b * b)


@_inlined
def _sums(table, carried, shape, i, j, y, x, at):
    """(sum of weights, sum of weight value for every channel) of two passes at once.

    Two, because they share the loading of the Gaussians.
    """
    # The Gaussians of the LR pixels j + l + step are consecutive numbers in memory: nothing is
    # gathered. No sum crosses lanes, so that neither the batch, nor the rows asked for, nor the
    # number of threads can change a result.
    width, window = _width(shape), 2 * shape.radius + 1
    size = (PARAMETERS - 1 + len(carried)) * width
    sums, sums_next = zeros(table, carried), zeros(table, carried)
    for row in range(max(i - shape.radius, 0), min(i + shape.radius + 1, shape.h)):
        step_y = fill(table, i - row)
        y_0, y_1 = load(y, at) + step_y, load(y, at + LANES) + step_y
        for step in range(window):
            step_x = fill(table, shape.radius - step)
            x_0, x_1 = load(x, at) + step_x, load(x, at + LANES) + step_x
            g = row % window * shape.k * size + j + step
            for _ in range(shape.k):
                c_y, c_x = load(table, g), load(table, g + width)
                l_yy, l_xx = load(table, g + 2 * width), load(table, g + 3 * width)
                l_yx = load(table, g + 4 * width)
                these = load_all(table, g + 5 * width, width, carried)
                sums = add_products(sums, these, _weight(y_0, x_0, c_y, c_x, l_yy, l_yx, l_xx))
                sums_next = add_products(
                    sums_next, these, _weight(y_1, x_1, c_y, c_x, l_yy, l_yx, l_xx)
                )
                g += size
    return sums, sums_next


@_inlined
def _scratch(array, channels):
    """Memory of one task: y, x and number of BATCH passes of pixels, and a vector a sum."""
    y, x = np.empty(BATCH * LANES, array.dtype), np.empty(BATCH * LANES, array.dtype)
    sums = np.empty((1 + len(channels)) * LANES, array.dtype)
    return y, x, np.empty(BATCH * LANES, np.int64), sums


@_inlined
def _slide(table, ready, planes, channels, shape, b, i):
    """Prepare the LR rows from `ready` on that row i needs; row n goes to n % window."""
    size = shape.k * (PARAMETERS + len(channels)) * _width(shape)
    stop = min(i + shape.radius + 1, shape.h)
    for row in range(ready, stop):
        start = row % (2 * shape.radius + 1) * size
        _prepare(table, start, planes, channels, shape, b, row, True)
    return stop


@_inlined
def _table(array, channels, shape):
    """Memory for the rows of one window."""
    rows = (2 * shape.radius + 1) * shape.k * (PARAMETERS + len(channels))
    return np.empty(rows * _width(shape), array.dtype)


@_inlined
def _write(out, sums, scratch, channels, layout, b, pixel, at, normalize, eps):
    total = sums[0] + fill(scratch, eps) if normalize else fill(scratch, 1)
    store_all(scratch, 0, LANES, scale_all(sums, fill(scratch, 1) / total))
    for lane in range(LANES):
        n = pixel[at + lane]
        if n >= 0:
            put = b * layout.image + n * layout.pixel
            for c in range(len(channels)):
                out[put + c * layout.channel] = scratch[(c + 1) * LANES + lane]


@_entry
def splat(out, planes, channels, cells, shape, layout, normalize, eps, b, start, stop):
    """Fill `out` (flat) at the pixels of image b's rows of cells (start, stop)."""
    table = _table(out, channels, shape)
    y, x, pixel, scratch = _scratch(out, channels)
    carried = channels + (0,)  # the opacity, for the sum of weights, before the channels
    ready = max(start - shape.radius, 0)
    for i in range(start, stop):
        ready = _slide(table, ready, planes, channels, shape, b, i)
        for j in range(0, shape.w, LANES):
            passes = _passes(cells, shape, b, i, j)
            for skip in range(0, passes, BATCH):
                n = min(passes - skip, BATCH)
                _place(cells, shape, b, i, j, skip, n + n % 2, y, x, pixel)
                for p in range(0, n * LANES, 2 * LANES):
                    sums, more = _sums(table, carried, shape, i, j, y, x, p)
                    _write(out, sums, scratch, channels, layout, b, pixel, p, normalize, eps)
                    p += LANES
                    _write(out, more, scratch, channels, layout, b, pixel, p, normalize, eps)


# ---- backward ------------------------------------------------------------------------------------
# With g the gradient of the result, T the sum of weights + eps and G = g / T, the gradient of a
# weight is sum_c G_c value_c - S, where S = sum_c G_c out_c; if not normalised, T = 1 and S = 0.
# First every pixel's y, x, S and G are noted in the order of the passes; then every Gaussian
# gathers from its pixels.


@_entry
def count_passes(begin, cells, shape):
    """Where the passes of every LANES cells begin: fills begin [B, blocks of LANES cells + 1]."""
    passes = 0
    for b in range(begin.shape[0]):
        block = 0
        for i in range(shape.h):
            for j in range(0, shape.w, LANES):
                begin[b, block] = passes
                passes += _passes(cells, shape, b, i, j)
                block += 1
        begin[b, block] = passes


@_inlined
def _note(notes, at, grad, sums, scratch, channels, layout, b, y, x, pixel, place, normalize, eps):
    total = sums[0] + fill(scratch, eps) if normalize else fill(scratch, 1)
    for lane in range(LANES):
        n = pixel[place + lane]
        for c in range(len(channels)):
            if n >= 0:
                take = b * layout.image + n * layout.pixel + c * layout.channel
                scratch[(c + 1) * LANES + lane] = grad[take]
            else:
                scratch[(c + 1) * LANES + lane] = 0
    inverse = fill(scratch, 1) / total
    scaled = scale_all(load_all(scratch, LANES, LANES, channels), inverse)
    store_all(notes, at + 3 * LANES, LANES, scaled)
    mean = fill(scratch, 0)
    if normalize:
        store_all(scratch, 0, LANES, scale_all(sums, inverse))
        mean = add_dot(mean, scaled, load_all(scratch, LANES, LANES, channels))
    store(notes, at, load(y, place))
    store(notes, at + LANES, load(x, place))
    store(notes, at + 2 * LANES, mean)
    for lane in range(LANES):
        if pixel[place + lane] < 0:  # may be 0 / 0 so far, and must not reach any Gaussian
            for plane in range(2, 3 + len(channels)):
                notes[at + plane * LANES + lane] = 0


@_entry
def note(
    notes, begin, grad, planes, channels, cells, shape, layout, normalize, eps, b, start, stop
):
    """Fill `notes` for image b's rows of cells (start, stop).

    [passes, 3 + C, LANES] (flat): y, x, S and G. `begin` is that of `count_passes`.
    """
    table = _table(notes, channels, shape)
    y, x, pixel, scratch = _scratch(notes, channels)
    carried = channels + (0,)
    step = (3 + len(channels)) * LANES
    block = start * ((shape.w + LANES - 1) // LANES)
    ready = max(start - shape.radius, 0)
    for i in range(start, stop):
        ready = _slide(table, ready, planes, channels, shape, b, i)
        for j in range(0, shape.w, LANES):
            passes, put = begin[b, block + 1] - begin[b, block], begin[b, block] * step
            block += 1
            for skip in range(0, passes, BATCH):
                n = min(passes - skip, BATCH)
                _place(cells, shape, b, i, j, skip, n + n % 2, y, x, pixel)
                for p in range(0, n * LANES, 2 * LANES):
                    sums, more = _sums(table, carried, shape, i, j, y, x, p)
                    _note(
                        notes, put, grad, sums, scratch, channels, layout, b, y, x, pixel, p,
                        normalize, eps,
                    )  # fmt: skip
                    put += step
                    p += LANES
                    if p < n * LANES:
                        _note(
                            notes, put, grad, more, scratch, channels, layout, b, y, x, pixel, p,
                            normalize, eps,
                        )  # fmt: skip
                        put += step


@_inlined
def _moments(sums, g, notes, n, passes, table, channels, width, step_y, step_x):
    """Add to `sums` what the Gaussians of table[g] receive from the pixels of `passes` passes.

    With e the weight for opacity 1 and t = e (sum_c G_c value_c - S), the planes are the sums of
    t a, t b, t a a, t b b, t a b, t and e G_c.
    """
    c_y, c_x = load(table, g) - step_y, load(table, g + width) - step_x
    l_yy, l_xx = load(table, g + 2 * width), load(table, g + 3 * width)
    l_yx = load(table, g + 4 * width)
    values = load_all(table, g + PARAMETERS * width, width, channels)
    zero = fill(table, 0)
    m, m_a, m_b, m_aa, m_ab, m_bb = zero, zero, zero, zero, zero, zero
    m_values = zeros(table, channels)
    for _ in range(passes):
        d_x = load(notes, n + LANES) - c_x
        a, b = l_yy * (load(notes, n) - c_y) + l_yx * d_x, l_xx * d_x
        e = decay(a * a + b * b)
        scaled = load_all(notes, n + 3 * LANES, LANES, channels)
        m_values = add_products(m_values, scaled, e)
        t = e * add_dot(zero - load(notes, n + 2 * LANES), scaled, values)
        t_a, t_b = t * a, t * b
        m, m_a, m_b = m + t, m_a + t_a, m_b + t_b
        m_aa, m_ab, m_bb = m_aa + t_a * a, m_ab + t_a * b, m_bb + t_b * b
        n += (3 + len(channels)) * LANES
    store(sums, g, load(sums, g) + m_a)
    store(sums, g + width, load(sums, g + width) + m_b)
    store(sums, g + 2 * width, load(sums, g + 2 * width) + m_aa)
    store(sums, g + 3 * width, load(sums, g + 3 * width) + m_bb)
    store(sums, g + 4 * width, load(sums, g + 4 * width) + m_ab)
    store(sums, g + 5 * width, load(sums, g + 5 * width) + m)
    g += PARAMETERS * width
    before = load_all(sums, g, width, channels)
    store_all(sums, g, width, add_products(before, m_values, fill(table, 1)))


@_called
def _finish(out, sums, table, channels, shape, b, i):
    """From moments to the gradients of one LR row of Gaussians, written to `out`."""
    width, whole = _width(shape), shape.w // LANES * LANES
    zero, one = fill(table, 0), fill(table, 1)
    inverse, inverse_2 = fill(table, 1 / ROOT), fill(table, 1 / ROOT**2)
    parameters = PARAMETERS + len(channels)
    step = parameters * width
    for k in range(shape.k):
        for g in range(k * step, k * step + width, LANES):
            l_yy, l_xx = load(table, g + 2 * width), load(table, g + 3 * width)
            l_yx, opacity = load(table, g + 4 * width), load(table, g + 5 * width)
            lean = zero - l_yx / l_xx  # rho / s with s^2 = 1 - rho^2
            s = one / root(one + lean * lean)
            factor = inverse_2 * opacity
            m_a, m_b = load(sums, g) * factor, load(sums, g + width) * factor
            m_aa, m_bb = load(sums, g + 2 * width) * factor, load(sums, g + 3 * width) * factor
            m_ab = load(sums, g + 4 * width) * factor
            store(sums, g, m_a * l_yy)
            store(sums, g + width, m_a * l_yx + m_b * l_xx)
            store(sums, g + 2 * width, (m_aa + lean * m_ab) * s * l_yy * inverse)
            store(sums, g + 3 * width, (m_bb - lean * m_ab) * l_xx * inverse)
            store(sums, g + 4 * width, (m_ab - lean * m_aa) / s)
            values = load_all(sums, g + PARAMETERS * width, width, channels)
            store_all(sums, g + PARAMETERS * width, width, scale_all(values, opacity))
    at = shape.radius
    for n in range(b * shape.k * parameters, (b + 1) * shape.k * parameters):
        if out[n] != 0:
            row = _row(out, shape, n, i, table)
            for j in range(0, whole, LANES):
                store(row, j, load(sums, at + j))
            for j in range(whole, shape.w):
                row[j] = sums[at + j]
        at += width


@_entry
def gather(out, notes, begin, planes, channels, shape, b, start, stop):
    """Fill the planes `out` at image b's LR rows (start, stop) from `notes`."""
    width, radius = _width(shape), shape.radius
    size = (PARAMETERS + len(channels)) * width
    table = np.empty(shape.k * size, notes.dtype)
    sums = np.empty(shape.k * size, notes.dtype)
    blocks = (shape.w + LANES - 1) // LANES
    for i in range(start, stop):
        _prepare(table, 0, planes, channels, shape, b, i, False)
        sums[:] = 0
        for row in range(max(i - radius, 0), min(i + radius + 1, shape.h)):
            step_y = fill(table, row - i)
            for block in range(blocks):
                n = begin[b, row * blocks + block]
                passes = begin[b, row * blocks + block + 1] - n
                n *= (3 + len(channels)) * LANES
                if passes > 0:
                    for step in range(2 * radius + 1):
                        step_x = fill(table, radius - step)
                        for k in range(shape.k):
                            g = k * size + block * LANES + step
                            _moments(
                                sums, g, notes, n, passes, table, channels, width, step_y, step_x
                            )
        _finish(out, sums, table, channels, shape, b, i)
