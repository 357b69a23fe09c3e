"""The thread that computes: requests of all tasks in one batch, joining and leaving at each step.

A step gives every running answer one more token. New requests join between two steps: their prompts
are read, short ones together and long ones each before a step of its own, and their keys and values
are put below those of the others. An answer leaves as soon as it is complete or nobody waits for
it. Requests that do not fit wait in a queue.

Models whose cache is more than keys and values of all positions (sliding windows, recurrent states)
are served one request at a time.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import deque
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sketchconv.adapters import batch
from sketchconv.serving.jobs import Job, live
from sketchconv.serving.problems import Problem
from sketchconv.serving.rows import Rows, fits, padded, together
from sketchconv.serving.sampling import pick

log = logging.getLogger(__name__)


class Engine:
    """Answers jobs with one model; all methods may be called from any thread.

    Args:
        model: a causal language model with its adapters, in CPU memory or on a device.
        ends: tokens that end an answer.
        concurrent: answers under way at a time.
        queue: requests that may wait.
    """

    def __init__(self, model: Any, ends: frozenset[int], concurrent: int, queue: int) -> None:
        self._model, self._ends = model, ends
        self._takes = inspect.signature(model.forward).parameters
        self._concurrent = concurrent if fits(DynamicCache(config=model.config)) else 1
        self._queue = queue
        self._waiting: deque[Job] = deque()
        self._joining: list[Job] = []  # their prompts are being read
        self._running: list[Job] = []
        self._rows: Rows | None = None
        self._bell = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="sketchconv-serve", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers under way."""
        return len(live(self._running))

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closed

    def submit(self, job: Job) -> None:
        """Let a job be answered.

        Raises:
            Problem: 429, the queue is full; 503, the server is stopping.
        """
        with self._bell:
            self.check_room()
            self._waiting.append(job)
            self._bell.notify()

    def check_room(self) -> None:
        """Refuse what `submit` would refuse now, before work goes into a job.

        Raises:
            Problem: 429, the queue is full; 503, the server is stopping.
        """
        with self._bell:
            if not self.alive:
                raise Problem(503, "the server is stopping")
            self._waiting = deque(one for one in self._waiting if not one.cancelled)
            taken = len(self._running) + len(self._joining) + len(self._waiting)
            if taken >= self._concurrent + self._queue:
                raise Problem(429, "too many requests are waiting; try again later")

    def cancel(self, job: Job) -> None:
        """Drop a job; its place is free before the next step."""
        with self._bell:
            job.cancelled = True
            self._bell.notify()

    def close(self) -> None:
        """Stop after the step under way; answers that are not complete fail."""
        with self._bell:
            self._closed = True
            self._bell.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            new = self._admit()
            if new is None:
                break
            try:
                with torch.inference_mode():
                    self._turn(new)
            except Exception:
                log.exception("a step failed; the answers in it are given up")
                self._give_up([*self._running, *new], Problem(500, "the model failed"))
        self._give_up([*self._running, *self._waiting], Problem(503, "the server is stopping"))

    def _give_up(self, jobs: list[Job], problem: Problem) -> None:
        with self._bell:
            self._joining, self._running, self._rows = [], [], None
        for job in jobs:
            job.fail(problem)

    def _admit(self) -> list[Job] | None:
        """The jobs that join now; waits until there is something to do. None at the end."""
        with self._bell:
            while True:
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
                if self._closed:
                    return None
                if self._waiting or self._running:
                    break
                self._bell.wait()
            room = self._concurrent - len(live(self._running))
            count = together((len(job.prompt) for job in self._waiting), room)
            self._joining = [self._waiting.popleft() for _ in range(count)]
            return self._joining

    def _turn(self, new: list[Job]) -> None:
        """Drop who left, give each running answer a token, and read the prompts of who is new."""
        self._drop()
        if self._running:
            self._step()
        if new:
            self._drop()
            self._read(new)

    def _drop(self) -> None:
        kept = live(self._running)
        if len(kept) == len(self._running):
            return
        self._running = [self._running[number] for number in kept]
        self._rows = self._rows.keep(kept) if kept and self._rows is not None else None

    def _step(self) -> None:
        rows = self._rows
        if rows is None:
            raise RuntimeError("answers are running without a cache")
        ids = torch.tensor([[job.last] for job in self._running], device=self._model.device)
        positions = rows.lengths[:, None]
        rows.mask = torch.nn.functional.pad(rows.mask, (0, 1), value=1)
        logits = self._forward(ids, rows, positions, self._running)
        for job, row in zip(self._running, logits, strict=True):
            job.take(pick(row, job.sampling, job.random), self._ends)

    def _read(self, jobs: list[Job]) -> None:
        """Read the prompts of new jobs, give each its first token, and let them join."""
        ids, mask = padded([job.prompt for job in jobs], self._model.device)
        rows = Rows(DynamicCache(config=self._model.config), mask)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self._forward(ids, rows, positions, jobs)
        for job, row in zip(jobs, logits, strict=True):
            job.take(pick(row, job.sampling, job.random), self._ends)
        self._rows = rows if self._rows is None else self._rows.join(rows)
        with self._bell:  # so that none is counted twice, or not at all
            self._joining, self._running = [], [*self._running, *jobs]

    def _forward(self, ids: Tensor, rows: Rows, positions: Tensor, jobs: list[Job]) -> Tensor:
        """Logits of the last position, ``[jobs, vocabulary]``."""
        more = {"position_ids": positions, "logits_to_keep": 1}
        with batch.use(tuple(job.adapter for job in jobs)):
            output = self._model(
                input_ids=ids,
                attention_mask=rows.mask,
                past_key_values=rows.cache,
                use_cache=True,
                **{name: value for name, value in more.items() if name in self._takes},
            )
        rows.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits
