"""What diagnose.py reads, and the checks it makes."""
