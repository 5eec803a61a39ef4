"""Python's search for garbage, while libraries are loaded.

A module that is loaded leaves hundreds of thousands of objects, and none of them is garbage; to look through them
again and again takes as long as half of loading torch and transformers. So a command begins with rarer searches,
and goes back to the usual ones when its model is there.
"""

from __future__ import annotations

import gc

_RARE = (50_000, 20, 100)
_usual: tuple[int, int, int] | None = None


def loading() -> None:
    """Search rarely from now on."""
    global _usual
    if _usual is None:
        _usual = gc.get_threshold()
        gc.set_threshold(*_RARE)


def loaded() -> None:
    """As usual again, where `loading` came before; what is there by now is not searched any more."""
    global _usual
    if _usual is not None:
        gc.set_threshold(*_usual)
        gc.freeze()
        _usual = None
