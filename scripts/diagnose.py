"""Why does my reward not rise? See realgen_jax/diagnosis.

python scripts/diagnose.py runs/NAME
"""

import sys

from realgen_jax.diagnosis.diagnose import main

if __name__ == "__main__":
    sys.exit(main())
