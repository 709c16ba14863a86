"""Modules that are changed in place: their class becomes a subclass of it, of the same name, that can be undone.

Parameters, buffers, hooks and submodules stay where they are, copies and pickles are of the subclass, and code that
looks at a class's name or asks `isinstance` sees what it saw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from tiles.errors import BadInput


class Patched(nn.Module):
    """The base of what a changed module does otherwise; comes before the module's own class."""

    mixin: ClassVar[type[Patched]]
    original: ClassVar[type[nn.Module]]

    own_attributes: tuple[str, ...] = ()
    """What instances hold beside the original's attributes."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As of any object, but the subclass, which no module holds, is made again."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        if "original" in vars(type(self)):
            function, arguments = _new, (self.mixin, self.original)
        return (function, arguments, *rest)


_CLASSES: dict[tuple[type[Patched], type[nn.Module]], type[Patched]] = {}


def patched_class(mixin: type[Patched], original: type[nn.Module]) -> type[Patched]:
    """The subclass of a module's class that does what `mixin` does; one for each pair."""
    if (mixin, original) not in _CLASSES:
        names = ("__module__", "__qualname__", "__doc__")
        namespace = {name: getattr(original, name) for name in names} | {"mixin": mixin, "original": original}
        _CLASSES[mixin, original] = type(original.__name__, (mixin, original), namespace)
    return _CLASSES[mixin, original]


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was changed."""
    return module.original if isinstance(module, Patched) else type(module)


def restore(module: Patched) -> None:
    """Give a changed module its own class back."""
    for name in module.own_attributes:
        vars(module).pop(name, None)
    module.__class__ = module.original  # type: ignore[assignment]


def check_restorable(module: Patched) -> None:
    """Raise `BadInput` where somebody has changed the class once more, as FSDP2 does."""
    if "original" not in vars(type(module)):
        raise BadInput(
            f"unpatch needs modules whose class patch has set, got {type(module).__name__} on top of it: "
            "unpatch before fully_shard or what else changes classes"
        )


def _new(mixin: type[Patched], original: type[nn.Module]) -> Patched:
    made: type[Patched] = patched_class(mixin, original)
    new: Callable[[type[Patched]], Patched] = object.__new__
    return new(made)
