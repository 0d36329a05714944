"""Replace, distil, evaluate."""
