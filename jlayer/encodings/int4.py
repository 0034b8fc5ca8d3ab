"""int4, 4.25 bits a weight: `q` uint8 [out, (in + 1) // 2], and a `scale` of 8 bits for 32 inputs.

The low halves of a row's bytes are its first half and the high ones its second, so that a row
unpacks without shuffling. A scale has a sign, 4 bits of exponent and 3 of mantissa.

    weight = scale * (u + u * u * u / 128), u = half byte - 7

The steps grow outwards, where trained weights are few (18% less squared error than even steps at
the same bits). They reach further up (12) than down (9.7); the scale's sign turns a group so that
its largest weight is up. Every step of decoding is exact in float32.
"""

from jlayer.encodings.grouped import Grouped

INT4 = Grouped("int4", bits=4, group=32, q_dtype="uint8", scale_dtype="uint8")

# The half byte that stands for zero, and what the cube of a step is multiplied by.
ZERO = 7
CUBE = 1 / 128
# A scale is 2 ** (exponent - SCALE_BIAS) * (1 + mantissa / 8), from 6e-5 to 3.75.
SCALE_BIAS = 14
MANTISSA_BITS = 3
# What the bits of its exponent and mantissa are shifted by, and then raised by, to be a float32.
FLOAT_SHIFT = 23 - MANTISSA_BITS
SCALE_OFFSET = (127 - SCALE_BIAS) << 23
