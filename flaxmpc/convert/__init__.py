"""Replace, distil, fold."""
