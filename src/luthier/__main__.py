"""`python -m luthier` is the command `luthier`."""

import sys

from luthier.cli import main

sys.exit(main())
