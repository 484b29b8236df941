"""Nothing is half-done and nothing hangs: transactions, refusals, regular expressions that end in time."""
