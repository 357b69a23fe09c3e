"""Where the numbers of a program lie: rows of int64, one row per phase of a token.

A phase is a step that needs all results of the step before it; its work is cut into chunks. All
addresses are of memory that the `Session` keeps.
"""

from __future__ import annotations

EMBED, LINEAR, ATTEND = 0, 1, 2  # kinds of phases

# Every phase
KIND, CHUNKS, CHUNK_ROWS = 0, 1, 2

# EMBED: the row of the token, as float32
E_KERNEL, E_INDEX, E_TABLES, E_GROUPS, E_COLUMNS, E_TARGET = 3, 4, 5, 6, 7, 8

# LINEAR: up to three matrices on one input, normalised before where NORM is not 0
X, COLUMNS, NORM, FINISH, TARGET, COUNT, FIRST = 3, 4, 5, 6, 7, 8, 9
KEEP, ADD, GATE = 0, 1, 2  # FINISH: leave the products, add them to TARGET, or SiLU(first) * second
# One matrix; KERNEL 0 is a dense one, with its weights at INDEX and their dtype in TABLES
KERNEL, INDEX, TABLES, ROWS, GROUPS, GROUP_COLUMNS, BIAS, Y = range(8)
MATRIX = 8

# ATTEND: rotation, the new position of the cache, and attention; a chunk is one head
Q, K, V, OUT, HEADS, SHARE, DIM, WIDTH, CACHE = 3, 4, 5, 6, 7, 8, 9, 10, 11
KEYS, VALUES, BLOCKS, Q_NORM, K_NORM, COS, SIN = 12, 13, 14, 15, 16, 17, 18

FIELDS = FIRST + 3 * MATRIX
EPS, SCALE = 0, 1  # the float32 numbers of a phase
REALS = 2

# Cells shared by the threads, in int64, each on a cache line of its own
LINE = 8
OPEN, ACTIVE, TOKEN, POSITION = 0, LINE, 2 * LINE, 3 * LINE
COUNTERS = 4 * LINE  # then per phase: chunks taken, chunks done
PER_PHASE = 2 * LINE

# A thread's own memory, in float32: the normalised input; or, in attention, vectors of WIDTH (room,
# query, key, value, result), then scores
OWN_VECTORS = 5
