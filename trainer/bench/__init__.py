"""The learning benchmark: sequences of tasks, what each method keeps and loses, and the report."""
