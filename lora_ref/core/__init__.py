"""A whole LoRA, to be read in one sitting: see `tutorials/reading_order.md`."""
