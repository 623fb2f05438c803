"""`python -m tests.simulator --seeds 0-2000 [--defect NAME]`"""

import sys

from tests.simulator.run import main

sys.exit(main())
