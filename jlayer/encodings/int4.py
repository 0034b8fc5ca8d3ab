"""int4, 4.25 bits per weight: `q` uint8 [out, (in + 1) // 2], and an 8-bit `scale` per 32 inputs.

The low half bytes of a row hold its first half, the high half bytes its second: so a row unpacks
without shuffling. A scale has a sign, 4 bits of exponent and 3 of mantissa.

    weight = scale * (u + u * u * u / 128), u = half byte - 7

The steps grow with distance from zero, where trained weights are rare (18% less squared error than
even steps at the same bits). The positive range (12) is larger than the negative one (9.7). The
sign of the scale is chosen so that the largest weight of a group is on the positive side. Every
step of decoding is exact in float32.
"""

from jlayer.encodings.grouped import Grouped

INT4 = Grouped("int4", bits=4, group=32, q_dtype="uint8", scale_dtype="uint8")

# The half byte for zero, and the factor of u * u * u.
ZERO = 7
CUBE = 1 / 128
# A scale is 2 ** (exponent - SCALE_BIAS) * (1 + mantissa / 8), from 6e-5 to 3.75.
SCALE_BIAS = 14
MANTISSA_BITS = 3
# A scale's exponent and mantissa bits, shifted by FLOAT_SHIFT, plus SCALE_OFFSET, are the bits of a
# float32.
FLOAT_SHIFT = 23 - MANTISSA_BITS
SCALE_OFFSET = (127 - SCALE_BIAS) << 23
