"""What must hold whatever comes in: each rule is a target for a fuzzer that follows the branches.

A target is a module with `check(data)`, which raises when its rule is broken, and `SEEDS` to begin
with. The suite runs every target on Hypothesis' bytes and on what was found before; `make fuzz`
runs them for as long as one likes.
"""

TARGETS = ("sse", "stream", "requests", "keys", "upstream")
