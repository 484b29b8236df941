"""python -m spec_tests.page matrix.html REPORT.json ..."""

import sys

from . import main

sys.exit(main(sys.argv[1:]))
