"""One sequence on its way through a network: its memory, its threads, and the step."""

from __future__ import annotations

import os
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from sketchconv.kernels.atomics import yield_address
from sketchconv.kernels.decoder import layout as at
from sketchconv.kernels.decoder.crew import crew
from sketchconv.kernels.decoder.loop import close_token, open_token, run
from sketchconv.kernels.decoder.memory import Memory
from sketchconv.kernels.decoder.network import Network
from sketchconv.kernels.decoder.program import Program


class Session:
    """Decodes one sequence, one token at a time.

    A session is for one thread at a time; several sessions may share a network and run at the same
    time.

    Args:
        network: the weights; they must not be written to or freed meanwhile.
        dtype: of the cached keys and values: float32, bfloat16 or float16.
        capacity: positions to have room for; more are made where they are needed.
        threads: how many threads may work on a token. The results do not depend on it.
        kernels: name of the kernels (`dispatch.choose`); None takes the fastest.

    Raises:
        ValueError: the network's shapes do not fit together, or `threads` is below 1.
    """

    def __init__(
        self,
        network: Network,
        dtype: torch.dtype = torch.float32,
        capacity: int = 256,
        threads: int = 1,
        kernels: str | None = None,
    ) -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}, must be at least 1")
        sizes = (len(network.layers), network.key_heads, network.head_dim)
        self.memory = Memory(*sizes, dtype, capacity)
        self.network, self.threads, self._kernels = network, threads, kernels
        self._program = Program(network, self.memory, threads, kernels)
        self._process = os.getpid()
        self._make_own()

    def _make_own(self) -> None:
        """Memory for each thread, and new cells.

        A helper that comes too late may still hold a job with the old memory, which is smaller: it
        looks at the old cells, where no token will ever be open again.
        """
        cells = at.COUNTERS + at.PER_PHASE * len(self._program.phases)
        self._cells = np.zeros(cells, np.int64)
        own = (np.zeros(self._program.own_floats, np.float32) for _ in range(self.threads))
        fixed = (self._program.phases, self._program.reals, self._cells)
        self._jobs = [partial(run, *fixed, mine, yield_address()) for mine in own]

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` positions."""
        if capacity > self.memory.capacity:
            self.memory.grow(capacity)
            self._program.attach()
            self._make_own()

    def copy(self) -> Session:
        """A session of its own on the same network, with the same keys and values."""
        memory = self.memory
        made = Session(self.network, memory.dtype, memory.capacity, self.threads, self._kernels)
        made.memory.keys.copy_(memory.keys)
        made.memory.values.copy_(memory.values)
        return made

    def __deepcopy__(self, memo: object) -> Session:
        return self.copy()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Session holds addresses and cannot be pickled")

    def step(self, token: int, position: int) -> Tensor:
        """Logits, float32 ``[vocabulary]``, after `token` at `position`; its key and value stay.

        Raises:
            ValueError: there is no such token, or the position is negative.
        """
        if not 0 <= token < self.network.embedding.rows:
            raise ValueError(f"token {token} is not among {self.network.embedding.rows}")
        if position < 0:
            raise ValueError(f"position is {position}, must not be negative")
        if position >= self.memory.capacity:
            self.reserve(max(position + 1, 2 * self.memory.capacity))
        if self._process != os.getpid():  # a fork's copy of helpers that were inside
            self._cells[:] = 0
            self._process = os.getpid()
        open_token(self._cells, token, position)
        helpers = crew() if self.threads > 1 else None
        try:
            if helpers is not None and helpers.lock.acquire(blocking=False):
                try:
                    helpers.call(self._jobs[1:])
                    self._jobs[0]()
                finally:
                    helpers.lock.release()
            else:
                self._jobs[0]()
        finally:
            close_token(self._cells, yield_address())
        return torch.from_numpy(np.array(self._program.logits.numpy()))
