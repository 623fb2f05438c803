"""A simulator of the ledger: its real modules on a played disk, in played time, under a seeded
scheduler that may end the process between any two steps; judged by an oracle that shares no code
with them. `python -m tests.simulator --seeds 0-2000` prints the seeds that fail.
"""
