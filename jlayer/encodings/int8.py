"""int8, 8.125 bits per weight: `q` int8 [out, in], and a bfloat16 `scale` per 128 inputs.

weight = q * scale, exactly in float32.
"""

from jlayer.encodings.grouped import Grouped

INT8 = Grouped("int8", bits=8, group=128, q_dtype="int8", scale_dtype="bfloat16")
