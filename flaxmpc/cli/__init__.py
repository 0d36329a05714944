"""The command line: what is said to it, and what it shows. What it does stands in the other rooms."""
