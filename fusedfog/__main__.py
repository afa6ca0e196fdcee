"""`python -m fusedfog` is the `fusedfog` command."""

import sys

from fusedfog.cli.main import main

sys.exit(main())
