"""The machine a run is on: processes, cards, what it can do; nothing of models or data."""
