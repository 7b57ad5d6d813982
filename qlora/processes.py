"""The processes of one run, on one machine or on several (torchrun, accelerate launch): what they do together.

Each begins as if it were alone. They meet where the first has something that all need. Alone, nothing here waits.
"""

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta

from qlora import console, settings
from qlora.console import RUN_FAILED, USER_MISTAKE, Problem, RunError, UserError

# That processes wait for each other, for the first prepares the rows, and a model may be quantised in between. One that
# ended is noticed at once by the launcher on its machine. Other machines may wait so long for it.
PATIENCE = timedelta(hours=2)
# In torch's RuntimeError for a process that ended: gloo's words, and NCCL's.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process", "ncclRemoteError")


def meet() -> None:
    """Waits until all processes are here."""
    import torch
    from accelerate import PartialState

    if settings.process_count() > 1:
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE).wait_for_everyone()


def from_first(make: Callable):
    """What `make` returns in the first process; the others get it from there, over the network.

    Where it raises UserError, all processes end, and only the first reports it.
    """
    if settings.process_count() == 1:
        return make()
    from torch.distributed import broadcast_object_list

    meet()
    sent, error = [None, True], None
    if settings.process_rank() == 0:
        try:
            sent = [make(), False]
        except UserError as raised:
            error = raised
    broadcast_object_list(sent)
    if error:
        raise error
    made, has_failed = sent
    if has_failed:
        raise SystemExit(USER_MISTAKE)
    return made


def check_same(described: dict[str, object], fix: str) -> None:
    """Raises UserError where a process describes what it sees in another way than the first one does.

    Where processes differed on what to do next, some would wait for what others never do.
    """
    if settings.process_count() == 1:
        return
    from torch.distributed import all_gather_object

    meet()
    seen: list[dict] = [{}] * settings.process_count()
    all_gather_object(seen, described | {"processes per machine": settings.process_count(local=True)})
    from_first(lambda: compare(seen, fix))


def compare(seen: list[dict[str, object]], fix: str) -> None:
    """Raises UserError with the names of what differs between the first process and another."""
    for rank, other in enumerate(seen):
        if differs := [name for name, value in seen[0].items() if other.get(name) != value]:
            raise console.fail(f"not the same as in the first process: {', '.join(differs)}", f"process {rank}", fix)


@contextlib.contextmanager
def taking_turns() -> Iterator[None]:
    """One process per machine at a time is in the block, for what takes the memory of the whole machine.

    Each machine must have as many of them.
    """
    before, all_here = settings.process_rank(local=True), settings.process_count(local=True)
    for _ in range(before):
        meet()
    yield
    for _ in range(all_here - before):
        meet()


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Reports what fails in any process: it may be alone with its problem, such as a card without memory.

    That another process ended is a RunError; why, is in that one's own output.
    """
    try:
        yield
    except Exception as error:
        lost = explain_loss(error)
        explained = lost or console.explain(error)
        if explained and settings.process_rank(local=True) > 0:  # which console.run would not hear
            console.print_problems(explained.problems, quiet=False)
            raise SystemExit(RUN_FAILED if isinstance(explained, RunError) else USER_MISTAKE) from error
        if lost:
            raise lost from error
        raise


def explain_loss(error: Exception) -> RunError | None:
    """The RunError for torch's error when another process has ended; None for any other."""
    if not isinstance(error, RuntimeError) or not any(word in str(error) for word in LOST):
        return None
    what = f"another process of this run ended ({console.shorten_text(str(error))})"
    return RunError(Problem(what, "this run", "look at its message; --resume then goes on from the last checkpoint"))
