"""Garbage is searched for rarely until a command's model is there, and as usual from then on."""

from __future__ import annotations

import gc

from mtl_lora_cli.machine import collector


def test_searches_are_rare_until_a_model_is_loaded() -> None:
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    collector.loaded()
    assert gc.get_freeze_count() == frozen, "nobody said that anything is loaded"
    try:
        collector.loading()
        collector.loading()
        assert gc.isenabled() and gc.get_threshold()[0] > 10 * usual[0]
        collector.loaded()
        assert gc.get_threshold() == usual
        assert gc.get_freeze_count() > frozen
        collector.loaded()
    finally:
        gc.unfreeze()
        gc.set_threshold(*usual)
