"""The same numbers sooner: each file names the function of `core` that it equals."""
