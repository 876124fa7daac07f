"""Numbers and the bits that stand for them, as parts of Triton kernels. GPUs before Hopper have no instructions for
e4m3, and those for integers of few bits are slow."""

# mypy: ignore-errors
# What is inside the kernels is Triton's language, for which there are no types.

import triton
import triton.language as tl


@triton.jit
def from_nibble(values, dtype: tl.constexpr):
    """0 to 15 -> -8 to 7. Placed in the lowest bits of a power of two whose last bit has the value 1, they need no
    conversion from integers, which is slower than arithmetic."""
    if dtype == tl.bfloat16:
        return (values.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136  # 2^7 + 8
    elif dtype == tl.float16:
        return (values.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1032  # 2^10 + 8
    else:
        return values.to(tl.float32) - 8


@triton.jit
def from_e4m3(values):
    """Bytes of e4m3 as float16, times 2^-8: the exponent moves into a field of one bit more, whose bias is 15 and not
    7. Exact, also for subnormal numbers, and on GPUs that know no e4m3."""
    return ((values.to(tl.int16) << 8 >> 1) & ~0x4000).to(tl.float16, bitcast=True)


@triton.jit
def place(words, first: tl.constexpr, bits: tl.constexpr, is_signed: tl.constexpr, exponent):
    """The `bits` bits from bit `first` on of each word, as a float32; where they are not signed, less 2^(bits - 1).

    Or-ed into the mantissa of 2^(23 - first) they count whole numbers: one logical operation and one subtraction, which
    is exact, convert them. `exponent` has the bits of 2^23. It is an argument, since a number that the compiler knows
    would cost a logical operation of its own.
    """
    half: tl.constexpr = 1 << (bits - 1)
    mask: tl.constexpr = (2 * half - 1) << first
    flip: tl.constexpr = half << first if is_signed else 0  # two's complement: from its least number on
    number = (words & mask) ^ (exponent - (first << 23) + flip)
    return number.to(tl.float32, bitcast=True) - ((1 << (23 - first)) + half)


@triton.jit
def place_e4m3(words, byte: tl.constexpr):
    """A byte of each word, e4m3, as a float32, times 2^-120: sign, exponent and mantissa move to where those of a
    float32 are. Exact, also for subnormal numbers."""
    number = (words.to(tl.int32, bitcast=True) << (24 - 8 * byte)) >> 4
    return (number & (0x07F00000 - 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(x, HAS_E4M3: tl.constexpr = False):
    """float32 as a byte of e4m3: to the nearest, on ties to the even; at most 448. One instruction for two of them on
    GPUs that have it."""
    if HAS_E4M3:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.uint32, bitcast=True)
    sign, size = (bits >> 24) & 128, tl.abs(x)
    small = (size + 16384.0).to(tl.uint32, bitcast=True)  # adding 2^14 rounds to multiples of 2^-9: e4m3's subnormals
    bits = tl.minimum(size, 448.0).to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # 127 - 7, of the exponents' biases
    magnitude = tl.where(size < 0.015625, small, normal) & 127
    return (sign | tl.where(size == size, magnitude, 127)).to(tl.uint8)


@triton.jit
def magnitudes(x):
    """Integers in the order of |x|, of float32, NaN the largest: maxima of floats pass over NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_magnitude(x):
    """max |x| of float32, NaN if one is."""
    return tl.max(magnitudes(x), 0).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_scale(largest):
    """Divided by it, the largest of some numbers becomes 448, the largest of e4m3; 1 for zeros. Divisions are those of
    IEEE 754, as torch's between tensors, where `/` is an approximation."""
    scale = tl.div_rn(largest, 448.0)
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def scaled_to_e4m3(x, scale, inverse, HAS_E4M3: tl.constexpr):
    """x / scale, one number for all of x, as bytes of e4m3. `inverse` is 1 / scale."""
    return to_e4m3(quotient(x, scale, inverse) if HAS_E4M3 else tl.div_rn(x, scale), HAS_E4M3)


@triton.jit
def quotient(x, divisor, inverse):
    """x / divisor to the bit, by three instructions in place of a dozen: the inverse of the divisor, rounded, gives it
    but for the last bit, and what is then left of x says how that is to be corrected (Markstein 1990). Where that could
    be too small or too large for a float32, it is divided."""
    if (divisor > 2.0**-60) & (divisor < 2.0**60):
        near = x * inverse
        beyond = tl.fma(near, divisor, x * -1.0)
        result = tl.fma(beyond, -inverse, near)  # with these signs -0 stays -0
    else:
        result = tl.div_rn(x, divisor)
    return result
