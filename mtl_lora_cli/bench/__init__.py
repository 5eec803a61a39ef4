"""`bench`: the yardstick, which measures the speed of training steps."""
