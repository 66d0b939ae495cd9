"""Where an epoch's time goes. See realgen_jax/profiling.

python scripts/profile_summary.py runs/NAME
"""

import sys

from realgen_jax.profiling.summary import main

if __name__ == "__main__":
    sys.exit(main())
