"""Names of the orders in which the codes of a packed index may lie in CPU memory."""

PLANES = "planes-le"  # of the disk: `planes`
WOVEN = "woven"  # of three bits on AVX-512: `woven`
