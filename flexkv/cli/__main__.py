"""``python -m flexkv.cli``."""

import sys

from flexkv.cli.main import main

sys.exit(main())
