"""`python -m hmoe_rec` is the program `hmoe-rec`, so that `torchrun -m hmoe_rec train ...` works."""

import sys

from hmoe_rec.search_path import without_current_folder

# `python -m` searches the current folder first, even for the modules of other packages, and it may be anybody's run.
sys.path[:] = without_current_folder()

from hmoe_rec.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
