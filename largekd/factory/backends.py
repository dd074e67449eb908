"""What the job needs of whatever writes the answers."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from largekd.curation.records import Ask, Written


class Backend(Protocol):
    """Writes answers: a model of this job, a server, vLLM.

    Who calls. Where `only_main` is true, rank 0 alone builds a backend and writes, and the others wait: a server's
    limits of requests, tokens and cost are then counted in one place, and `concurrency` is what the server sees. Where
    it is false every rank calls `write` once, at the same time, and a backend whose ranks must step together agrees
    with the others inside it, also on having no ask left and on stopping.

    What is written. `write` takes asks from the iterator when it has room for them, one at a time, never more than it
    can work at: an ask that was taken is this rank's, and no other rank gets it. For each ask it yields one `Written`
    with the ask's key as soon as it is whole, in any order. The job commits what it is given within
    `output.commit_s`; a backend keeps nothing back to make larger groups. An ask that cannot be answered (prompt too
    long, refused by the server, attempts used up) gives a `Written` with finish "failed" and the reason, not an error.

    Stopping. Once `stopping()` is true the backend takes no further ask. What it has begun it may drop when that costs
    nothing but time, and must finish and yield when it was paid for. It then returns; the job commits and a later start
    writes what is missing. A backend may also return early for a reason of its own, such as a cost limit, which it has
    logged: asks that it took and did not yield are written by a later start.

    Errors: `LargeKDError` for what the user can mend (key refused, model not found), on any rank; the job commits what
    was yielded before and ends on all ranks.
    """

    @property
    def identity(self) -> dict[str, Any]:
        """JSON: what decides the texts (model, digest of its weights, precision). A resumed job must have the same.
        Nothing secret and nothing that may change, such as an address, a price or a batch size."""
        ...

    @property
    def only_main(self) -> bool:
        """Whether rank 0 alone writes."""
        ...

    def write(self, asks: Iterator[Ask], *, stopping: Callable[[], bool]) -> Iterator[Written]:
        """One `Written` for each ask that was taken; see above."""
        ...

    def show(self, ask: Ask) -> str:
        """The prompt as the model will see it, for --dry-run; cheap, no weights and no request."""
        ...

    def count(self, ask: Ask) -> int:
        """Tokens of the prompt, or an estimate of them; it orders asks, and estimates costs."""
        ...

    def close(self) -> None:
        """Give back memory and connections; safe to call twice."""
        ...
