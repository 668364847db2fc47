"""Attributes costs (time, operations or bytes) to a model's modules, with hooks."""

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
    """Splits the growth of running totals among the modules that run within the context.

    The costs of a module's children are not part of its own. Costs outside of all module calls
    belong to the model itself.

    Args:
        model: the model; within the context it may be called as a whole or in parts.
        read: returns the current totals, by name. It is called when a module starts and ends.

    Yields:
        The growth by the module's name (``""`` for the model itself), then by the total's name. It
        is complete when the context has ended.
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
    """Sums each module's own costs and those of all its descendants."""
    sums: dict[str, Counter[str]] = {name: Counter() for name in own}
    for name, counts in own.items():
        parts = name.split(".") if name else []
        for depth in range(len(parts) + 1):
            sums[".".join(parts[:depth])].update(counts)
    return sums
