"""From files to a prepared dataset: read, clean, order, split, write."""
