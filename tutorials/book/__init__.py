"""The tools of the book: `quote` (code into the pages), `run` (execute them), `edition` (make HTML of them)."""
