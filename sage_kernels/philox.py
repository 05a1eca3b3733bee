"""Counter-based normals in plain torch: the specification of the noise.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key and a counter into four
random words; Box-Muller turns two words into two normals. A seed belongs to one image, so no row index enters:

    key     = (seed low word, seed high word)
    counter = (j low word, j high word, call, tag)          j = element // 4
    words w0, w1, w2, w3 -> elements 4j, 4j+1 (from w0, w1) and 4j+2, 4j+3 (from w2, w3)

    u      = (float(w) + 1) * 2^-32                          in [2^-32, 1]
    radius = sqrt(-2 ln u)
    angle  = 2 pi w' / 2^32
    (w, w') -> radius * cos(angle), radius * sin(angle)

Every float32 operation is rounded on its own, in the order written here, so that other backends can give the same bits.
"""

import math

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# ln(1 + f) = f - f^2/2 + f^3 * polynomial(f) for 1 + f in [0.69921875, 1.3984375), highest power first.
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_WINDOW = 0x3F330000  # bits of 0.69921875, where the mantissa window starts
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# sin x = x + x^3 * polynomial(x^2) and cos x = 1 - x^2/2 + x^4 * polynomial(x^2) on [-pi/4, pi/4], highest power first.
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_QUARTER_TURN = 3.6572952e-10  # (pi / 2) * 2^-32


def _multiply(constant, word):
    """High and low words of constant * word; 16 bits at a time, because the product would not fit in int64."""
    low = constant * (word & 0xFFFF)
    carry = (low >> 16) + constant * (word >> 16)
    return carry >> 16, ((carry & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(key, counter):
    """Ten rounds of Philox4x32.

    Args:
        key: two int64 tensors holding 32-bit words.
        counter: four int64 tensors holding 32-bit words, broadcastable with the key.

    Returns:
        Four int64 tensors holding 32-bit words.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _uniform(word):
    """(0, 1] in float32; the largest words round up to 1, which gives a radius of 0."""
    return (word.to(torch.float32) + 1.0) * 2.0**-32


def _horner(coefficients, x):
    y = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + c
    return y


def _radius(word):
    u = _uniform(word)
    bits = u.view(torch.int32) - _WINDOW
    exponent = (bits >> 23).to(torch.float32)
    f = ((bits & 0x7FFFFF) + _WINDOW).view(torch.float32) - 1.0
    z = f * f
    y = _horner(_LOG, f) * f * z
    y = exponent * _LN2_LOW + y
    y = z * -0.5 + y
    log_u = exponent * _LN2_HIGH + (f + y)
    # Torch's float32 sqrt on CPU is not correctly rounded; a float64 sqrt rounded to float32 is.
    square = log_u * -2.0
    return torch.sqrt(torch.where(square > 0.0, square, 0.0).double()).to(torch.float32)


def _cos_sin(word):
    quadrant = ((word + 0x20000000) & _WORD) >> 30
    rest = (word << 2) & _WORD
    rest = torch.where(rest >= 2**31, rest - 2**32, rest)  # signed: the angle within its quadrant, exact
    x = rest.to(torch.float32) * _QUARTER_TURN
    z = x * x
    sine = (_horner(_SIN, z) * z) * x + x
    cosine = ((_horner(_COS, z) * z) * z + z * -0.5) + 1.0
    swap = (quadrant & 1) == 1
    c, s = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    c = torch.where(((quadrant + 1) & 2) == 2, -c, c)
    s = torch.where((quadrant & 2) == 2, -s, s)
    return c, s


def _pair(word, angle_word, dtype):
    if dtype == torch.float64:
        radius = torch.sqrt(-2.0 * torch.log(_uniform(word).double()))
        angle = angle_word.double() * (2.0 * math.pi * 2.0**-32)
        return radius * torch.cos(angle), radius * torch.sin(angle)
    radius = _radius(word)
    c, s = _cos_sin(angle_word)
    return radius * c, radius * s


def normals(seed, call, n, *, tag=0, dtype=torch.float32):
    """Standard normals, one row per seed. See the module's docstring for the definition.

    Args:
        seed (Tensor): [R], int64. The same seed, call and tag give the same row wherever it stands.
        call (Tensor): [R], int32: the second counter word, the index of the denoiser call.
        n (int): elements per row. A shorter row is a prefix of a longer one.
        tag (int): the last counter word; separates streams of one seed and call.
        dtype: float32 is the specification (error against float64 at most 6e-7); float64 is for checking it.

    Returns:
        [R, n], dtype.
    """
    blocks = (n + 3) // 4
    j = torch.arange(blocks, dtype=torch.int64, device=seed.device).expand(seed.numel(), blocks)  # [R, blocks]
    column = lambda word: (word.to(torch.int64) & _WORD).view(-1, 1).expand_as(j)  # noqa: E731
    words = philox4x32(
        (column(seed), column(seed >> 32)),
        (j & _WORD, j >> 32, column(call), torch.full_like(j, tag & _WORD)),
    )
    quads = (*_pair(words[0], words[1], dtype), *_pair(words[2], words[3], dtype))
    return torch.stack(quads, dim=-1).flatten(1)[:, :n]
