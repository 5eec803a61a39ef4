"""`compare`: methods over seeds and tasks, and how sure the differences between them are."""
