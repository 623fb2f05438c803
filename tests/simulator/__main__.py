"""`python -m tests.simulator --seeds 0-2000 [--defect NAME]`"""

import sys

from tests.simulator.run import main

if __name__ == "__main__":  # the processes that it starts import this too
    sys.exit(main())
