"""`python -m hmoe_rec` is the program `hmoe-rec`, so that `torchrun -m hmoe_rec train ...` works."""

from hmoe_rec.cli import main

if __name__ == "__main__":
    main()
