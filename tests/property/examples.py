"""How many random sequences each property test runs; fewer under a sanitizer, which is slow."""

import os

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "1500"))
