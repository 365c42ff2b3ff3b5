"""Brings placed weights into the worker, graph by graph, and runs them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pi2.accelerator import GraphSwap
from pi2.tensor import F32

from pi2_backend_qnn.client import Client, Reply
from pi2_backend_qnn.placed import DECODE, Placed, Shape

if TYPE_CHECKING:
    from pi2_backend_qnn.contexts import Contexts


KEPT: Final = 2
"""Graphs of a matrix or an FFN for decoding, and as many for prompts, at once."""


class Programs:
    """Graphs of one worker: compiled here when they are first needed, or taken from ``contexts``."""

    def __init__(self, client: Client, contexts: Contexts | None) -> None:
        self._client, self._contexts = client, contexts
        self._numbers = 0
        self._dropped: list[int] = []

    def prepare(self, placed: Placed, shape: Shape) -> None:
        """Start to make a graph, and do not wait.  Raises WorkerDied, ContextMissing."""
        self._client.start()
        if placed.generation != self._client.generation:
            placed.forget(self._client.generation)
        if shape not in placed.graphs:
            self._numbers += 1
            request = self._request(placed, shape) | {"number": self._numbers, "ahead": True}
            placed.building[shape] = self._client.ask(request)
            placed.graphs[shape] = self._numbers

    def is_ready(self, placed: Placed, shape: Shape) -> bool:
        """Whether a graph can be run without waiting for it."""
        if placed.generation != self._client.generation or shape not in placed.graphs:
            return False
        ticket = placed.building.get(shape)
        return ticket is None or self._client.poll(ticket)

    def choose(self, placed: Placed, wanted: Shape) -> Shape:
        """The graph to run: ``wanted``, which is asked for if it is not ready, or until then the smallest of
        those that are and have room for as many tokens and clusters.  They give the same bits.
        """
        if self.is_ready(placed, wanted):
            return wanted
        fitting = (shape for shape in placed.graphs if all(map(operator.ge, shape, wanted)))
        ready = [shape for shape in fitting if self.is_ready(placed, shape)]
        if not ready:
            return wanted
        self.prepare(placed, wanted)
        return min(ready, key=lambda shape: (shape[0] * shape[1], shape))

    def begin(
        self, placed: Placed, shape: Shape, inputs: Mapping[str, F32], outputs: Sequence[tuple[int, ...]]
    ) -> Run:
        """Start to run a graph.  Raises QnnError if it cannot be made."""
        begin = self._client.now()
        self.prepare(placed, shape)
        self._await(placed, shape)
        waited = self._client.now() - begin
        made = placed.made.pop(shape, None)
        self._drop_oldest(placed, shape)
        self._drop()
        self._client.reuse()
        where_in = {name: self._client.share(values) for name, values in inputs.items()}
        where_out = [self._client.room(size) for size in outputs]
        asked = {"do": "run", "number": placed.graphs[shape], "inputs": where_in, "outputs": where_out}
        swap = None if made is None else GraphSwap(made.start, made.end, waited)
        return Run(self._client, self._client.ask(asked, unseen=True), where_out, swap)

    def release(self, placed: Placed) -> None:
        """Have the graphs forgotten, before the next run."""
        if placed.generation == self._client.generation and self._client.process_id is not None:
            for ticket in placed.building.values():
                self._client.forget(ticket)
            self._dropped += placed.graphs.values()
        placed.forget(0)

    def save(self, placed: Placed, shape: Shape, path: Path) -> None:
        """Compile a graph into ``path`` and a file beside it.  Raises QnnError."""
        self._client.call(self._compile(placed, shape) | {"number": 0, "save": str(path)})

    def _await(self, placed: Placed, shape: Shape) -> None:
        ticket = placed.building.pop(shape, None)
        if ticket is None:
            return
        try:
            placed.made[shape] = self._client.wait(ticket)
        except BaseException:
            placed.graphs.pop(shape, None)
            raise

    def _drop_oldest(self, placed: Placed, used: Shape) -> None:
        """Every graph has a copy of the weights of its own: few are kept, those that were used last."""
        placed.graphs[used] = placed.graphs.pop(used)
        alike = [shape for shape in placed.graphs if (shape[0] > DECODE) == (used[0] > DECODE)]
        for shape in alike[:-KEPT]:
            if shape not in placed.building:
                self._dropped.append(placed.graphs.pop(shape))
                placed.made.pop(shape, None)

    def _drop(self) -> None:
        if self._dropped:
            numbers, self._dropped = self._dropped, []
            self._client.call({"do": "drop", "numbers": numbers})

    def _request(self, placed: Placed, shape: Shape) -> dict[str, Any]:
        if self._contexts is None:
            return self._compile(placed, shape)
        return {"do": "load", **self._contexts.find(placed, shape)}

    def _compile(self, placed: Placed, shape: Shape) -> dict[str, Any]:
        self._client.reuse()
        asked, arrays = placed.request(shape)
        asked |= {name: self._client.share(array) for name, array in arrays.items()}
        return asked | {"save": None}


class Run:
    """A graph that is being run."""

    def __init__(self, client: Client, ticket: int, where: Sequence[Any], swap: GraphSwap | None) -> None:
        self._client, self._ticket, self._where = client, ticket, where
        self.swap = swap
        """The making of the graph, if this is its first run."""

    def finish(self) -> tuple[Reply, list[F32]]:
        """Wait for it.  The results are views, good until the next request.  Raises QnnError."""
        try:
            reply = self._client.wait(self._ticket)
        except BaseException:  # Ctrl-C, too
            self.cancel()
            raise
        return reply, [self._client.view(where) for where in self._where]

    def cancel(self) -> None:
        """Nobody wants the results."""
        self._client.forget(self._ticket)
