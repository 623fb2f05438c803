"""`python -m gwproxy`: the same as the installed command."""

import sys

from gwproxy.cli import main

sys.exit(main())
