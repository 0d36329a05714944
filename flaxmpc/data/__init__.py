"""Labelled texts: read from files, checked, split, encoded and put in batches."""
