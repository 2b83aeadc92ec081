"""The parts of bench.py: what is measured against what, and what takes a process of its own."""
