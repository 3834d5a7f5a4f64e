"""A name of another library that is replaced while halfbyte is installed over it, and how it is put back.

``where`` says what is replaced: ``module:name`` or ``module:Class.name`` an attribute, ``module:MAPPING[key]`` an item
of a dictionary, ``sys.modules[name]`` a module. What was not there before is taken away again.
"""

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

MISSING: Any = object()
"""Stands for what was not there before."""


@dataclasses.dataclass(frozen=True)
class Replacement:
    """One row of the table.

    Attributes:
        where: what is replaced; see the head of this file.
        make: makes the new value from the old one, which is :data:`MISSING` where there was none.
        why: what a script needs it for, in a sentence.
        library: whose name it is, as pip calls it.
        versions: of that library for which this was read and tried, as a PEP 440 specifier.
        cuda: whether it answers for a GPU that is not there (``install(cuda=False)`` leaves it out).
        after: what else is undone, given the new value, once the old one is back.
    """

    where: str
    make: Callable[[Any], Any]
    why: str
    library: str
    versions: str
    cuda: bool = False
    after: Callable[[Any], None] | None = None

    def put(self) -> Callable[[], None]:
        """Replace, and return what undoes it."""
        holder, key, is_item = self._place()
        old = holder.get(key, MISSING) if is_item else vars(holder).get(key, getattr(holder, key, MISSING))
        # what a descriptor keeps, as a function's __code__, is its object's own
        own = is_item or key in vars(holder) or inspect.isdatadescriptor(getattr(type(holder), key, None))
        new = self.make(old)
        if is_item:
            holder[key] = new
        else:
            setattr(holder, key, new)

        def undo() -> None:
            if is_item and old is MISSING:
                holder.pop(key, None)
            elif is_item:
                holder[key] = old
            elif own:
                setattr(holder, key, old)
            else:
                delattr(holder, key)  # it was inherited, or was not there
            if self.after is not None:
                self.after(new)

        return undo

    def _place(self) -> tuple[Any, str, bool]:
        if found := re.fullmatch(r"sys\.modules\[(.+)\]", self.where):
            return sys.modules, found[1], True
        module, _, path = self.where.partition(":")
        holder: Any = importlib.import_module(module)
        item = re.fullmatch(r"(.+)\[(.+)\]", path)
        names = (item[1] if item else path).split(".")
        for name in names if item else names[:-1]:
            holder = getattr(holder, name)
        if item:
            assert isinstance(holder, MutableMapping)
            return holder, item[2], True
        return holder, names[-1], False
