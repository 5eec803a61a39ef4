"""Templates: how a task's rows become prompts, choices and answers."""
