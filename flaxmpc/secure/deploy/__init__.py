"""Real parties: hosts that hold shares and compute, an owner who puts models there, and clients who ask."""
