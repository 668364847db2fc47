"""Which module of a model a cost belongs to: time, operations or bytes, by hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn

__all__ = ["attribute", "sum_of_parts"]


@contextmanager
def attribute(
    model: nn.Module, read: Callable[[], Mapping[str, float]]
) -> Iterator[dict[str, Counter[str]]]:
    """Splits what running totals grow by among the modules that run meanwhile.

    What a module's children do is theirs alone. What happens outside of all calls of modules is the
    model's own.

    Args:
        model: may be called within the context as a whole or in parts, also in several ones.
        read: gives the totals of now, by name. It is called whenever a module begins and ends.

    Yields:
        The growth by the module's name (``""`` for the model itself), then by the total's. It is
        complete once the context has ended.
    """
    own: dict[str, Counter[str]] = {name: Counter() for name, _ in model.named_modules()}
    running = [""]
    last = dict(read())

    def settle() -> None:
        nonlocal last
        now = dict(read())
        for name, total in now.items():
            own[running[-1]][name] += total - last.get(name, 0)
        last = now

    def enter(name: str) -> Callable:
        def hook(*_: object) -> None:
            settle()
            running.append(name)

        return hook

    def leave(*_: object) -> None:
        settle()
        running.pop()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(enter(name), prepend=True).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield own
        settle()


def sum_of_parts(own: Mapping[str, Counter[str]]) -> dict[str, Counter[str]]:
    """For each module what it and all modules below it have, of what each has on its own."""
    sums: dict[str, Counter[str]] = {name: Counter() for name in own}
    for name, counts in own.items():
        parts = name.split(".") if name else []
        for depth in range(len(parts) + 1):
            sums[".".join(parts[:depth])].update(counts)
    return sums
