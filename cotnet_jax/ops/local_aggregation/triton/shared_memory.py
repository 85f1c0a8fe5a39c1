"""Words that each lane of a Triton kernel keeps for itself in shared memory; importable only where
triton is.

Registers cannot be indexed and are few; Triton puts nothing else into shared memory than it sees
fit. These functions are the few lines of PTX that do. No lane reads another's words, so that no
barrier is needed. A kernel may allocate once, at most 48 kB (PTX's limit for what is not sized at
launch).
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _declaration(size):
    return f"{{ .shared .align 16 .b8 kept[{size}]; mov.u32 $0, kept; }}"


@triton.jit
def allocate(WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the address of each lane's first of WORDS words, of 32 bits.

    Word i is 4 * BLOCK * i further.
    """
    # fmt: off
    base = tl.inline_asm_elementwise(_declaration(4 * BLOCK * WORDS), "=r,r", [0], dtype=tl.int32,
                                     is_pure=False, pack=1)
    # fmt: on
    # Two neighbouring lanes are most often in one thread: their words lie in two rows, so that a
    # row's words are in different banks.
    lane = tl.arange(0, BLOCK)
    return base + ((lane % 2) * (BLOCK // 2) + lane // 2) * 4


@triton.jit
def put(address, word):
    """Store a word of 32 bits for each lane."""
    # fmt: off
    tl.inline_asm_elementwise("st.shared.b32 [$1], $2; mov.u32 $0, 0;", "=r,r,r", [address, word],
                              dtype=tl.int32, is_pure=False, pack=1)
    # fmt: on


@triton.jit
def get(address):
    """Return the word that ``put`` stored last, as int32."""
    # fmt: off
    return tl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=tl.int32,
                                     is_pure=False, pack=1)
    # fmt: on


@triton.jit
def pack(low, high):
    """Return two values of 16 bits in a word."""
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def unpack(word, DTYPE: tl.constexpr):
    """Return the two values of a word, as float32."""
    low = word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
