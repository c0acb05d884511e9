"""One replica among others: how it follows, what it tells, what it waits for."""
