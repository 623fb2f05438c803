"""`python -m gwproxy.demo`: the built-in upstream as a process of its own."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
