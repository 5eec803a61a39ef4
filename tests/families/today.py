"""Models that are wrong, crash, or are refused without need until the plain engine is mended."""

NOT_YET: frozenset[str] = frozenset({"deepseek_v4"})
