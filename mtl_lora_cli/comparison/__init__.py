"""Many runs, one table: here the yardstick, which measures the speed of training steps."""
