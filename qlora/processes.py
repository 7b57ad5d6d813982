"""The processes of one run, on one machine or on several (torchrun, accelerate launch): what they do together.

Each begins as if it were alone. They meet where the first has something that all need. Alone, nothing here waits.
"""

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta

from qlora import console, settings
from qlora.console import USER_MISTAKE, UserError

# That processes wait for each other, for the first prepares the rows, and a model may be quantised in between. One that
# ended is noticed at once by the launcher on its machine. Other machines may wait so long for it.
PATIENCE = timedelta(hours=2)


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

    Outside of it only the first process of a machine reports, for then all of them have the same problem.
    """
    try:
        yield
    except Exception as error:
        explained = console.explain(error)
        if not explained or settings.process_rank(local=True) == 0:
            raise
        console.print_problems(explained.problems, quiet=False)
        raise SystemExit(explained.code) from error
