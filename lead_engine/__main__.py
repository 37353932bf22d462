"""`python -m lead_engine` and `torchrun -m lead_engine`: the same command line as `lead-engine`."""

import sys

from lead_engine.cli import main

sys.exit(main())
