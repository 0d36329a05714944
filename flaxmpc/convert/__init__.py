"""Converts a fine-tuned model into one that is cheap under MPC: replaces parts, distils, measures, writes a card."""
